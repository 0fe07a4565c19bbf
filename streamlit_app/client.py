"""The page's only HTTP: TorchServe's predictions, and the promoter's word on what is being served.

Every call has a time-out, follows no redirect and ignores proxy settings: the services are neighbours.
"""

import os
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import requests
import urllib3.exceptions
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from requests.adapters import HTTPAdapter

UNKNOWN = "UNK"  # the ninth class: none of the above
METADATA = ("age", "sex", "site")  # what a model may take beside the picture
PARALLEL = 4  # enough to fill TorchServe's batches without filling its queue
CONNECT_SECONDS, READ_SECONDS = 3.0, 30.0
BUSY_WAITS = (0.3, 0.7, 1.5)  # seconds before each further try
BUSY = (503, 507)  # queue full or worker restarting; worker died on the way. Predicting again harms nothing.
FAILED = 500  # of TorchServe: the worker died; of the handler: the model failed on this picture

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Kind = Literal["unreachable", "timeout", "busy", "no_model", "refused", "failed", "unexpected"]
OF_THE_PICTURE: tuple[Kind, ...] = ("refused", "failed")  # others may be read all the same


class Model(BaseModel):
    """Which model answered, and what it takes beside the picture: age from and to, the words of sex and site."""

    name: str
    version: str | None = None
    architecture: str | None = None
    digest: str | None = None
    run_id: str | None = None
    takes: dict[str, list[float | str]] = {}

    @field_validator("takes")
    @classmethod
    def _can_be_asked_for(cls, takes: dict[str, list[float | str]]) -> dict[str, list[float | str]]:
        known = {name: choices for name, choices in takes.items() if name in METADATA}
        if "age" in known and not (len(known["age"]) == 2 and all(isinstance(end, float) for end in known["age"])):
            raise ValueError("age must be given as the youngest and the oldest")
        if not all(isinstance(word, str) for name in ("sex", "site") for word in known.get(name, [])):
            raise ValueError("sex and site must be given as words")
        return known

    def knows(self, name: str, value: float | str) -> bool:
        """Whether the model can be told this."""
        choices = self.takes.get(name, [])
        if name == "age":
            return bool(choices) and choices[0] <= value <= choices[1]  # type: ignore[operator]  # numbers, as checked
        return value in choices


class LesionClass(BaseModel):
    """One of the nine classes, as the answer explains it."""

    name: str
    malignant: bool
    description: str


class Uncertainty(BaseModel):
    """Entropy in nats over the nine probabilities; codes of the conformal set, if the model has one."""

    entropy: float = Field(ge=0, allow_inf_nan=False)
    conformal_set: list[str] | None = None
    confidence_level: Probability | None = None


class Heat(BaseModel):
    """Grad-CAM of class `target`: rows of values in [0, 1] stretching over the whole upright picture."""

    target: str
    grid: list[list[Probability]] = Field(min_length=1, max_length=256)

    @field_validator("grid")
    @classmethod
    def _is_rectangle(cls, grid: list[list[float]]) -> list[list[float]]:
        if not 1 <= len(grid[0]) <= 256 or any(len(row) != len(grid[0]) for row in grid):
            raise ValueError("the rows of the grid differ in length")
        return grid


class Answer(BaseModel):
    """TorchServe's answer for one image (schema 1), checked."""

    schema_: Literal[1] = Field(alias="schema")
    model: Model
    probabilities: dict[str, Probability] = Field(min_length=2)
    classes: dict[str, LesionClass]
    uncertainty: Uncertainty
    gradcam: Heat
    metadata: dict[str, float | str | None] = {}
    disclaimer: str

    @model_validator(mode="after")
    def _explains_its_codes(self) -> "Answer":
        if missing := {*self.probabilities, self.gradcam.target} - set(self.classes):
            raise ValueError(f"no explanation of {', '.join(sorted(missing))}")
        return self

    @property
    def ranking(self) -> list[str]:
        """Codes, the most probable first."""
        return sorted(self.probabilities, key=self.probabilities.__getitem__, reverse=True)

    @property
    def malignancy(self) -> float:
        """Probability of all malignant classes together."""
        return sum(p for code, p in self.probabilities.items() if self.classes[code].malignant)


class Release(BaseModel):
    """A version, as the promoter names it."""

    version: str


class Desired(BaseModel):
    """What the registry asks for."""

    champion: Release | None = None


class Actual(BaseModel):
    """What TorchServe does."""

    serving: Release | None = None


class Refusal(BaseModel):
    """A version that somebody asked for and that does not serve, and why."""

    version: str
    reason: str
    final: bool = True


class Promotion(BaseModel):
    """What the promoter sees: whether TorchServe does as the registry asks."""

    settled: bool
    desired: Desired = Desired()
    actual: Actual | None = None
    errors: list[str] = []
    refused: list[Refusal] = []

    @property
    def serving(self) -> str | None:
        """The version that answers."""
        return self.actual.serving.version if self.actual and self.actual.serving else None

    @property
    def words(self) -> str:
        """All of it in a few words."""
        champion = self.desired.champion.version if self.desired.champion else None
        now = f"version {self.serving} is served" if self.serving else "no model is served"
        if champion in {one.version for one in self.refused if one.final} and champion != self.serving:
            return f"{now}, version {champion} was refused"
        if champion not in (None, self.serving):
            return f"{now}, version {champion} is on its way"
        return now if self.settled or not self.errors else f"{now}; {self.errors[0][:200]}"


