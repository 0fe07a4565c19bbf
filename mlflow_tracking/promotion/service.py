"""The promoter: reconciles every two seconds and tells of it on HTTP.

    python -m mlflow_tracking.promotion.service

/healthz says whether the loop is alive, /status what it sees and does (JSON), /metrics the same for Prometheus. Nothing
can be told to it: what should be served is said in the registry. Ctrl-C stops it.

Settings, from the environment or `.env` (.env.example says what each is): MLFLOW_TRACKING_URI or MLFLOW_PORT,
TORCHSERVE_URL or TORCHSERVE_PORT, TORCHSERVE_MANAGEMENT or TORCHSERVE_RUN_DIR, MODEL_STORE, STACK_STATE, PROMOTER_HOST,
PROMOTER_PORT, PROMOTER_POLL_SECONDS, PROMOTER_GATES, PROMOTER_KEEP_ARCHIVES.
"""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlflow_tracking.promotion.gates.judge import GateSettingsError
from mlflow_tracking.promotion.ledger import StoreBusy, owned
from mlflow_tracking.promotion.reconcile import Event, Pass, Reconciler
from mlflow_tracking.promotion.status import status
from mlflow_tracking.settings import Settings, SettingsError

log = logging.getLogger("promoter")
# A pass may wait for a worker that loads, and for one that drains; a loop that is silent for longer hangs.
ALIVE_SECONDS = 300.0
STEPS_KEPT = 50
OWN_SECONDS = 5.0  # for a promoter that is just ending, or for `make up`, which looks whether there is one


class Promoter:
    """The loop, and what it tells."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reconciler = Reconciler.create(settings, tell=self._event)
        self.metrics = Metrics()
        self._steps: deque[dict[str, Any]] = deque(maxlen=STEPS_KEPT)
        self._status: dict[str, Any] = {"settled": False, "errors": ["starting"]}
        self._running: dict[str, Any] | None = None
        self._errors: tuple[str, ...] = ()
        self._beat = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Reconcile until told to stop."""
        while not stop.is_set():
            self.once()
            stop.wait(self.settings.promoter_poll_seconds)

    def once(self) -> None:
        """One pass. Nothing that goes wrong in it ends the loop."""
        self._beat = time.monotonic()
        try:
            result = self.reconciler.reconcile()
        except StoreBusy:
            return  # scripts/promote.py is doing the same
        except Exception as error:
            # A fault of ours must not take the promoter away: TorchServe may need it in a minute.
            log.exception("pass failed")
            self._status = self._status | {"settled": False, "errors": [f"the promoter itself failed: {error!r}"]}
            return
        if result.errors != self._errors:
            for sentence in result.errors:
                log.warning("problem", extra={"fields": {"error": sentence}})
            if not result.errors:
                log.info("all problems are gone")
            self._errors = result.errors
        self.metrics.record(result, len(self.reconciler.setbacks))
        self._status = status(result, self.reconciler.setbacks)

    def status(self) -> dict[str, Any]:
        """What /status answers."""
        told = {"running": self._running, "steps": list(self._steps), "seconds_silent": self._silence()}
        return {**self._status, **told}

    def alive(self) -> bool:
        """Whether the loop moves."""
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


class Metrics:
    """The promoter's figures for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.steps = Counter("promoter_steps", "Steps by how they ended", ["action", "state"], registry=self.registry)
        self.seconds = Histogram("promoter_step_seconds", "Duration of steps", ["action"], registry=self.registry)
        self.serving = self._gauge("promoter_serving_version", "The version that answers; 0 for none")
        self.champion = self._gauge("promoter_champion_version", "The version the alias champion asks for; 0 for none")
        self.registry_up = self._gauge("promoter_registry_up", "Whether MLflow answered")
        self.torchserve_up = self._gauge("promoter_torchserve_up", "Whether TorchServe answered")
        self.settled = self._gauge("promoter_settled", "Whether all is as the registry asks")
        self.set_back = self._gauge("promoter_refused_releases", "Releases that were refused, or wait for another try")
        self.last_pass = self._gauge("promoter_last_pass_timestamp_seconds", "When the last pass ended")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def record(self, result: Pass, set_back: int) -> None:
        """Take over the outcome of a pass."""
        champion = result.desired.champion
        self.serving.set(_number(result.actual.default if result.actual else None))
        self.champion.set(_number(champion.version if champion else None))
        self.registry_up.set(result.registry_up)
        self.torchserve_up.set(result.torchserve_up)
        self.settled.set(result.settled)
        self.set_back.set(set_back)
        self.last_pass.set_to_current_time()


def _number(version: str | None) -> int:
    return int(version) if version and version.isdigit() else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, the `fields` given with it, and an exception's text."""
        values = {"at": _now(), "level": record.levelname.lower(), "message": record.getMessage()}
        values |= getattr(record, "fields", {})
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def http_server(promoter: Promoter) -> ThreadingHTTPServer:
    """A server for /healthz, /status and /metrics, bound but not yet running. Raises OSError for a busy port."""

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
                self._json(404, {"error": "There are /healthz, /status and /metrics."})

        def _json(self, code: int, values: dict[str, Any]) -> None:
            self._send(code, "application/json", json.dumps(values, indent=1).encode() + b"\n")

        def _send(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Health checks every few seconds are not worth a line."""

    return ThreadingHTTPServer((promoter.settings.promoter_host, promoter.settings.promoter_port), Handler)


def main() -> int:
    """Run until SIGTERM or Ctrl-C. Exit code 1 and a sentence for settings that do not work."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("promoter", description=__doc__, formatter_class=raw).parse_args()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    with ExitStack() as held:
        try:
            settings = Settings.load()
            promoter = Promoter(settings)
            held.enter_context(owned(settings.store, f"the promoter of {settings.state}", OWN_SECONDS))
        except (SettingsError, GateSettingsError, StoreBusy) as error:
            print(error, file=sys.stderr)
            return 1
        except OSError as error:
            print(f"The model store {settings.store} cannot be written: {error.strerror}.", file=sys.stderr)
            return 1
        try:
            server = http_server(promoter)
        except OSError as error:
            where = f"{settings.promoter_host}:{settings.promoter_port}"
            told = f"The promoter cannot listen on {where} ({error.strerror}); choose a PROMOTER_PORT."
            print(told, file=sys.stderr)
            return 1
        serve(promoter, server)
    return 0


def serve(promoter: Promoter, server: ThreadingHTTPServer) -> None:
    """Reconcile and answer until SIGTERM or Ctrl-C."""
    settings, stop = promoter.settings, threading.Event()

    def on_signal(number: int, frame: object) -> None:
        # Steps may be cut off anywhere, so there is no need to wait for one that takes a minute.
        stop.set()
        raise SystemExit(0)

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
    sys.exit(main())
