"""The monitor's loop: read the prediction log, store it, and delete old rows (MONITOR_KEEP_DAYS) and kept pictures."""

import logging
import threading
import time
from typing import Any

from handlers.errors import UserError
from handlers.kept_images import delete_older
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.stack_settings import Settings
from monitoring.log_reader import bytes_behind, read_batches
from monitoring.prediction_store import PredictionStore
from monitoring.references import References

log = logging.getLogger("monitor")
POLL_SECONDS = 1.0
LONGEST_WAIT = 60.0  # seconds between two tries to reach the database
PRUNE_SECONDS = 3600.0
PICTURE_SECONDS = 60.0  # between two searches for kept pictures whose days are over
ALIVE_SECONDS = 300.0  # a loop that is silent for longer hangs
DAY = 86400
OPENING = "The database is not open yet."  # `Monitor.error` before the first step


class Monitor:
    """The loop, and its state for /health and /metrics."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = PredictionStore(settings.monitor_database_url)
        self.audit = AuditLog(settings.store)
        self.references = References(settings.store)
        self.error = OPENING
        self.failures = 0
        self._ready = False  # the tables are those of this version
        self._pruned = -PRUNE_SECONDS
        self._pictures_deleted = -PICTURE_SECONDS
        self._beat = time.monotonic()
        self._positions: dict[str, int] = {}  # those last seen

    def run(self, stop: threading.Event) -> None:
        """Read until `stop` is set; no error ends the loop."""
        while not stop.is_set():
            stop.wait(self.step())

    def step(self) -> float:
        """Store what is new in the log; return the seconds to wait."""
        self._beat = time.monotonic()
        self._delete_pictures()
        try:
            if not self._ready:
                self.store.migrate()
                self._ready = True
            rows = self._read()
            is_due = self._beat - self._pruned >= PRUNE_SECONDS
            if is_due and not self.store.prune(time.time() - self.settings.monitor_keep_days * DAY):
                self._pruned = self._beat
        except Exception as error:
            return self._failed(error)
        if self.error and self.failures:
            log.info("The database answers again.")
        self.error, self.failures = "", 0
        return 0.0 if rows else POLL_SECONDS

    def _read(self) -> int:
        """Store one batch of each file, oldest file first; return the number of lines."""
        lines, paths = 0, list(reversed(self.settings.prediction_logs))
        self._positions = self.store.positions()
        for batch in read_batches(paths, self._positions):
            self.store.add(batch, self.references)
            self._positions[batch.fingerprint] = batch.end
            lines += len(batch.rows) + batch.unreadable
            if batch.unreadable:
                log.warning("%d lines of the prediction log are unreadable and are left out.", batch.unreadable)
        return lines

    def _delete_pictures(self) -> None:
        """Delete the kept pictures whose days are over; all of them while none should be kept."""
        if self._beat - self._pictures_deleted < PICTURE_SECONDS:
            return
        self._pictures_deleted = self._beat
        try:
            count = delete_older(self.settings.kept_images_folder, time.time() - self.settings.keep_images_days * DAY)
        except OSError as error:
            log.error("Kept pictures cannot be deleted: %s. Check the rights of the folder.", error)
            return
        if count:
            log.info("%d kept pictures are deleted; their days are over.", count)

    def _failed(self, error: Exception) -> float:
        """Note an error; return the seconds until the next try: 1, 2, 4 … up to LONGEST_WAIT."""
        message = str(error) if isinstance(error, UserError | OSError) else f"The monitor failed: {error!r}."
        if message != self.error:
            log.error(message, exc_info=None if isinstance(error, UserError) else error)
        self.error = message
        self.failures += 1
        return min(LONGEST_WAIT, 2.0 ** min(self.failures - 1, 16))

    def alive(self) -> bool:
        """Return whether the loop has moved lately."""
        return time.monotonic() - self._beat < ALIVE_SECONDS

    def state(self) -> dict[str, Any]:
        """Return the state; `reason` says why nothing is recorded."""
        on = self.settings.records_predictions
        return {
            "recording": on,
            "database_up": not self.error,
            "behind": bytes_behind(self.settings.prediction_logs, self._positions),
            "reason": "" if on else "The prediction log is off. Set PREDICTION_LOG to a file to record predictions.",
            "error": self.error,
        }
