"""Clients that send pictures while versions and replicas change."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Self

import httpx


class PictureClients:
    """Clients that send a picture until the end, each on one connection, with `pause` seconds after each answer.

    `versions` are those that each client got, without repetitions, in order. Leaving the context ends the clients.
    """

    def __init__(self, url: str, image: bytes, count: int = 16, pause: float = 0.0) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: list[list[str]] = [[] for _ in range(count)]
        self.slowest = 0.0
        self._pause, self._end, self._began = pause, Event(), time.monotonic()
        pool = ThreadPoolExecutor(count)
        self._clients = [pool.submit(self._send, url, image, versions) for versions in self.versions]

    def _send(self, url: str, image: bytes, versions: list[str]) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        with httpx.Client(base_url=url, timeout=120, trust_env=False, headers=headers) as client:
            while not self._end.is_set():
                began = time.monotonic()
                answer = client.post("/predictions/skin_vit", content=image)
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.statuses[answer.status_code] += 1
                version = answer.json()["model"]["version"] if answer.status_code == 200 else ""
                if version and versions[-1:] != [version]:
                    versions.append(version)
                self._end.wait(self._pause)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    @property
    def requests(self) -> int:
        """How many requests were answered."""
        return sum(self.statuses.values())

    def stop(self) -> float:
        """Stop, and return the requests per second. Raises what a client met."""
        self._end.set()
        for client in self._clients:
            client.result(120)
        return self.requests / (time.monotonic() - self._began)
