"""The promoter: reconcile every two seconds, and report on it over HTTP."""

import json
import logging
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from handlers.errors import UserError
from mlflow_tracking.command_line import run
from mlflow_tracking.promotion.backoff import Setback
from mlflow_tracking.promotion.locks import StoreBusy, owned
from mlflow_tracking.promotion.plan import Actual, Release
from mlflow_tracking.promotion.reconcile import WAITING_SECONDS, Event, Pass, create_reconciler
from mlflow_tracking.promotion.rolling_update import serving_counts
from mlflow_tracking.stack_settings import Settings

log = logging.getLogger("promoter")
# A step may wait for a worker that loads or drains. A loop that is silent for longer hangs.
ALIVE_SECONDS = 300.0
STEPS_KEPT = 50
OWN_SECONDS = 5.0  # how long to wait for a promoter that is ending, or for `make up`, which probes the lock


class PromoterError(UserError):
    """The promoter cannot start."""


class Promoter:
    """The reconcile loop, its state and its figures."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reconciler = create_reconciler(settings, self._event)
        self.metrics = Metrics()
        self._steps: deque[dict[str, Any]] = deque(maxlen=STEPS_KEPT)
        self._status: dict[str, Any] = {"settled": False, "errors": ["starting"]}
        self._running: dict[str, Any] | None = None
        self._errors: tuple[str, ...] = ()
        self._beat = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Reconcile until `stop` is set."""
        poll = self.settings.promoter_poll_seconds
        while not stop.is_set():
            waiting = self.reconcile()
            stop.wait(min(WAITING_SECONDS, poll) if waiting else poll)

    def reconcile(self) -> bool:
        """Run one pass and return whether a step waits; no error ends the loop."""
        self._beat = time.monotonic()
        try:
            result = self.reconciler.reconcile()
        except StoreBusy:
            return False  # scripts/promote.py is reconciling
        except Exception as error:
            # The promoter survives its own faults, because TorchServe may need it in a minute.
            log.exception("pass failed")
            self._status = self._status | {"settled": False, "errors": [f"The promoter's pass failed: {error!r}."]}
            return False
        if result.errors != self._errors:
            for sentence in result.errors:
                log.warning("problem", extra={"fields": {"error": sentence}})
            if not result.errors:
                log.info("all problems are solved")
            self._errors = result.errors
        setbacks = self.reconciler.backoff.setbacks
        replicas = self.reconciler.replicas.report()
        self.metrics.record(result, len(setbacks), replicas)
        self._status = state_values(result, setbacks) | {"replicas": replicas}
        return result.waiting

    def status(self) -> dict[str, Any]:
        """Return the answer of /status."""
        loop = {"running": self._running, "steps": list(self._steps), "seconds_silent": self._silence()}
        return {**self._status, **loop}

    def alive(self) -> bool:
        """Whether the loop has moved lately."""
        return self._silence() < ALIVE_SECONDS

    def _silence(self) -> float:
        return round(time.monotonic() - self._beat, 1)

    def _event(self, event: Event) -> None:
        self._beat = time.monotonic()
        fields = {
            "action": str(event.step.action),
            "version": event.step.release.version,
            "digest": event.step.release.digest,
            "state": event.state,
            "seconds": round(event.seconds, 2),
            "remark": event.remark,
        }
        self._running = None
        if event.state in ("begun", "running"):
            self._running = fields
            return
        log.info("step", extra={"fields": fields})
        self._steps.append({"at": _now(), **fields})
        self.metrics.steps.labels(event.step.action, event.state).inc()
        self.metrics.seconds.labels(event.step.action).observe(event.seconds)


def state_values(result: Pass, setbacks: Mapping[Release, Setback]) -> dict[str, Any]:
    """Return a pass and the setbacks as JSON values, for /status and for the page."""
    desired = result.desired
    return {
        "desired": {"champion": _release(desired.champion), "challenger": _release(desired.challenger)},
        "actual": _actual(result.actual) if result.actual else None,
        "settled": result.settled,
        "registry_up": result.registry_up,
        "torchserve_up": result.torchserve_up,
        "errors": list(result.errors),
        "refused": [_setback(release, setback) for release, setback in setbacks.items()],
    }


def _release(release: Release | None) -> dict[str, Any] | None:
    return {"version": release.version, "digest": release.digest} if release else None


def _actual(actual: Actual) -> dict[str, Any]:
    return {
        "default": actual.default,
        "serving": _release(actual.serving),
        "last_good": _release(actual.last_good),
        "loaded": [{**vars(held.release), "ready": held.ready} for held in actual.loaded.values()],
    }


