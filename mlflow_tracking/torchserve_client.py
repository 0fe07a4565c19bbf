"""A client for TorchServe's management and prediction APIs, and the rule for retries. Every call has a timeout."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from handlers.errors import ServiceUnavailable, UserError
from mlflow_tracking.stack_settings import MODEL_NAME

Result = TypeVar("Result")

MANAGEMENT_SECONDS = 10.0  # TorchServe describes models from memory, so a slower answer means that it hangs
WORKER_SECONDS = 60.0  # for calls that start or end workers
PREDICTION_SECONDS = 75.0  # longer than TorchServe waits for a worker (torchserve/model-config.yaml)
DRAIN_SECONDS = 2.0  # for requests that are inside a worker when the queue is empty
STARTS = 2  # how often a worker may die while it starts before its archive counts as broken
RETRY_WAITS = (0.5, 2.0)  # seconds before each retry of a prediction
# TorchServe's own statuses that may pass: worker died; queue full or no worker ready; worker killed.
TRANSIENT = (500, 503, 507)


class TorchServeUnavailable(ServiceUnavailable):
    """TorchServe does not answer."""


class TorchServeError(UserError):
    """TorchServe answered with HTTP `status`. `code` is the handler's code or the name of TorchServe's exception.

    A `transient` error is TorchServe's own, and a retry may succeed. The handler's refusals are not transient.
    """

    def __init__(self, status: int, message: str, code: str = "", transient: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.transient = transient


@dataclass(frozen=True)
class ServedVersion:
    """One version in TorchServe: its archive, and how many of its workers are ready.

    `starting` are the process ids of the workers that are not ready.
    """

    version: str
    archive: str
    ready: int
    workers: int
    starting: frozenset[int] = frozenset()


class TorchServe:
    """A client for the model MODEL_NAME. Methods raise TorchServeError and TorchServeUnavailable.

    Args:
        url: the prediction API.
        management: the management API, unix:PATH or http://HOST:PORT; not needed for predictions.
    """

    def __init__(self, url: str, management: str = "") -> None:
        self._url, self._management_address = url, management
        # trust_env is off: no proxy stands between the parts of one stack.
        socket = management.removeprefix("unix:") if management.startswith("unix:") else None
        transport = httpx.HTTPTransport(uds=socket) if socket else None
        base = "http://torchserve" if socket else management
        self._management = httpx.Client(transport=transport, base_url=base, timeout=MANAGEMENT_SECONDS, trust_env=False)
        self._inference = httpx.Client(base_url=url, timeout=PREDICTION_SECONDS, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._management.close()
        self._inference.close()

    def versions(self) -> dict[str, ServedVersion]:
        """Return all registered versions, with or without workers."""
        try:
            models = self._manage("GET", f"/models/{MODEL_NAME}/all")
        except TorchServeError as error:
            if error.status == 404:
                return {}
            raise
        return {model["modelVersion"]: _served(model) for model in models}

    def default(self) -> str | None:
        """Return the version that answers if a request names none; None without any version."""
        try:
            return self._manage("GET", f"/models/{MODEL_NAME}")[0]["modelVersion"]
        except TorchServeError as error:
            if error.status == 404:
                return None
            raise

    def register(self, archive: str, workers: int) -> None:
        """Register an archive of the model store and start its workers; wait_ready waits for them."""
        # A synchronous call would block one of TorchServe's network threads, and every request on it.
        params = {"url": archive, "initial_workers": str(workers), "synchronous": "false"}
        self._manage("POST", "/models", params=params, timeout=WORKER_SECONDS)

    def scale(self, version: str, workers: int, synchronous: bool) -> None:
        """Set the number of workers; wait for them if `synchronous`."""
        params = {"min_worker": str(workers), "max_worker": str(workers), "synchronous": str(synchronous).lower()}
        timeout = MANAGEMENT_SECONDS + WORKER_SECONDS * synchronous
        self._manage("PUT", f"/models/{MODEL_NAME}/{version}", params=params, timeout=timeout)

    def set_default(self, version: str) -> None:
        """Let `version` answer /predictions/NAME."""
        self._manage("PUT", f"/models/{MODEL_NAME}/{version}/set-default")

    def unregister(self, version: str) -> None:
        """Unload a version at once, if it is loaded. Requests inside its workers get no answer: see drain."""
        try:
            self._manage("DELETE", f"/models/{MODEL_NAME}/{version}", timeout=WORKER_SECONDS)
        except TorchServeError as error:
            if error.status != 404:
                raise

    def wait_ready(self, version: str, timeout: float, progress: Callable[[], None] = lambda: None) -> bool:
        """Return whether a worker gets ready within `timeout` seconds; False early once it died STARTS times.

        `progress` is called while waiting, and may raise to stop.
        """
        end = time.monotonic() + timeout
        processes: set[int] = set()
        while True:
            served = self.versions().get(version)
            if served is not None and served.ready:
                return True
            processes |= served.starting if served else set()
            if time.monotonic() > end or len(processes) > STARTS:
                return False
            progress()
            time.sleep(0.25)

    def drain(self, version: str) -> None:
        """Wait until a version that is no longer the default has answered its earlier requests.

        Unregistering drops the requests inside a worker. The queue is first in, first out: any answer to a request of
        our own, even a refusal, means that all earlier ones reached a worker. DRAIN_SECONDS let the workers finish.
        """
        served = self.versions().get(version)
        if served is None or not served.ready:
            return
        with suppress(TorchServeError):
            try:
                self.predict(b"drain", version, timeout=WORKER_SECONDS, recorded=False)
            except TorchServeUnavailable:
                return  # the earlier requests will get no answer either
        time.sleep(DRAIN_SECONDS)

    def predict(
        self,
        image: bytes,
        version: str = "",
        timeout: float = PREDICTION_SECONDS,
        metadata: Mapping[str, Any] | None = None,
        recorded: bool = True,
    ) -> dict[str, Any]:
        """Return the REST answer to one image, of the default version if none is named; `metadata` are form fields.

        Without `recorded`, the request is not logged, and its picture is not kept for review.
        """
        path = f"/predictions/{MODEL_NAME}/{version}".rstrip("/")
        headers = {} if recorded else {"X-Record": "no"}
        if metadata:
            data = {name: str(value) for name, value in metadata.items()}
            body: dict[str, Any] = {"data": data, "files": {"data": image}, "headers": headers}
        else:
            body = {"content": image, "headers": headers | {"Content-Type": "application/octet-stream"}}
        answer = _answer(self._inference, self._url, "POST", path, timeout=timeout, **body)
        if not isinstance(answer, dict) or "prediction" not in answer:
            raise TorchServeError(500, f"{self._url}{path} answered without a prediction. Check the address.")
        return answer

    def _manage(self, method: str, path: str, **options: Any) -> Any:
        return _answer(self._management, self._management_address, method, path, **options)


def with_retries(call: Callable[[], Result], before_retry: Callable[[], None] = lambda: None) -> Result:
    """Return the result of a call to TorchServe; retry after a transient error, after each of RETRY_WAITS.

    `before_retry` may raise to stop. Raises what the last try raised.
    """
    for wait in RETRY_WAITS:
        try:
            return call()
        except TorchServeError as error:
            if not error.transient:
                raise
        before_retry()
        time.sleep(wait)
    return call()


def _answer(client: httpx.Client, address: str, method: str, path: str, **options: Any) -> Any:
    """Return the JSON of a successful response."""
    try:
        response = client.request(method, path, **options)
    except httpx.TimeoutException as error:
        raise TorchServeUnavailable(f"TorchServe at {address} gave no answer to {method} {path} in time.") from error
    except httpx.HTTPError as error:
        raise TorchServeUnavailable(
            f"TorchServe does not answer at {address} ({type(error).__name__}). Start it with `make up`."
        ) from error
    status, phrase = response.status_code, response.reason_phrase
    try:
        values = response.json()
    except ValueError:
        if status == 413:
            raise TorchServeError(status, f"TorchServe answered {status}: the request is too large.", phrase) from None
        raise TorchServeError(
            status, f"{address} answered {status} without JSON. Check that TorchServe runs at {address}.", phrase
        ) from None
    if response.is_success:
        return values
    raise _error(status, phrase, values)


def _error(status: int, phrase: str, values: Any) -> TorchServeError:
    """Return the error in a response: the handler's is {error: {code, message}}, TorchServe's {code, type, message}."""
    values = values if isinstance(values, dict) else {}
    handler = values.get("error")
    if isinstance(handler, dict):
        return TorchServeError(status, str(handler.get("message", phrase)), str(handler.get("code", status)))
    message = str(values.get("message") or phrase).rstrip(".")
    code = str(values.get("type") or phrase)
    return TorchServeError(status, f"TorchServe answered {status}: {message}.", code, status in TRANSIENT)


def _served(model: dict[str, Any]) -> ServedVersion:
    workers = model.get("workers", [])
    ready = sum(worker["status"] == "READY" for worker in workers)
    starting = frozenset(worker["pid"] for worker in workers if worker["status"] != "READY" and worker["pid"] > 0)
    return ServedVersion(model["modelVersion"], model["modelUrl"], ready, len(workers), starting)