class ServingError(Exception):
    """Why there is no answer: `kind` for the page, the message for its reader."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TorchServe:
    """A model behind TorchServe's REST door; one object serves all sessions and threads."""

    def __init__(self, url: str, model: str = "skin_vit", read_seconds: float = READ_SECONDS) -> None:
        self.url, self.model = url.rstrip("/"), model
        self.timeouts = (CONNECT_SECONDS, read_seconds)
        self.session = requests.Session()
        self.session.trust_env = False
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=4 * PARALLEL))

    def predict(self, image: bytes, target: str | None = None, told: Mapping[str, float | str] | None = None) -> Answer:
        """Ask for nine probabilities and the heatmap of class `target` (default: the most probable), with what is
        `told` of the patient to a model that takes it.

        Raises:
            ServingError: no usable answer; one that is busy has been asked again a few times.
        """
        fields = {name: str(value) for name, value in (told or {}).items()} | ({"target": target} if target else {})
        for wait in (*BUSY_WAITS, None):
            try:
                response = self._post(image, fields)
            except requests.ConnectionError as error:
                # A kept-alive connection may be closed just when it is used again: try again on a new one.
                cut_off = error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError)
                if wait is None or not cut_off or isinstance(error, requests.Timeout):
                    raise self._translate(error) from error
            except requests.RequestException as error:
                raise self._translate(error) from error
            else:
                if wait is None or not _passes(response):
                    return _read(response)
            time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def is_up(self) -> bool:
        """Whether TorchServe itself answers; it says so without a model, too."""
        try:
            return self.session.get(f"{self.url}/ping", timeout=(1, 2), allow_redirects=False).ok
        except requests.RequestException:
            return False

    def _post(self, image: bytes, fields: dict[str, str]) -> requests.Response:
        url = f"{self.url}/predictions/{self.model}"
        if not fields:
            headers = {"Content-Type": "application/octet-stream"}
            return self.session.post(url, image, headers=headers, timeout=self.timeouts, allow_redirects=False)
        files = {"data": ("image", image, "application/octet-stream")}
        return self.session.post(url, data=fields, files=files, timeout=self.timeouts, allow_redirects=False)

    def _translate(self, error: requests.RequestException) -> ServingError:
        if isinstance(error, requests.ConnectionError):
            return ServingError("unreachable", f"Nothing answers at {self.url}.")
        if isinstance(error, requests.Timeout):
            return ServingError("timeout", f"No answer within {self.timeouts[1]:g} seconds from {self.url}.")
        return ServingError("unexpected", f"{self.url} cannot be asked: check TORCHSERVE_URL.")


def _passes(response: requests.Response) -> bool:
    """Whether it may be another answer in a moment: TorchServe's own trouble, not the handler's word."""
    status = response.status_code
    return status in BUSY or (status == FAILED and not _ours(_json(response)))


def _json(response: requests.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _ours(body: Any) -> dict[str, Any]:
    """The handler's own error in a body; empty where it is TorchServe's, or none."""
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


def _read(response: requests.Response) -> Answer:
    """The answer in a response, or the ServingError it stands for: our shape of error, or TorchServe's own."""
    status, body = response.status_code, _json(response)
    if status == 200:
        try:
            return Answer.model_validate(body)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:2])
            raise ServingError("unexpected", f"The answer is not in the form this page knows ({what}).") from error
    body = body if isinstance(body, dict) else {}
    ours = _ours(body)
    said = str(ours.get("message") or body.get("message") or "")[:300]
    if status in BUSY:
        raise ServingError("busy", said or "All workers are busy.")
    if status == 404:
        raise ServingError("no_model", said or "There is no such model.")
    if status in (400, 413, 415):
        own_413 = "The image is larger than the model server accepts."  # TorchServe's own words name a Java class
        raise ServingError("refused", said if ours else own_413 if status == 413 else said or "It was refused.")
    if status == FAILED and ours:
        raise ServingError("failed", said or "The model failed on this picture.")
    raise ServingError("unexpected", f"The model server answered with status {status}. {said}".strip())


def promotion(url: str) -> Promotion | None:
    """What the promoter sees, or None when it is not there or says something else."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            response = session.get(f"{url.rstrip('/')}/status", timeout=(0.5, 1), allow_redirects=False)
            return Promotion.model_validate(response.json()) if response.ok else None
    except (requests.RequestException, ValueError):
        return None


def setting(name: str) -> str:
    """An address from the environment, or its default on this machine."""
    defaults = {
        "TORCHSERVE_URL": "http://127.0.0.1:8080",
        "PROMOTER_URL": "http://127.0.0.1:8083",
        "MLFLOW_PUBLIC_URL": "http://127.0.0.1:5001",
    }
    return os.environ.get(name) or defaults[name]
