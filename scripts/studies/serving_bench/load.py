"""A closed loop of clients on the loopback interface: each sends its next request when it has its response.

Threads with open connections and prepared bodies: the clients share the machine with the server that they measure.
"""

import http.client
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from handlers.errors import UserError

BOUNDARY = "bench-serving-boundary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
END = f"\r\n--{BOUNDARY}--\r\n".encode()
TIMEOUT = 120.0  # seconds; a slow server with 16 clients takes many for one response
ROUNDS = 3  # responses that each client waits for at least, after its first


class LoadError(UserError):
    """The server's response was not 200, or there was none."""


@dataclass(frozen=True)
class Load:
    """What the clients measured: requests per second, and latencies in ms."""

    clients: int
    requests: int
    rps: float
    p50: float
    p95: float


def form(image: bytes, gradcam: str) -> bytes:
    """Return a request's body of CONTENT_TYPE: the picture in `data`, the kind of heatmap in `gradcam`."""
    lines = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="gradcam"\r\n\r\n{gradcam}\r\n--{BOUNDARY}\r\n'
    lines += 'Content-Disposition: form-data; name="data"; filename="lesion.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return lines.encode() + image + END


def distinct(body: bytes, number: int) -> bytes:
    """Return the body with another file: the picture's, and after its end eight bytes for `number`."""
    return body.removesuffix(END) + number.to_bytes(8) + END


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> bytes:
    """Return the body of the response 200 to one request. Raises LoadError."""
    try:
        connection.request("POST", path, body, {"Content-Type": CONTENT_TYPE})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise LoadError(f"No response from {path} on port {connection.port}: {error!r}.") from error
    if response.status != 200:
        raise LoadError(f"{path} answered {response.status}: {content[:300].decode(errors='replace')}.")
    return content


def measure(port: int, path: str, bodies: list[bytes], clients: int, seconds: float, new_files: bool = False) -> Load:
    """Load a server with `clients` for `seconds`, and until each has had ROUNDS responses after its first.

    The first response of each client is a warm-up. Requests per second are the sum over clients of responses by the
    time between the first and the last, so the clock's position within a batch does not matter. With
    `new_files`, no two requests have the same file. Raises LoadError as soon as one response is not 200.
    """
    all_ends: list[list[float]] = [[] for _ in range(clients)]  # of each client's responses, in seconds
    numbers = itertools.count(time.monotonic_ns())
    stop = threading.Event()

    def request_until_stopped(client: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            while not stop.is_set():
                body = bodies[(client + len(all_ends[client])) % len(bodies)]
                post(connection, path, distinct(body, next(numbers)) if new_files else body)
                all_ends[client].append(time.perf_counter())

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(request_until_stopped, client) for client in range(clients)]
        try:
            _wait(running, lambda: all(all_ends))
            end = time.perf_counter() + seconds
            _wait(running, lambda: time.perf_counter() > end and all(len(ends) > ROUNDS for ends in all_ends))
        finally:
            stop.set()
    for client in running:
        client.result()
    took = np.concatenate([np.diff(ends) for ends in all_ends]) * 1e3
    rps = sum((len(ends) - 1) / (ends[-1] - ends[0]) for ends in all_ends)
    p50, p95 = np.percentile(took, [50, 95])
    return Load(clients, len(took), float(rps), float(p50), float(p95))


def _wait(clients: list[Future[None]], reached: Callable[[], bool]) -> None:
    """Wait until `reached()`, or until a client has failed."""
    while not reached() and not any(client.done() for client in clients):
        time.sleep(0.02)
