"""A local HTTP server whose answers a function of the test gives."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple


class Answer(NamedTuple):
    """An answer of the server; `headers` may also replace `Content-Length`."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


def handler(
    answer: Callable[[BaseHTTPRequestHandler, bytes], Answer], keep_alive: bool = False
) -> type[BaseHTTPRequestHandler]:
    """Return a handler that sends what `answer` returns for a request and its body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"
        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            status, body, headers = answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_OPTIONS = do_GET

        def log_message(self, *_: object) -> None: ...

    return Handler


@contextmanager
def running(server: HTTPServer) -> Iterator[HTTPServer]:
    """Let a server answer in a thread, and close it."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler, bytes], Answer]) -> Iterator[str]:
    """Serve on a free port of the loopback, and yield the address."""
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler(answer))) as server:
        yield f"http://127.0.0.1:{server.server_port}"
