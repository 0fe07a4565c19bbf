"""A monitor with kept pictures, for tests of the review."""

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from handlers.kept_images import kept_path
from monitoring.monitor import Monitor
from monitoring.review_queue import ReviewQueue
from monitoring.reviews import READING, NewReading, in_random_share, record_reading
from tests.monitored_log import NOW, RotatedLog, drain, prediction, settings_of

SHARE = 0.2


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def names(count: int, is_random: bool) -> list[str]:
    """The first names whose picture is, or is not, in the random share."""
    numbers = (str(number) for number in range(10_000))
    return [name for name in numbers if in_random_share(sha(name), SHARE) == is_random][:count]


class ReviewedMonitor:
    """A state folder; `answer` adds predictions and keeps their pictures."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log = RotatedLog(folder)
        self.settings = settings_of(folder, keep_images_days=30, review_random_share=SHARE, **settings)
        self.monitor = Monitor(self.settings)
        self.store = self.monitor.store
        self.take()

    def take(self) -> None:
        drain(self.monitor)

    def answer(self, pictures: Iterable[str], version: str = "1", jpeg: bytes = b"\xff\xd8\xff", **fields: Any) -> None:
        """Predictions with request id VERSION-NAME."""
        folder = self.settings.kept_images_folder
        folder.mkdir(exist_ok=True)
        for name in pictures:
            self.log.write(prediction(f"{version}-{name}", **{"seconds": NOW - 60} | fields, version=version,
                                      image_sha256=sha(name)))  # fmt: skip
            kept_path(folder, sha(name)).write_bytes(jpeg)
        self.take()

    def queue(self) -> ReviewQueue:
        return ReviewQueue(self.store, self.settings.kept_images_folder, SHARE)

    def read(self, name: str, reader: str, verdict: str, kind: str = READING, version: str = "1", **fields: str) -> int:
        values = {"first_opinion": verdict, "submission": str(uuid.uuid4())} | fields
        reading = NewReading(
            kind=kind, reader=reader, image_sha256=sha(name), request_id=f"{version}-{name}", verdict=verdict, **values
        )
        return record_reading(self.store, reading, self.queue().reason(sha(name)))[0]


def order(queue: ReviewQueue, world: ReviewedMonitor, reader: str, count: int) -> Sequence[tuple[str, str]]:
    """Read `count` pictures; return request id and reason of each."""
    pairs = []
    for _ in range(count):
        picture = queue.next_picture(reader, READING)
        if picture is None:
            break
        pairs.append((picture["request_id"], picture["queued_as"]))
        world.read(picture["request_id"].partition("-")[2], reader, "NV")
    return pairs
