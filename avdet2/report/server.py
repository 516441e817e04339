# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Serves a run's page to this machine only, and writes the names that are typed on it into the run.
"""

import json
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from avdet2.evaluation.naming.cluster_file import FILE_NAME, ClusterFile
from avdet2.report.page import FOLDER

__all__ = ["make_server", "serve"]

HOST = "127.0.0.1"
MAX_BYTES = 1 << 20


class _Handler(SimpleHTTPRequestHandler):
    """
    Files of RUN/report, and /clusters.json, which is RUN's and can be replaced.
    """

    def __init__(self, *args: Any, run: Path, **kwargs: Any) -> None:
        self._names = run / FILE_NAME
        super().__init__(*args, directory=str(run / FOLDER), **kwargs)

    def do_GET(self) -> None:
        if not self._is_own():
            return
        if self.path != f"/{FILE_NAME}":
            super().do_GET()
        elif self._names.is_file():
            self._answer(HTTPStatus.OK, self._names.read_bytes(), "application/json")
        else:
            # Nothing is saved yet: the names are those of the page.
            self._answer(HTTPStatus.OK, b'{"clusters": []}', "application/json")

    def do_PUT(self) -> None:
        if not self._is_own():
            return
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "")
        # Pages of other sites cannot send this kind without asking first, and get no answer.
        if self.path != f"/{FILE_NAME}" or kind != "application/json":
            return self._answer(HTTPStatus.NOT_FOUND, f"only {FILE_NAME} can be written".encode())
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"too long")
        try:
            ClusterFile.parse(json.loads(self.rfile.read(int(length)))).write(self._names)
        except (OSError, ValueError) as error:
            return self._answer(HTTPStatus.BAD_REQUEST, str(error).encode("utf-8", "replace"))
        self._answer(HTTPStatus.OK, str(self._names).encode("utf-8", "replace"))

    def _is_own(self) -> bool:
        """
        Whether the browser means this server; another name may lead here, too (DNS rebinding).
        """
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host in (HOST, "localhost"):
            return True
        self._answer(HTTPStatus.FORBIDDEN, f"this page is served at {HOST} only".encode())
        return False

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        # A page that is written again is seen.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """
        Requests are not logged.
        """


def make_server(run: str | Path, port: int = 0) -> ThreadingHTTPServer:
    """
    A server of RUN/report on this machine's own address; who calls runs and closes it.

    Args:
        run: the folder of a run, with its page.
        port: 0 is a free one.

    Raises:
        ValueError: the port is in use.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, run=Path(run)))
    except OSError as error:
        raise ValueError(f"port {port} cannot be served ({error}): name another --port") from error


def serve(run: str | Path, port: int, tell: Callable[[str], None]) -> None:
    """
    Serve RUN/report until Ctrl-C.

    Args:
        run, port: see :func:`make_server`.
        tell: called with the page's address once it is served.
    """
    with make_server(run, port) as server:
        tell(f"http://{HOST}:{server.server_port}/")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
