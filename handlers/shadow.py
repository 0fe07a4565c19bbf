"""A share of the live requests answered by the challenger as well: compared in the log, never seen by the client.

Off unless `shadow.json` lies in the model store, which the promoter writes when PROMOTER_SHADOW_SHARE is above 0 and a
challenger stands by: {"champion": "1", "challenger": "3", "share": 0.1}.

The champion's answers come first. A picture is offered after its answer is computed, costs a throw of dice and a place
in a queue of one (a second one is dropped), and is sent on by a thread of its own, after the champion has rested for
QUIET seconds. Nothing is kept but the comparison, and that names the picture by its hash alone.
"""

import json
import logging
import os
import queue
import random
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.taxonomy import BY_CODE

log = logging.getLogger(__name__)

QUIET = 0.25
PATIENCE = 10.0  # seconds that a picture may wait for quiet before it is dropped
ANSWER = 10.0  # seconds that the challenger may take


@dataclass(frozen=True)
class Offer:
    """A picture, its hash, and the champion's nine probabilities."""

    image: bytes
    sha256: str
    probabilities: dict[str, float]


class Shadow:
    """Sends pictures on, for the worker of one version.

    Args:
        file: where the promoter says whether, and to whom.
        url: TorchServe's prediction API with the model's name, to which a version is added.
        version: that of this worker; it sends on only while it is the champion.
    """

    def __init__(self, file: Path, url: str, version: str) -> None:
        self.file, self.url, self.version = file, url, version
        self._waiting: queue.Queue[tuple[Offer, str]] = queue.Queue(maxsize=1)
        self._busy, self._worked = False, time.monotonic()
        self._mark: int | None = None
        self._settings: dict[str, Any] = {}
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, version: str, model: str) -> "Shadow | None":
        """As start_torchserve.sh has told the workers; None where it has not."""
        file, url = os.environ.get("SHADOW_FILE"), os.environ.get("SHADOW_URL")
        return cls(Path(file), f"{url}/predictions/{model}", version) if file and url else None

    def working(self, busy: bool) -> None:
        """The champion begins a batch, or has answered it."""
        self._busy, self._worked = busy, time.monotonic()

    def offer(self, offer: Offer) -> bool:
        """Have the picture sent on, perhaps; never waits. Whether it was taken."""
        settings = self._read()
        challenger = settings.get("challenger")
        if settings.get("champion") != self.version or not challenger:
            return False
        if random.random() >= settings.get("share", 0.0):
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((offer, challenger))
        except queue.Full:
            return False
        return True

    def _read(self) -> dict[str, Any]:
        """The promoter's word, read again when the file has changed; nothing without a file."""
        try:
            mark = self.file.stat().st_mtime_ns
            if mark != self._mark:
                told = json.loads(self.file.read_bytes())
                self._settings, self._mark = told if isinstance(told, dict) else {}, mark
        except (OSError, ValueError):
            self._settings, self._mark = {}, None
        return self._settings

    def _run(self) -> None:
        while True:
            offer, challenger = self._waiting.get()
            if self._quiet():
                self._compare(offer, challenger)

    def _quiet(self) -> bool:
        """Wait until the champion rests; False when it does not for PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while self._busy or time.monotonic() < self._worked + QUIET:
            if time.monotonic() > end:
                return False
            time.sleep(QUIET / 5)
        return True

    def _compare(self, offer: Offer, challenger: str) -> None:
        told: dict[str, Any] = {"champion": self.version, "challenger": challenger, "image": offer.sha256}
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/{challenger}", offer.image, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        began = time.monotonic()
        try:
            with opener.open(request, timeout=ANSWER) as response:
                theirs: dict[str, float] = json.loads(response.read())["probabilities"]
            told |= compared(offer.probabilities, theirs)
            told["milliseconds"] = round(1000 * (time.monotonic() - began), 1)
        except Exception as error:  # whatever a challenger answers, the next picture is compared
            told["failed"] = f"{type(error).__name__}: {error}"
        log.info("shadow %s", json.dumps(told))


def compared(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Two answers: their classes, whether the picture turned malignant or benign, total variation distance."""
    codes = [max(answer, key=answer.__getitem__) for answer in (ours, theirs)]
    before, after = (BY_CODE[code].malignant for code in codes)
    flip = None if before == after else "into malignant" if after else "out of malignant"
    moved = 0.5 * sum(abs(ours[code] - theirs[code]) for code in ours)
    return {"codes": codes, "agree": codes[0] == codes[1], "flip": flip, "moved": round(moved, 4)}
