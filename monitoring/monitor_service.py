"""The monitor's HTTP service: /health, /summary, /predictions, /versions, /reviews and /metrics. See docs/api.md."""

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest

from mlflow_tracking.command_line import run
from mlflow_tracking.stack_settings import Settings
from monitoring import summary as answers
from monitoring.monitor import DAY, Monitor
from monitoring.monitor_metrics import figure_metrics, state_metrics
from monitoring.performance import RealisedPerformance
from monitoring.prediction_store import StoreUnavailable
from monitoring.review_service import ReviewGuard, review_routes

LONGEST_HOURS = 24 * 366 * 5
Version = Annotated[str | None, Query(max_length=200)]


class _Collector:
    """The figures of a monitor at the time of a scrape."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def collect(self) -> Any:
        """Yield the metrics; without a database only the monitor's own."""
        yield from state_metrics(self.monitor.state())
        try:
            yield from list(figure_metrics(self.monitor.store))
        except StoreUnavailable:
            return


def create_app(monitor: Monitor) -> FastAPI:
    """Return the service of a monitor, whose loop runs as long as the service."""

    @asynccontextmanager
    async def loop(app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=monitor.run, args=[stop], name="monitor")
        thread.start()
        yield
        stop.set()
        thread.join()

    app = FastAPI(title="Monitor", lifespan=loop, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ReviewGuard)
    app.include_router(review_routes(monitor))
    realised = RealisedPerformance(monitor.store)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(monitor))

    @app.exception_handler(StoreUnavailable)
    def unavailable(request: Request, error: StoreUnavailable) -> JSONResponse:
        body = {"error": {"code": "database_unavailable", "message": str(error)}}
        return JSONResponse(body, 503)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])[:80].encode("ascii", "backslashreplace").decode()
        body = {"error": {"code": "invalid_parameter", "message": f"{name} is not valid ({first['msg']})."}}
        return JSONResponse(body, 422)

    @app.get("/health")
    def health() -> JSONResponse:
        alive = monitor.alive()
        status = "ok" if alive else "the loop hangs"
        return JSONResponse({"status": status, **monitor.state()}, 200 if alive else 503)

    @app.get("/summary")
    def summary(hours: Annotated[float, Query(gt=0, le=LONGEST_HOURS)] = 24, version: Version = None) -> dict[str, Any]:
        minute_history = monitor.settings.monitor_keep_days * DAY
        figures = answers.summary(monitor.store, realised, hours, version, minute_history)
        return {"state": monitor.state(), "serving": answers.serving(monitor.audit), **figures}

    @app.get("/predictions")
    def predictions(limit: Annotated[int, Query(ge=1, le=1000)] = 50, version: Version = None) -> dict[str, Any]:
        return {"predictions": answers.latest_predictions(monitor.store, limit, version)}

    @app.get("/versions")
    def versions() -> dict[str, Any]:
        return answers.version_line(monitor.store, monitor.audit)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def main() -> None:
    """Take the prediction log into a database, and answer with figures over HTTP.

    /health reports whether the loop is alive, /summary figures by version and time, /predictions the latest
    predictions, /versions what happened to the versions, /metrics the figures for Prometheus. /reviews gives the page
    kept pictures and takes readings of them. Ctrl-C stops it.

    Settings come from the environment or `.env`, and .env.example explains them: MONITOR_HOST, MONITOR_PORT,
    MONITOR_DATABASE, MONITOR_KEEP_DAYS, PREDICTION_LOG, MODEL_STORE, STACK_STATE, KEEP_IMAGES_DAYS, KEPT_IMAGES,
    REVIEW_RANDOM_SHARE.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = Settings.load()
    settings.state.mkdir(parents=True, exist_ok=True)
    app = create_app(Monitor(settings))
    options: dict[str, Any] = {"access_log": False, "server_header": False, "log_level": "warning"}
    uvicorn.run(app, host=settings.monitor_host, port=settings.monitor_port, timeout_graceful_shutdown=5, **options)


if __name__ == "__main__":
    run(main)
