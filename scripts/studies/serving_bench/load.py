"""A closed loop of clients on the loopback interface: each sends its next request when it has its response.

Threads with open connections and prepared bodies: the clients share the machine with the server that they measure.
"""

import http.client
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from handlers.errors import UserError

BOUNDARY = "bench-serving-boundary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
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
    return lines.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


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


@dataclass
class _Client:
    """One client: when its responses came (seconds), and how long each took."""

    port: int
    path: str
    bodies: list[bytes]
    first: int
    ends: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    error: LoadError | None = None

    def run(self, stop: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        number = self.first
        try:
            while not stop.is_set():
                began = time.perf_counter()
                post(connection, self.path, self.bodies[number % len(self.bodies)])
                self.ends.append(time.perf_counter())
                self.took.append(self.ends[-1] - began)
                number += 1
        except LoadError as error:
            self.error = error
            stop.set()
        finally:
            connection.close()


def measure(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    """Load a server with `clients` for `seconds`, and until each has had ROUNDS responses after its first.

    The first response of each client is a warm-up. Requests per second are the sum over clients of responses by the
    time between the first and the last, so the clock's position within a batch does not matter. Raises LoadError as
    soon as one response is not 200.
    """
    crowd = [_Client(port, path, bodies, first) for first in range(clients)]
    stop = threading.Event()
    threads = [threading.Thread(target=client.run, args=(stop,), daemon=True) for client in crowd]
    for thread in threads:
        thread.start()
    try:
        while not stop.is_set() and not all(client.ends for client in crowd):
            stop.wait(0.02)
        end = time.perf_counter() + seconds
        while not stop.is_set() and (time.perf_counter() < end or any(len(client.ends) <= ROUNDS for client in crowd)):
            stop.wait(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
    if error := next((client.error for client in crowd if client.error), None):
        raise error
    took = np.concatenate([client.took[1:] for client in crowd]) * 1e3
    rps = sum((len(client.ends) - 1) / (client.ends[-1] - client.ends[0]) for client in crowd)
    p50, p95 = np.percentile(took, [50, 95])
    return Load(clients, len(took), float(rps), float(p50), float(p95))
