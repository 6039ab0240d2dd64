"""The online service of section 3.5.3 over HTTP. Needs the extra `serve`: imported only where it is started.

Annotations are evaluated here, since FastAPI reads those of the routes, which name classes within a function.
"""

import asyncio
import contextlib
import functools
import gc
import hmac
import json
import logging
import math
import os
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteError

from marsjax import __version__
from marsjax.evaluation import page
from marsjax.serving import explaining, limits, people, scoring, snapshots, versions
from marsjax.serving.bundle import item_numbers
from marsjax.serving.direct import Direct, json_error, means_json
from marsjax.serving.engine import Answer, Compilations, Engine, Snapshot, Task, warm_up
from marsjax.serving.events import LARGEST, LONGEST_ID, Event, encode_event
from marsjax.serving.measures import Measures
from marsjax.serving.storage import RUNNER, Storage, StorageError

log = logging.getLogger(__name__)

MISSES = 3  # looks into the store in a row that are late before it is left alone: one may be a pause of this process
RETRY = 60.0  # seconds after which a version that was refused is tried again: a disk may have been out for a moment
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVENTS_TOKEN, ADMIN_TOKEN = "MARSJAX_EVENTS_TOKEN", "MARSJAX_ADMIN_TOKEN"


KEYS = {"deadline": "deadline_ms", "store_deadline": "store_deadline_ms", "poll": "poll_seconds"}  # in a configuration


class Settings(NamedTuple):
    """How the service behaves."""

    root: pathlib.Path
    host: str = "127.0.0.1"
    port: int = 8080
    deadline: float = 0.05  # seconds after which nothing is looked up any more, and the score is the unaugmented one
    store_deadline: float = 0.02  # seconds that the store has to answer
    store_pause: float = 1.0  # seconds for which a store that did not answer is not asked
    poll: float = 0.5  # seconds between two looks for another version
    most_candidates: int = 1000
    most_bytes: int = 1 << 20  # of a request
    most_rows: int = 16_384  # waiting to be scored; more are refused
    most_appends: int = 64  # requests whose events wait for the store; more are refused
    rate: float = 1000.0  # requests a second of one client
    image_folder: str = ""  # pictures for /explain, named by item id
    augment: bool = True  # off: score the own history alone (to measure what borrowing costs)
    live: bool = False  # look up anew also what the bundle has an answer for
    cache: bool = True  # remember what users borrow


Id = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_ID, pattern=r"^[^\x00]+$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Context(Body):
    """What is known of the moment of the request."""

    time: int | None = Field(None, ge=-LARGEST, le=LARGEST, description="now, in the units of the training log")


