"""A TorchServe under test, with requests sent byte by byte, as a client library would repair broken ones."""

import http.client
import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

from handlers.taxonomy import CODES
from tests.live import Server

PREDICTIONS = "/predictions/skin_vit"
PATIENCE = 90.0  # seconds; longer than TorchServe's responseTimeout


@dataclass(frozen=True)
class Call:
    """One request as it goes over the wire. Content-Length is added unless `headers` say how the body ends."""

    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/octet-stream"),)
    path: str = PREDICTIONS
    method: str = "POST"

    @property
    def wire(self) -> bytes:
        """Every byte that is sent."""
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if not {"content-length", "transfer-encoding"} & {name.lower() for name, _ in self.headers}:
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


@dataclass(frozen=True)
class Answer:
    """What came back; `seconds` from the first byte sent to the last received."""

    status: int
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def shape(self) -> str:
        """Whose it is: "prediction", "ours" (the handler's refusal), "torchserve" (its own), or "none" of them."""
        if self.status == 413 and not self.body:
            return "torchserve"  # its front hangs up at the limit, before it knows what is asked
        try:
            values = self.json
        except ValueError:
            return "none"
        if not isinstance(values, dict):
            return "none"
        if values.keys() == {"error"} and values["error"].keys() == {"code", "message"}:
            return "ours"
        if values.keys() == {"code", "type", "message"} and values["code"] == self.status:
            return "torchserve"
        return "prediction" if values.get("schema") == 1 and list(values["probabilities"]) == list(CODES) else "none"


def send(port: int, wire: bytes, patience: float = PATIENCE) -> Answer:
    """Send bytes to a local port and read the one answer. OSError or HTTPException where none comes."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), patience) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused while it was sent; the answer is there already
            connection.sendall(wire)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            body = response.read()
    return Answer(response.status, body, time.monotonic() - began)


@dataclass
class Serving:
    """The server, its worker, and a picture with the answer that it must go on giving."""

    server: Server
    good: Call = field(init=False)

    def __post_init__(self) -> None:
        from tests.hostile import photograph

        self.good = Call(photograph(0))

    @property
    def port(self) -> int:
        return urlsplit(self.server.health).port or 0

    def ask(self, call: Call, patience: float = PATIENCE) -> Answer:
        return send(self.port, call.wire, patience)

    def worker(self) -> psutil.Process:
        """The one worker process. Raises ValueError while there is none."""
        found = []
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just died
                if any("model_service_worker" in word for word in process.cmdline()):
                    found.append(process)
        [worker] = found
        return worker

    def resident(self) -> int:
        """Bytes that the worker holds."""
        return int(self.worker().memory_info().rss)
