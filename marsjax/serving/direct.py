"""Requests for scores without the framework: an ASGI layer in front of it that answers those that are sound.

Finding the route, the dependencies and the exits of a request takes longer than checking and answering it, and more
than scoring one candidate. What is not sound goes on to the framework, which says what is wrong with it as it does
everywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from marsjax.serving.limits import Receive, Scope, Send


class Direct:
    """Answers `POST path` with a JSON body that `model` takes by `answer`; an HTTPException by `failed`."""

    def __init__(
        self,
        app: Any,
        *,
        path: str,
        model: type[BaseModel],
        answer: Callable[[Any], Awaitable[Response]],  # what `model` made of the body
        failed: Callable[[HTTPException], Response],
    ):
        self._app, self._path, self._model, self._answer, self._failed = app, path, model, answer, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        try:
            asked = self._model.model_validate_json(b"".join(message.get("body", b"") for message in messages))
        except ValidationError:
            await self._app(scope, _again(messages, receive), send)
            return
        try:
            response = await self._answer(asked)
        except HTTPException as error:
            response = self._failed(error)
        await response(scope, receive, send)


def json_error(error: HTTPException) -> Response:
    """A failure as the service tells it."""
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return len(kinds) == 1 and means_json(kinds[0].decode("latin-1"))


def means_json(content_type: str) -> bool:
    """Whether the value of a content-type is that of JSON."""
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _again(messages: list[Any], receive: Receive) -> Receive:
    """What was read, and then what comes."""
    left = iter(messages)

    async def receiving() -> Any:
        for message in left:
            return message
        return await receive()

    return receiving