def make_app(settings: Settings, storage: Storage) -> FastAPI:
    """The service as an ASGI application; it loads its bundle when it starts, and is ready once all is compiled."""
    Items = Annotated[list[Id], Field(min_length=1, max_length=settings.most_candidates)]
    History = Annotated[list[Id], Field(max_length=settings.most_candidates)]

    class ScoreRequest(Body):
        user: Id
        candidates: Items
        history: History | None = Field(None, description="replaces the user's own history")
        context: Context | None = None

    class ScoreResponse(BaseModel):
        scores: list[float]
        version: str = Field(description="of the bundle that scored")
        lenders: str = Field(description="version of the donors")
        donor: str | None = Field(description="the most similar user who lends, if anybody does")
        borrowed: int = Field(description="borrowed items in the history that was scored")
        fallback: str | None = Field(description="why nothing was borrowed where MARS would lend")
        unseen: list[int] = Field(description="positions of candidates that the model does not know")

    class AugmentRequest(Body):
        user: Id
        history: History | None = Field(None, description="replaces the user's own history")

    class BorrowedItem(BaseModel):
        item: str
        donor: str
        similarity: float
        time: int

    class AugmentResponse(BaseModel):
        user: str
        version: str
        lenders: str
        history: list[str]
        borrowed: list[BorrowedItem]
        fallback: str | None

    class EventBody(Body):
        id: Id = Field(description="an event that is sent again with the same id counts once")
        user: Id
        item: Id
        label: int = Field(ge=0, le=1)
        time: int = Field(ge=-LARGEST, le=LARGEST, description="in the units of the training log")
        grade: float | None = Field(
            None, ge=0, le=1, description="how much: the share of all feedback that is less; for models of grades"
        )

    class EventsRequest(Body):
        events: Annotated[list[EventBody], Field(min_length=1, max_length=1000)]

    class EventsResponse(BaseModel):
        accepted: int

    class Failure(BaseModel):
        error: str

    state = State(settings, storage)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        guarded = ", ".join(name for name in (EVENTS_TOKEN, ADMIN_TOKEN) if os.environ.get(name)) or "no token"
        log.info("http://%s:%d, guarded by %s", settings.host, settings.port, guarded)
        if not (settings.root / versions.POINTER).is_file():
            log.info("waiting for a bundle in %s: publish one", settings.root)
        watcher = asyncio.create_task(state.watch())
        yield
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await asyncio.to_thread(state.close)

    failures: dict[int | str, dict[str, Any]] = {
        code: {"model": Failure, "description": text}
        for code, text in {
            400: "not JSON", 413: "too large", 422: "not what is expected", 429: "too many requests",
            503: "not ready, or too much is waiting",
        }.items()
    }  # fmt: skip
    refused: dict[int | str, dict[str, Any]] = {401: {"model": Failure, "description": "a token is needed"}}

    async def score(request: ScoreRequest) -> Response:
        """Click probabilities of candidates, with what the user borrows."""
        snapshot = state.ready()
        at = request.context.time if request.context else None
        answer, known = await state.score(snapshot, request.user, request.candidates, request.history, at)
        donors = answer.lent.donor_S[len(answer.lent.donor_S) - answer.borrowed :]
        raw_user_U = snapshot.bundle.users.raw_user_U
        found = {
            "scores": answer.score_C.tolist(),
            "version": snapshot.version,
            "lenders": snapshot.lenders_version,
            "donor": _name(raw_user_U, donors[-1]) if len(donors) else None,
            "borrowed": answer.borrowed,
            "fallback": "late" if answer.late else known.fallback,
            "unseen": known.unseen,
        }
        return Response(to_json(found), media_type="application/json")  # json takes ten times as long

    app = FastAPI(
        title="marsjax", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Click probabilities with what low-active users borrow (MARS, arXiv 2509.01184).",
    )  # fmt: skip
    app.state.marsjax = state
    app.add_middleware(Direct, path="/v1/score", model=ScoreRequest, answer=score, failed=json_error)
    app.add_middleware(limits.Limits, most_bytes=settings.most_bytes, rate=settings.rate, heard=state.measures.answered)
    may_send, may_look = _needs_token(EVENTS_TOKEN), _needs_token(ADMIN_TOKEN)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        code = 400 if first["type"] == "json_invalid" else 422
        kind = request.headers.get("content-type", "none")
        # The framework does not parse a body of another type, and then says that it is no object.
        if request.method == "POST" and not means_json(kind):
            return JSONResponse({"error": f"expected content-type application/json, found {kind[:80]}"}, code)
        return JSONResponse({"error": f"{where}: {first['msg']}; see /openapi.json"}, code)

    @app.exception_handler(StarletteError)
    async def failed(_: Request, error: StarletteError) -> Response:
        return json_error(error)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse({"error": "the service failed; its log says why"}, 500)

    app.post("/v1/score", response_model=ScoreResponse, responses=failures)(score)

    # As the page it shows what users did, the donors too.
    @app.post(
        "/v1/augment", response_model=AugmentResponse, responses=failures | refused, dependencies=[Depends(may_look)]
    )
    async def augment(request: AugmentRequest) -> Response:
        """A user's history and what the user borrows, for a CTR model of your own."""
        snapshot = state.ready()
        answer, known = await state.score(snapshot, request.user, [], request.history, None)
        bundle, lent = snapshot.bundle, answer.lent
        columns = zip(lent.item_S, lent.donor_S, lent.similarity_S, lent.time_S, strict=True)
        return JSONResponse(
            {
                "user": request.user,
                "version": snapshot.version,
                "lenders": snapshot.lenders_version,
                "history": [str(name) for name in bundle.items.raw_id_N[known.item_L]],
                "borrowed": [
                    {
                        "item": str(bundle.items.raw_id_N[item]),
                        "donor": _name(bundle.users.raw_user_U, donor) or "",
                        "similarity": float(similarity),
                        "time": int(when),
                    }
                    for item, donor, similarity, when in columns
                ],
                "fallback": "late" if answer.late else known.fallback,
            }
        )

    @app.post(
        "/v1/events", response_model=EventsResponse, status_code=202, responses=failures | refused,
        dependencies=[Depends(may_send)],
    )  # fmt: skip
    async def events(request: EventsRequest) -> Response:
        """Adds events to the stream. They are durable when the answer comes; their effects follow within moments."""
        data = [encode_event(Event(e.id, e.user, e.item, float(e.label), e.time, e.grade)) for e in request.events]
        future = state.append(data)
        if future is None:
            state.measures.refused.inc()
            raise HTTPException(503, "too much is waiting; send the events again", {"Retry-After": "1"})
        try:
            await asyncio.wrap_future(future)
        except StorageError as error:
            log.warning("events were refused: %s", error)
            raise HTTPException(
                503, "the stream does not answer; send the events again", {"Retry-After": "1"}
            ) from None
        state.measures.events.inc(len(data))
        return JSONResponse({"accepted": len(data)}, 202)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok"

    @app.get("/readyz", responses={503: {"model": Failure}})
    async def readyz() -> Response:
        """A bundle is loaded and all is compiled."""
        snapshot = state.ready()
        return JSONResponse({"version": snapshot.version, "lenders": snapshot.lenders_version})

    @app.get("/metrics", response_class=PlainTextResponse, responses=refused, dependencies=[Depends(may_look)])
    async def metrics() -> Response:
        """Prometheus."""
        await state.measure()
        return Response(generate_latest(state.measures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/explain", response_class=HTMLResponse, responses=failures | refused, dependencies=[Depends(may_look)])
    async def explain(user: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)]) -> Response:
        """A page: what the user did, who lends what, what was left out, and scores with and without."""
        snapshot = state.ready()
        known = people.find_user(snapshot, user, stored=await state.lookup(user, snapshot.version), always_live=True)
        images = pathlib.Path(settings.image_folder) if settings.image_folder else None
        # Pictures are read as the page is written: not in the loop that answers the others.
        html = await asyncio.to_thread(lambda: page.to_html(explaining.make_page(snapshot, user, known, images)))
        return HTMLResponse(html, headers={"Content-Security-Policy": page.POLICY})

    documented = app.openapi

    def document() -> dict[str, Any]:
        """The OpenAPI document: where no token is set none has to be sent, and every failure is told as JSON."""
        found = documented()
        for path, operations in found["paths"].items():
            token = EVENTS_TOKEN if path == "/v1/events" else ADMIN_TOKEN
            for operation in operations.values():
                needs = [need for need in operation.get("security", []) if need]
                if needs:
                    operation["security"] = needs if os.environ.get(token) else [{}, *needs]
                for code, answer in operation["responses"].items():
                    if code >= "400" and "content" in answer:
                        (schema,) = answer["content"].values()
                        answer["content"] = {"application/json": schema}
        return found

    app.openapi = document  # type: ignore[method-assign]
    return app


