"""Serves the page: on this machine's own address alone, by numbers of images and never by names of files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from models.errors import PlanesError, one_line
from scoring.viewer.content import Job

HOST = "127.0.0.1"
# What a browser on this machine calls it; another name is that of a page elsewhere whose address was turned to ours.
NAMES = re.compile(r"^(127\.0\.0\.1|localhost)(:\d+)?$")
Answer = tuple[int, str, bytes]


def serve(job: Job, port: int = 0) -> ThreadingHTTPServer:
    """A server of the job's page; the caller runs and closes it.

    Args:
        port: 0 takes any that is free.

    Raises:
        OSError: the port is taken.
    """
    page = (files("scoring.viewer") / "page.html").read_text(encoding="utf-8")

    def answer(path: str) -> Answer:
        if path == "/":
            return 200, "text/html; charset=utf-8", page.encode()
        if not job.is_current():
            return 409, "text/plain; charset=utf-8", b"the job was updated, or is gone: start score view again"
        if path == "/job":
            return _json(job.overview())
        match = re.fullmatch(r"/(image|picture)/(\d{1,9})", path)
        if match is None or int(match[2]) >= len(job.samples):
            return 404, "text/plain", b"not here"
        if match[1] == "image":
            return _json(job.image(int(match[2])))
        try:
            content, height, width = job.picture(int(match[2]))
        except PlanesError as error:
            return 500, "text/plain; charset=utf-8", one_line(error, 400).encode()
        return 200, f"image/jpeg; height={height}; width={width}", content

    return _Server((HOST, port), _handler(answer))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers end connections as they like."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _json(content: Any) -> Answer:
    return 200, "application/json", json.dumps(content).encode()


def _handler(answer: Callable[[str], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            here = NAMES.match(self.headers.get("Host", ""))
            refused = 403, "text/plain", b"this page is for this machine alone"
            try:
                self._send(*(answer(self.path.partition("?")[0]) if here else refused))
            except OSError:
                # The browser went on to another picture.
                self.close_connection = True

        def _send(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            # Nothing from elsewhere is ever asked for.
            self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
