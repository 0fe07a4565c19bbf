"""TorchServe's management and prediction APIs, as far as promotion needs them. Every call has a time-out."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from handlers.errors import ServiceUnavailable, UserError
from mlflow_tracking.settings import MODEL_NAME

# A description is answered from memory; more than this means that the server hangs.
QUICK = 10.0
CHANGE = 60.0  # what starts or ends workers, or waits for them
# Start-ups of a worker that may fail before its archive is taken to be at fault.
STARTS = 2
# A golden image on a machine that is busy loading another model.
PREDICTION = 75.0
# A worker that died, a queue that is full, a worker that was killed.
PASSING = (500, 503, 507)


class TorchServeUnavailable(ServiceUnavailable):
    """TorchServe does not answer."""


class TorchServeError(UserError):
    """TorchServe answered with an error; `status` is its HTTP status.

    `passing` says that it is TorchServe's own and may be gone when it is asked again: a worker died, or the queue is
    full. The handler's refusals are none of these.
    """

    def __init__(self, status: int, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.passing = passing


@dataclass(frozen=True)
class ServedVersion:
    """One version as TorchServe describes it: its archive, how many workers are ready, how many there are in all.

    `starting` are the process ids of those that are not ready.
    """

    version: str
    archive: str
    ready: int
    workers: int
    starting: frozenset[int] = frozenset()


class TorchServe:
    """A client for one model.

    Args:
        url: the prediction API.
        management: the management API, unix:PATH or http://HOST:PORT.
    """

    def __init__(self, url: str, management: str) -> None:
        # No proxy stands between the parts of one stack (trust_env).
        socket = management.removeprefix("unix:") if management.startswith("unix:") else None
        transport = httpx.HTTPTransport(uds=socket) if socket else None
        base = "http://torchserve" if socket else management
        self._management = httpx.Client(transport=transport, base_url=base, timeout=QUICK, trust_env=False)
        self._inference = httpx.Client(base_url=url, timeout=PREDICTION, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._management.close()
        self._inference.close()

    def versions(self) -> dict[str, ServedVersion]:
        """All versions of the model that are registered, with or without workers.

        Raises TorchServeError, TorchServeUnavailable.
        """
        try:
            described = self._manage("GET", f"/models/{MODEL_NAME}/all")
        except TorchServeError as error:
            if error.status == 404:
                return {}
            raise
        return {entry["modelVersion"]: _served(entry) for entry in described}

    def default(self) -> str | None:
        """The version that answers when none is named; None without any. Raises TorchServeError,
        TorchServeUnavailable."""
        try:
            return self._manage("GET", f"/models/{MODEL_NAME}")[0]["modelVersion"]
        except TorchServeError as error:
            if error.status == 404:
                return None
            raise

    def register(self, archive: str, workers: int) -> None:
        """Register an archive of the model store and have its workers started; wait_ready tells when.

        Not synchronously: that holds one of TorchServe's network threads until the worker is ready, and every request
        that arrives on it. It would also do so without workers, as those of model-config.yaml are started anyway.
        Raises TorchServeError, TorchServeUnavailable.
        """
        params = {"url": archive, "initial_workers": str(workers), "synchronous": "false"}
        self._manage("POST", "/models", params=params, timeout=CHANGE)

    def scale(self, version: str, workers: int, synchronous: bool) -> None:
        """Set the number of workers, and wait for that if asked. Raises TorchServeError, TorchServeUnavailable."""
        params = {"min_worker": str(workers), "max_worker": str(workers), "synchronous": str(synchronous).lower()}
        self._manage("PUT", f"/models/{MODEL_NAME}/{version}", params=params, timeout=QUICK + CHANGE * synchronous)

    def set_default(self, version: str) -> None:
        """Let `version` answer /predictions/NAME. Raises TorchServeError, TorchServeUnavailable."""
        self._manage("PUT", f"/models/{MODEL_NAME}/{version}/set-default")

    def unregister(self, version: str) -> None:
        """Take a version out at once, if it is there. What it is computing then gets no answer: see drain.

        Raises TorchServeError, TorchServeUnavailable.
        """
        try:
            self._manage("DELETE", f"/models/{MODEL_NAME}/{version}", timeout=CHANGE)
        except TorchServeError as error:
            if error.status != 404:
                raise

    def wait_ready(self, version: str, timeout: float, progress: Callable[[], None] = lambda: None) -> bool:
        """Whether a worker of the version gets ready within `timeout` seconds; False too once it died STARTS times.

        `progress` is called between two looks, and may raise to stop. Raises TorchServeError, TorchServeUnavailable.
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

    def drain(self, version: str, quiet: float = 2.0) -> None:
        """Wait until a version that is no longer the default has answered what it was asked before.

        TorchServe tells of requests that wait, not of those inside a worker, and unregistering leaves these without an
        answer. The queue is first in, first out, so any answer to a request of our own, even a refusal, says that all
        before it went into a worker; `quiet` seconds more let other workers finish theirs. Raises
        TorchServeError, TorchServeUnavailable.
        """
        served = self.versions().get(version)
        if served is None or not served.ready:
            return
        with suppress(TorchServeError):
            try:
                self.predict(b"drain", version, timeout=CHANGE)
            except TorchServeUnavailable:
                return  # no answer in all this time: the others will not get theirs either
        time.sleep(quiet)

    def predict(
        self,
        image: bytes,
        version: str,
        timeout: float = PREDICTION,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The REST answer of one version to one image, sent as a form if there are `metadata` to tell.

        Raises TorchServeError or TorchServeUnavailable.
        """
        path = f"/predictions/{MODEL_NAME}/{version}"
        if metadata:
            data = {name: str(value) for name, value in metadata.items()}
            return _answer(self._inference, "POST", path, data=data, files={"data": image}, timeout=timeout)
        headers = {"Content-Type": "application/octet-stream"}
        return _answer(self._inference, "POST", path, content=image, headers=headers, timeout=timeout)

    def _manage(self, method: str, path: str, **options: Any) -> Any:
        return _answer(self._management, method, path, **options)


def _answer(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as error:
        kind = "gives no answer" if isinstance(error, httpx.TimeoutException) else "is away"
        raise TorchServeUnavailable(f"TorchServe {kind} ({method} {path}: {error or type(error).__name__}).") from error
    try:
        values = response.json()
    except ValueError:
        values = {}
    if response.is_success:
        return values
    # TorchServe's own errors are {code, type, message}; the handler's are {error: {code, message}}.
    message = values.get("message") or values.get("error", {}).get("message") or response.reason_phrase
    passing = response.status_code in PASSING and "error" not in values
    raise TorchServeError(response.status_code, f"TorchServe answered {response.status_code}: {message}", passing)


def _served(entry: dict[str, Any]) -> ServedVersion:
    workers = entry.get("workers", [])
    ready = sum(worker["status"] == "READY" for worker in workers)
    starting = frozenset(worker["pid"] for worker in workers if worker["status"] != "READY" and worker["pid"] > 0)
    return ServedVersion(entry["modelVersion"], entry["modelUrl"], ready, len(workers), starting)