class Found(NamedTuple):
    """What is said of a user beside the scores."""

    fallback: str | None
    item_L: Any  # [L] int32, own history
    unseen: list[int]


class State:
    """What the routes share: the snapshot that answers, the engine, and the store with its breaker."""

    def __init__(self, settings: Settings, storage: Storage):
        self.settings, self.storage = settings, storage
        self.measures = Measures()
        self.compilations = compilations()
        self.compiled_before = self.compilations.serving
        self.engine = Engine(most_rows=settings.most_rows, cache=settings.cache)
        self.readers = ThreadPoolExecutor(4, "store-read")
        self.writers = ThreadPoolExecutor(4, "store-write")
        self._appends = threading.BoundedSemaphore(settings.most_appends)
        self.snapshot: Snapshot | None = None
        self.refused_version, self._refused_until = "", 0.0
        self._store_out_until, self._misses = 0.0, 0

    def close(self) -> None:
        """Answers what was taken, and ends the threads."""
        self.engine.close()
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.writers.shutdown(wait=True)

    def append(self, data: list[bytes]) -> Future[None] | None:
        """Adds events to the stream, in a thread; None where too many wait for it already."""
        if not self._appends.acquire(blocking=False):
            return None
        future = self.writers.submit(self.storage.append, data)
        future.add_done_callback(lambda _: self._appends.release())
        return future

    def ready(self) -> Snapshot:
        if self.snapshot is None:
            raise HTTPException(503, "no bundle is loaded yet", {"Retry-After": "1"})
        return self.snapshot

    async def watch(self) -> None:
        """Looks for another version for ever; one that cannot be loaded is refused, and the old one goes on."""
        while True:
            try:
                found = await asyncio.to_thread(self.look)
                if found is not None:
                    if self.snapshot is None:  # what is loaded by now stays; each full collection would visit it all
                        gc.collect()
                        gc.freeze()
                    self.snapshot = found
            except Exception:
                log.exception("looking for another version failed")
            await asyncio.sleep(self.settings.poll)

    def look(self) -> Snapshot | None:
        """The snapshot that should answer, warmed up, where it is another one than the present."""
        wanted = snapshots.wanted(self.settings.root)
        now = self.snapshot
        if wanted is None or (wanted.key == self.refused_version and time.monotonic() < self._refused_until):
            return None
        if now is not None and wanted.key == snapshots.key_of(now):
            return None
        for choice in [wanted] if now is not None else snapshots.at_start(self.settings.root, wanted):
            try:
                with self.compilations.warming():
                    made = snapshots.load(self.settings.root, choice, now)
                    warm_up(made)
            except (ValueError, OSError) as error:
                if wanted != snapshots.wanted(self.settings.root):  # it was removed while it was read
                    return None
                log.error("version %s is refused: %s", choice.key, error)
                if choice == wanted:
                    self.refused_version, self._refused_until = wanted.key, time.monotonic() + RETRY
                    self.measures.swaps.labels("refused").inc()
                continue
            self.measures.swaps.labels("done").inc()
            log.info("version %s answers, with lenders %s", made.version, made.lenders_version)
            return made
        return None

    async def lookup(self, user: str, version: str) -> tuple[bytes | None, bytes | None] | None:
        """History and vector in the store; None where it does not answer in time."""
        if time.monotonic() < self._store_out_until:
            return None
        loop, began = asyncio.get_running_loop(), time.monotonic()
        try:
            call = loop.run_in_executor(self.readers, self.storage.lookup, user, version)
            async with asyncio.timeout(self.settings.store_deadline):
                found = await call
        except (StorageError, TimeoutError) as error:
            self._misses = MISSES if isinstance(error, StorageError) else self._misses + 1
            if self._misses >= MISSES:
                if time.monotonic() >= self._store_out_until:
                    why = str(error) or f"late {self._misses} times in a row"
                    log.warning("the store does not answer and is left alone for a while: %s", why)
                self._store_out_until, self._misses = time.monotonic() + self.settings.store_pause, 0
            self.measures.store_failures.inc()
            return None
        self._misses = 0
        self.measures.seconds["lookup"].observe(time.monotonic() - began)
        return found

    async def score(
        self, snapshot: Snapshot, user: str, candidates: list[str], history: list[str] | None, at: int | None
    ) -> tuple[Answer, Found]:
        """Scores, all from one snapshot."""
        came = time.monotonic()
        stored = await self.lookup(user, snapshot.version) if self.settings.augment or history is None else (None, None)
        known = people.find_user(snapshot, user, stored=stored, history=history, always_live=self.settings.live)
        if not self.settings.augment:
            known = known._replace(vector_D=None, fallback=None, profile=scoring.Profile(*known.profile[:4]))
        target_C = item_numbers(snapshot.bundle, candidates)
        unseen = [int(c) for c in (target_C == 0).nonzero()[0]]
        task = Task(
            snapshot, scoring.Row(known.profile, target_C, at), known.vector_D, came + self.settings.deadline, came
        )
        future = self.engine.submit(task)
        if future is None:
            self.measures.refused.inc()
            raise HTTPException(503, "too much is waiting; try again", {"Retry-After": "1"})
        answer = await asyncio.wrap_future(future)
        self.measures.scored(answer, known, unseen, time.monotonic() - came)
        return answer, Found(known.fallback, known.profile.item_L, unseen)

    async def measure(self) -> None:
        """Gauges that are read when they are asked for."""
        backlog = dead = math.nan  # where the store does not say
        with contextlib.suppress(StorageError, TimeoutError):
            async with asyncio.timeout(3.0):
                backlog, dead = await asyncio.to_thread(
                    lambda: (self.storage.backlog(RUNNER), self.storage.dead_count())
                )
        self.measures.backlog.set(backlog)
        self.measures.dead.set(dead)
        self.measures.compiled.set(self.compilations.serving - self.compiled_before)
        if self.snapshot is not None:
            self.measures.model_age.set(time.time() - self.snapshot.published)


