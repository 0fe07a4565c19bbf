"""The page's only HTTP: predictions from TorchServe and the status of the promoter.

Every request has a timeout, follows no redirect and ignores proxy settings, because both services are neighbours.
"""

import os
import time
from collections.abc import Mapping
from typing import Any, Literal

import requests
import urllib3.exceptions
from pydantic import ValidationError
from requests.adapters import HTTPAdapter

from streamlit_app.answer_schema import Answer, PromoterState

PARALLEL = 8  # requests at a time: a batch of TorchServe
CONNECT_SECONDS, READ_SECONDS = 3.0, 30.0
SEND_BYTES_PER_SECOND = 5e6  # the whole body must be sent within the timeout for connecting
BUSY_WAITS = (0.3, 0.7, 1.5)  # seconds before each retry
BUSY = (503, 507)  # queue full or worker restarting; worker died during the request
FAILED = 500  # from TorchServe: the worker died. From the handler: the model failed on this picture.

ProblemKind = Literal["unreachable", "timeout", "busy", "no_model", "refused", "failed", "unexpected"]
PICTURE_PROBLEMS: tuple[ProblemKind, ...] = ("refused", "failed")  # other pictures can still be read


class ServingError(Exception):
    """A request without an answer: `kind` selects the page's text, the message is for the reader."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class PredictionClient:
    """TorchServe's predictions over REST. One client serves all sessions and threads."""

    def __init__(self, url: str, model: str = "skin_vit", read_seconds: float = READ_SECONDS) -> None:
        self.url, self.model = url.rstrip("/"), model
        self.timeouts = (CONNECT_SECONDS, read_seconds)
        self.session = requests.Session()
        self.session.trust_env = False
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=4 * PARALLEL))

    def predict(
        self,
        image: bytes,
        target: str | None = None,
        details: Mapping[str, float | str] | None = None,
        recorded: bool = True,
    ) -> Answer:
        """Return the answer for a picture; requests that fail for the moment are retried.

        Without a target, the answer holds the picture as the model server decoded it.

        Args:
            image: the bytes of the file, as uploaded
            target: class code of the heatmap; default: the most probable class
            details: the patient's details, by field name
            recorded: False keeps the request out of the prediction log, and the picture out of the review

        Raises:
            ServingError: there is no usable answer.
        """
        fields = {name: str(value) for name, value in (details or {}).items()} | (
            {"target": target} if target else {"picture": "true"}
        )
        for wait in (*BUSY_WAITS, None):
            try:
                response = self._post(image, fields, recorded)
            except requests.ConnectionError as error:
                # A kept-alive connection may close just when it is used again: retry on a new one.
                cut_off = error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError)
                if wait is None or not cut_off or isinstance(error, requests.Timeout):
                    raise self._translate(error) from error
            except requests.RequestException as error:
                raise self._translate(error) from error
            else:
                body = _body(response)
                # TorchServe's own failure may pass; the handler's, whose body has `error`, does not.
                transient = response.status_code in BUSY or (response.status_code == FAILED and "error" not in body)
                if wait is None or not transient:
                    return _parse(response.status_code, body)
            time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def is_up(self) -> bool:
        """Return whether TorchServe answers; it answers without a model, too."""
        try:
            return self.session.get(f"{self.url}/ping", timeout=(1, 2), allow_redirects=False).ok
        except requests.RequestException:
            return False

    def _post(self, image: bytes, fields: dict[str, str], recorded: bool) -> requests.Response:
        # Always a form: a raw body that is no picture may be taken for JSON.
        url = f"{self.url}/predictions/{self.model}"
        files = {"data": ("image", image, "application/octet-stream")}
        connect, read = self.timeouts
        timeouts = (connect + len(image) / SEND_BYTES_PER_SECOND, read)
        headers = {} if recorded else {"X-Record": "no"}
        return self.session.post(
            url, data=fields, files=files, headers=headers, timeout=timeouts, allow_redirects=False
        )

    def _translate(self, error: requests.RequestException) -> ServingError:
        if isinstance(error, requests.ConnectionError):
            return ServingError("unreachable", f"Nothing answers at {self.url}.")
        if isinstance(error, requests.Timeout):
            return ServingError("timeout", f"No answer within {self.timeouts[1]:g} seconds from {self.url}.")
        return ServingError("unexpected", f"{self.url} is not a usable address. Check TORCHSERVE_URL.")


def _body(response: requests.Response) -> dict[str, Any]:
    """Return the JSON object in a response; empty if there is none."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _parse(status: int, body: dict[str, Any]) -> Answer:
    """Return the answer in a body.

    Raises:
        ServingError: the body holds an error of the handler or of TorchServe, or no answer of schema 1.
    """
    if status == 200:
        try:
            return Answer.model_validate(body)
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, problem["loc"])) or "body" for problem in error.errors()[:3])
            raise ServingError("unexpected", f"The answer is not in schema 1: {fields}.") from error
    ours = body.get("error")
    message = str((ours if isinstance(ours, dict) else body).get("message") or "")[:300]
    if status in BUSY:
        raise ServingError("busy", message or "All workers are busy.")
    if status == 404:
        raise ServingError("no_model", message or "TorchServe has no such model.")
    if status == 413 and not ours:  # TorchServe's message names a Java class
        raise ServingError("refused", "The image is larger than the model server accepts.")
    if status in (400, 413, 415):
        raise ServingError("refused", message or "The model server refused the picture without a reason.")
    if status == FAILED and ours:
        raise ServingError("failed", message or "The model failed on this picture.")
    if message:
        raise ServingError("unexpected", f"The model server answered with status {status} ({message}).")
    raise ServingError("unexpected", f"The model server answered with status {status}.")


def promoter_state(url: str) -> PromoterState | None:
    """Return the promoter's status, or None if no promoter answers there."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            response = session.get(f"{url.rstrip('/')}/status", timeout=(0.5, 1), allow_redirects=False)
            return PromoterState.model_validate(response.json()) if response.ok else None
    except (requests.RequestException, ValueError):
        return None


def keep_days() -> int:
    """Return for how many days the stack keeps uploaded pictures; 0: it keeps none."""
    text = setting("KEEP_IMAGES_DAYS")
    return int(text) if text.isdecimal() else 0  # the stack refuses to start with another value


def setting(name: str) -> str:
    """Return a setting from the environment, or its default on this machine."""
    defaults = {
        "TORCHSERVE_URL": "http://127.0.0.1:8080",
        "PROMOTER_URL": "http://127.0.0.1:8083",
        "MONITOR_URL": "http://127.0.0.1:8084",
        "MLFLOW_PUBLIC_URL": "http://127.0.0.1:5001",
        "KEEP_IMAGES_DAYS": "0",
    }
    return os.environ.get(name) or defaults[name]
