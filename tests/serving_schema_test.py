"""What the OpenAPI document says is what the service does: requests drawn from it, and others that break it."""

import contextlib
import socket
import threading
import time
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from marsjax.serving import service, versions
from marsjax.serving.storage import RUNNER, open_storage

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
PATHS = ("/v1/score", "/v1/augment", "/v1/events", "/healthz", "/readyz", "/metrics", "/explain")
READ = ("/v1/score", "/v1/augment", "/v1/events", "/explain")  # what of the request they read can be wrong


@pytest.fixture(scope="module")
def schema(bundle_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    versions.publish(folder, bundle_folder, keep=1)
    storage = open_storage(f"sqlite:{folder}/s.sqlite", timeout=5.0, ttl=1000.0)
    storage.join(RUNNER)
    # Deadlines that a loaded test machine keeps.
    made = service.Settings(folder, deadline=30.0, store_deadline=5.0, rate=1e6)
    server = service.make_server(made, storage)
    line = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]}, daemon=True)
    thread.start()
    until = time.monotonic() + 120
    address = f"http://127.0.0.1:{line.getsockname()[1]}"
    ready = False
    while not ready:  # before, 503 is what the document says
        assert time.monotonic() < until
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/readyz") as answer:
            ready = answer.status == 200
        time.sleep(0.1)
    yield schemathesis.openapi.from_url(f"{address}/openapi.json")
    server.should_exit = True
    thread.join(30)
    storage.close()


def test_every_path_is_documented(schema):
    assert {operation.ok().path for operation in schema.get_all_operations()} >= {*PATHS}


@pytest.mark.parametrize(
    ("mode", "path"), [("positive", path) for path in PATHS] + [("negative", path) for path in PATHS if path in READ]
)
def test_the_service_does_as_the_document_says(schema, mode, path):
    (operation,) = (found.ok() for found in schema.get_all_operations() if found.ok().path == path)
    kind = schemathesis.GenerationMode(mode)
    checks = [*CHECKS, *([negative_data_rejection] if mode == "negative" else [])]

    @settings(
        max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=kind))
    def hold(case):
        case.call_and_validate(checks=checks, timeout=30)

    hold()