@functools.lru_cache(maxsize=1)
def compilations() -> Compilations:
    """One listener a process: jax has no way to take one back."""
    return Compilations()


def _needs_token(variable: str) -> Callable[..., None]:
    """A dependency that lets through whom the token of an environment variable names; all, where it is not set."""

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        token = os.environ.get(variable, "")
        if token and not hmac.compare_digest((given.credentials if given else "").encode(), token.encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    return check


def check_binding(host: str) -> None:
    """Raises ValueError where others than this machine can connect and no tokens guard what they must not do."""
    missing = [name for name in (EVENTS_TOKEN, ADMIN_TOKEN) if not os.environ.get(name)]
    if host not in LOOPBACK and missing:
        raise ValueError(
            f"serving.host: expected {' or '.join(LOOPBACK)} where no tokens are set, found {host}; set "
            f"{' and '.join(missing)} in the environment"
        )


def check_ranges(settings: Settings) -> None:
    """Raises ValueError where a number cannot be what it says."""
    if not 1 <= settings.port <= 65_535:
        raise ValueError(f"serving.port: expected 1 to 65535, found {settings.port}")
    for name in ("deadline", "store_deadline", "poll", "most_candidates", "most_bytes", "rate"):
        if (value := getattr(settings, name)) <= 0:
            raise ValueError(f"serving.{KEYS.get(name, name)}: expected more than 0, found {value}")


def make_server(settings: Settings, storage: Storage) -> uvicorn.Server:
    """The service with its HTTP server; `.run()` serves until it is stopped.

    Raises ValueError for a binding that is not safe, or settings that cannot be.
    """
    check_binding(settings.host)
    check_ranges(settings)
    config = uvicorn.Config(
        make_app(settings, storage), host=settings.host, port=settings.port, log_level="warning", access_log=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=10, server_header=False,
        proxy_headers=False,  # anybody can write X-Forwarded-For: with each request another client, and no rate
    )  # fmt: skip
    return uvicorn.Server(config)


def openapi(settings: Settings, storage: Storage) -> str:
    """The OpenAPI document as JSON."""
    return json.dumps(make_app(settings, storage).openapi(), indent=2)


def _name(raw_user_U: Any, user: int) -> str | None:
    return str(raw_user_U[user]) if 0 <= user < len(raw_user_U) else None
