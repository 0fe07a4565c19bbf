"""The image keeper: it writes copies of answered pictures for review, in a thread of its own, after the answers.

A copy is encoded again from the decoded pixels, so it has no metadata. If pictures arrive faster than they can be
written, some are not kept: an answer never waits for a copy.
"""

import io
import logging
import os
import queue
import sys
import threading
from pathlib import Path

from handlers.decoding import decode
from handlers.files import atomic_file
from handlers.kept_images import kept_path

log = logging.getLogger(__name__)
LONGEST_SIDE = 1024  # pixels of a copy
QUALITY = 92
WAITING_PICTURES, WAITING_BYTES = 64, 64 << 20  # more are not kept
LOWER_PRIORITY = 10  # of the thread, so that answers come first


class ImageKeeper:
    """Call `keep` with each answered picture. `dropped` counts those that were not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dropped = 0
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(WAITING_PICTURES)
        self._bytes = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, sha256: str, data: bytes) -> None:
        """Queue the file of an upload; never waits and never raises."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="image keeper", daemon=True)
                self._thread.start()
            try:
                if self._bytes and self._bytes + len(data) > WAITING_BYTES:
                    raise queue.Full
                self._waiting.put_nowait((sha256, data))
                self._bytes += len(data)
            except queue.Full:
                self.dropped += 1
                if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8 …
                    log.warning("Pictures arrive too fast to be kept for review; %d were not kept.", self.dropped)

    def join(self) -> None:
        """Wait until all queued pictures are written."""
        self._waiting.join()

    def _run(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWER_PRIORITY)
        while True:
            sha256, data = self._waiting.get()
            try:
                self._write(sha256, data)
            except Exception:  # a full disk, a folder without rights: answers go on
                log.exception("A picture could not be kept for review.")
            finally:
                with self._lock:
                    self._bytes -= len(data)
                self._waiting.task_done()

    def _write(self, sha256: str, data: bytes) -> None:
        path = kept_path(self.folder, sha256)
        if path.exists():
            os.utime(path)  # its days begin again
            return
        picture = decode(data, LONGEST_SIDE * 3 // 4).image  # cameras' 4:3
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        picture.info.clear()  # Pillow would write comments and profiles
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(buffer.getvalue())
