"""A server calls who asked for it when an alias moves: what docs/teams.md says of webhooks, on loopback."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlflow
import pytest
from cryptography.fernet import Fernet
from mlflow.tracking import MlflowClient

from tests.journeys.stack import MlflowServer
from tests.pages.blocks import ROOT, read_blocks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("versions")]

SECRET = "a long secret"
ALIASES = ["model_version_alias.created", "model_version_alias.deleted"]
# That a receiver may be on this machine.
HERE = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}


class Receiver:
    """An HTTP server that keeps what is posted: (headers, body)."""

    def __init__(self):
        self.received = received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                received.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/planes"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def moves(self, number):
        """The first so many aliases that moved, as (action, name, alias, version)."""
        deadline = time.monotonic() + 60
        while len(self.received) < number:
            assert time.monotonic() < deadline, self.received
            time.sleep(0.05)
        content = [json.loads(body) for _, body in self.received]
        assert {c["entity"] for c in content} == {"model_version_alias"}
        data = [(c["action"], c["data"]["name"], c["data"]["alias"], c["data"].get("version")) for c in content]
        self.received.clear()
        return data


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def server(project, tmp_path):
    """A server with two versions of planes-det, and the environment of those who use it."""
    made = MlflowServer(tmp_path / "server", project.env(**HERE, MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=_key()))
    made.start()
    use = {"MLFLOW_TRACKING_URI": made.uri, "PLANES_CACHE": str(made.folder / "cache")}
    trained = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    for _ in range(2):
        project.register(trained, "planes-det", **use)
    yield made, use
    made.stop()


def _key():
    return Fernet.generate_key().decode()


def _documented():
    """The function of the page that tells whether a message is the server's."""
    (block,) = [b for b in read_blocks(ROOT / "docs" / "teams.md") if "def is_genuine" in b.text]
    names = {}
    exec(block.text, names)
    return names["is_genuine"]


def test_a_promotion_is_posted_and_signed(project, server, receiver, tmp_path):
    made, use = server
    client = MlflowClient(made.uri)
    client.create_webhook("releases", receiver.url, events=ALIASES, secret=SECRET)
    gates = tmp_path / "nothing.yaml"
    gates.write_text('{"gates": {"production": {}, "challenger": {}}}')

    def promote(version, alias, *more):
        arguments = ("--to", alias, "--gates", str(gates), *more)
        return project.registry("promote", f"planes-det/{version}", *arguments, **use)

    promote(1, "production", "--dry-run")
    promote(1, "production")
    (headers, body), *_ = _wait(receiver)
    assert receiver.moves(1) == [("created", "planes-det", "production", "1")]
    is_genuine = _documented()
    assert is_genuine(headers, body, SECRET)
    assert not is_genuine(headers, body, "another secret")
    assert not is_genuine(headers, body.replace(b"production", b"staging"), SECRET)
    old = {**headers, "X-MLflow-Timestamp": str(int(headers["X-MLflow-Timestamp"]) - 400)}
    assert not is_genuine(old, body, SECRET)

    promote(2, "challenger")
    assert receiver.moves(1) == [("created", "planes-det", "challenger", "2")]
    promote(2, "production")
    # They are sent side by side.
    assert sorted(receiver.moves(3)) == [
        ("created", "planes-det", "previous", "1"),
        ("created", "planes-det", "production", "2"),
        ("deleted", "planes-det", "challenger", None),
    ]
    # The key is the same after a restart, so the secret can still be read.
    made.stop()
    made.start()
    project.registry("rollback", "planes-det", "--reason", "a test", **use)
    (headers, body), *_ = _wait(receiver)
    assert is_genuine(headers, body, SECRET)
    assert ("created", "planes-det", "production", "1") in receiver.moves(2)
    assert not receiver.received


def _wait(receiver):
    deadline = time.monotonic() + 60
    while not receiver.received:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return list(receiver.received)


def test_addresses_that_are_not_public_are_refused_unless_the_server_is_told(project, tmp_path, receiver):
    made = MlflowServer(tmp_path / "server", project.env())
    made.start()
    try:
        client = MlflowClient(made.uri)
        with pytest.raises(mlflow.MlflowException, match=r"Invalid webhook URL scheme: 'http'.*Allowed schemes are: https"):
            client.create_webhook("a", receiver.url, events=ALIASES)
        with pytest.raises(mlflow.MlflowException, match="must not resolve to a non-public IP address"):
            client.create_webhook("a", receiver.url.replace("http:", "https:"), events=ALIASES)
    finally:
        made.stop()
