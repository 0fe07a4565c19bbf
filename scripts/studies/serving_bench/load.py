"""A closed loop of clients on the loopback interface: each sends its next request when it has its answer.

Threads with connections kept open, and bodies made beforehand: the client shares the machine with the server that it
measures, so it must take little of it. How much it took is told with every figure.
"""

import http.client
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from handlers.errors import UserError

BOUNDARY = "bench-serving-boundary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
TIMEOUT = 120.0  # seconds for one answer: a slow server with 16 clients and a large picture takes ten
ROUNDS = 3  # answers that each client waits for at least, after its first


class LoadError(UserError):
    """The server answered something else than 200, or nothing; says what."""


@dataclass(frozen=True)
class Load:
    """What the clients saw: times in ms, `client_cores` the processor time they took themselves, in cores."""

    clients: int
    requests: int
    rps: float
    p50: float
    p95: float
    p99: float
    client_cores: float


def form(image: bytes, gradcam: str) -> bytes:
    """A request's body, of CONTENT_TYPE: the picture in the field `data`, and what heatmap is wanted in `gradcam`."""
    lines = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="gradcam"\r\n\r\n{gradcam}\r\n--{BOUNDARY}\r\n'
    lines += 'Content-Disposition: form-data; name="data"; filename="lesion.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return lines.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(port: int, path: str, body: bytes, connection: http.client.HTTPConnection | None = None) -> bytes:
    """One request, answered with 200. Raises LoadError."""
    opened = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        opened.request("POST", path, body, {"Content-Type": CONTENT_TYPE})
        response = opened.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise LoadError(f"No answer from {path} on port {port}: {error or type(error).__name__}") from error
    finally:
        if connection is None:
            opened.close()
    if response.status != 200:
        raise LoadError(f"{path} answered {response.status}: {answer[:300].decode(errors='replace')}")
    return answer


@dataclass
class _Client:
    """One client: when its answers came (seconds), and how long each took."""

    port: int
    path: str
    bodies: list[bytes]
    first: int
    ends: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    fault: LoadError | None = None

    def run(self, stop: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        number = self.first
        try:
            while not stop.is_set():
                began = time.perf_counter()
                ask(self.port, self.path, self.bodies[number % len(self.bodies)], connection)
                ended = time.perf_counter()
                self.took.append(ended - began)
                self.ends.append(ended)
                number += 1
        except LoadError as error:
            self.fault = error
            stop.set()
        finally:
            connection.close()


def measure(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    """Load a server with `clients` for `seconds`, and until each has had ROUNDS answers after its first.

    The first answer of each client is a warm-up. Requests per second are the sum over clients of answers by the time
    between a client's first and last: whole cycles, so that it does not matter where in a batch the clock started.
    Raises LoadError as soon as one answer is not 200.
    """
    crowd = [_Client(port, path, bodies, first) for first in range(clients)]
    stop = threading.Event()
    threads = [threading.Thread(target=client.run, args=(stop,), daemon=True) for client in crowd]
    cpu, began = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        while not stop.is_set() and not all(len(client.ends) for client in crowd):
            stop.wait(0.02)
        end = time.perf_counter() + seconds
        while not stop.is_set() and (time.perf_counter() < end or any(len(client.ends) <= ROUNDS for client in crowd)):
            stop.wait(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
    used = (time.process_time() - cpu) / (time.perf_counter() - began)
    if fault := next((client.fault for client in crowd if client.fault), None):
        raise fault
    took = np.concatenate([client.took[1:] for client in crowd]) * 1e3
    rps = sum((len(client.ends) - 1) / (client.ends[-1] - client.ends[0]) for client in crowd)
    p50, p95, p99 = np.percentile(took, [50, 95, 99])
    return Load(clients, len(took), float(rps), float(p50), float(p95), float(p99), used)