def _setback(release: Release, setback: Setback) -> dict[str, Any]:
    wait = None if setback.final else max(0, round(setback.retry_at - time.monotonic()))
    return {**vars(release), "reason": setback.reason, "final": setback.final, "retry_in_seconds": wait}


class Metrics:
    """Figures for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.steps = Counter("promoter_steps", "Steps by how they ended", ["action", "state"], registry=self.registry)
        self.seconds = Histogram("promoter_step_seconds", "Duration of steps", ["action"], registry=self.registry)
        self.replicas = Gauge(
            "promoter_replicas", "TorchServes that serve a version", ["version"], registry=self.registry
        )
        self.gauges = {
            name: Gauge(f"promoter_{name}", text, registry=self.registry)
            for name, text in {
                "serving_version": "Version that serves; 0 for none",
                "champion_version": "Version with the alias champion; 0 for none",
                "registry_up": "Whether MLflow answered",
                "torchserve_up": "Whether TorchServe answered",
                "settled": "Whether TorchServe agrees with the registry",
                "refused_releases": "Releases that were refused or wait for a retry",
                "last_pass_timestamp_seconds": "Time of the last pass",
            }.items()
        }

    def record(self, result: Pass, set_back: int, replicas: list[dict[str, Any]]) -> None:
        """Set the figures after a pass."""
        self.replicas.clear()
        for version, count in serving_counts(replicas).items():
            self.replicas.labels(version).set(count)
        champion = result.desired.champion
        values = {
            "serving_version": int((result.actual and result.actual.default) or 0),
            "champion_version": int(champion.version) if champion else 0,
            "registry_up": result.registry_up,
            "torchserve_up": result.torchserve_up,
            "settled": result.settled,
            "refused_releases": set_back,
            "last_pass_timestamp_seconds": time.time(),
        }
        for name, value in values.items():
            self.gauges[name].set(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JsonLines(logging.Formatter):
    """Log lines as JSON objects, with the promoter's name if there are several."""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self._names = {"replica": replica} if replica else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, message, the record's `fields` and the exception."""
        values = {"at": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        values |= self._names | getattr(record, "fields", {})
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def http_server(promoter: Promoter) -> ThreadingHTTPServer:
    """Return a bound server for /healthz, /status and /metrics. Raises PromoterError if the port cannot be used."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/healthz":
                alive = promoter.alive()
                self._json(200 if alive else 503, {"status": "ok" if alive else "the loop hangs"})
            elif path == "/status":
                self._json(200, promoter.status())
            elif path == "/metrics":
                self._send(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(promoter.metrics.registry))
            else:
                self._json(404, {"error": "Use /healthz, /status or /metrics."})

        def _json(self, code: int, values: dict[str, Any]) -> None:
            self._send(code, "application/json", json.dumps(values, indent=1).encode() + b"\n")

        def _send(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Log nothing: health checks come every few seconds."""

    host, port = promoter.settings.promoter_host, promoter.settings.promoter_port
    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise PromoterError(
            f"The promoter cannot listen on {host}:{port} ({error.strerror}). Set PROMOTER_PORT to a free port."
        ) from error


def main() -> None:
    """Reconcile every two seconds, and report on it over HTTP.

    /healthz reports whether the loop is alive, /status its state as JSON, /metrics the figures for Prometheus. The
    promoter takes no commands: move an alias in MLflow instead. Ctrl-C stops it.

    Settings come from the environment or `.env`, and .env.example explains them: MLFLOW_TRACKING_URI or MLFLOW_PORT,
    TORCHSERVE_URL or TORCHSERVE_PORT, TORCHSERVE_MANAGEMENT or TORCHSERVE_RUN_DIR, MODEL_STORE, STACK_STATE,
    PROMOTER_HOST, PROMOTER_PORT, PROMOTER_POLL_SECONDS, PROMOTER_GATES, PROMOTER_KEEP_ARCHIVES, PROMOTER_REPLICA,
    PROMOTER_KEY_FILE.
    """
    settings = Settings.load()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines(settings.promoter_replica))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    promoter = Promoter(settings)
    with owned(settings.store, f"the promoter of {settings.state}", OWN_SECONDS):
        serve(promoter, http_server(promoter))


def serve(promoter: Promoter, server: ThreadingHTTPServer) -> None:
    """Reconcile and answer requests until SIGTERM or Ctrl-C."""
    settings, stop = promoter.settings, threading.Event()

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        raise SystemExit(0)  # at once: a step may be interrupted anywhere

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = {"mlflow": settings.registry_uri, "torchserve": settings.inference_url}
    log.info("started", extra={"fields": addresses | {"port": settings.promoter_port, "store": str(settings.store)}})
    try:
        promoter.run(stop)
    finally:
        server.server_close()
        log.info("stopped")


if __name__ == "__main__":
    run(main)
