"""The JSON that the page receives, checked: TorchServe's answer (schema 1) and the promoter's status."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AliasPath, Base64Bytes, BaseModel, Field, PrivateAttr, field_validator, model_validator

UNKNOWN = "UNK"  # the ninth class: none of the above
METADATA = ("age", "sex", "site")  # the patient's details that a model may take
LARGEST_GRID = 256  # rows and columns of a heatmap; the shipped model sends 10 × 10

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ClassKind = Literal["malignant", "other", "unknown"]


class ServedModel(BaseModel):
    """The model that answered. `takes` holds the age range and the accepted words for sex and site."""

    name: str
    version: str | None = None
    architecture: str | None = None
    digest: str | None = None
    run_id: str | None = None
    takes: dict[str, list[float | str]] = {}

    @field_validator("takes")
    @classmethod
    def _keep_fields_that_the_page_can_draw(cls, takes: dict[str, list[float | str]]) -> dict[str, list[float | str]]:
        fields = {name: choices for name, choices in takes.items() if name in METADATA}
        ages = fields.get("age", [0.0, 0.0])
        if not (len(ages) == 2 and all(isinstance(age, float) for age in ages)):
            raise ValueError("`age` must be the lowest and the highest age.")
        if not all(isinstance(word, str) for name in ("sex", "site") for word in fields.get(name, [])):
            raise ValueError("`sex` and `site` must be lists of words.")
        return fields

    def accepts(self, name: str, value: float | str) -> bool:
        """Return whether the model takes this value of a patient's detail."""
        choices = self.takes.get(name, [])
        if name == "age":
            return bool(choices) and choices[0] <= value <= choices[1]  # type: ignore[operator]  # numbers, as checked
        return value in choices


class ExplainedClass(BaseModel):
    """One of the nine classes in the answer's words."""

    name: str
    malignant: bool
    description: str


class AnswerUncertainty(BaseModel):
    """Entropy of the nine probabilities in nats, and the conformal set if the model has one."""

    entropy: float = Field(ge=0, allow_inf_nan=False)
    conformal_set: list[str] | None = None
    confidence_level: Probability | None = None


class AlarmPromise(BaseModel):
    """A threshold that misses at most 1 - `sensitivity` of the lesions to be found, and its price in other lesions."""

    sensitivity: Probability
    threshold: Probability
    benign_flagged: Probability | None = None


class MelanomaSuspicion(BaseModel):
    """The probability of melanoma among the eight diagnoses, and the promises of its alarm."""

    melanoma: Probability
    promises: list[AlarmPromise] = []


class AnswerSuspicion(BaseModel):
    """The share of the malignant classes among the eight diagnoses, and the promises of the alarms."""

    malignant: Probability
    promises: list[AlarmPromise] = []
    sensitivity: Probability | None = None  # the model server's default
    melanoma: MelanomaSuspicion | None = None


class HeatGrid(BaseModel):
    """Grad-CAM of class `target`: rows of values in [0, 1] that cover the whole upright picture."""

    target: str
    grid: list[list[Probability]] = Field(min_length=1, max_length=LARGEST_GRID)

    @field_validator("grid")
    @classmethod
    def _is_rectangle(cls, grid: list[list[float]]) -> list[list[float]]:
        if not 1 <= len(grid[0]) <= LARGEST_GRID or any(len(row) != len(grid[0]) for row in grid):
            raise ValueError("The rows of the grid differ in length.")
        return grid


class ReadImage(BaseModel):
    """The picture as the model server read it: a small JPEG, and in plain words what was converted."""

    picture_jpeg: Base64Bytes = b""
    converted: list[Annotated[str, Field(max_length=200)]] = []


class Answer(BaseModel):
    """TorchServe's answer for one picture."""

    schema_: Literal[1] = Field(alias="schema")
    model: ServedModel
    probabilities: dict[str, Probability] = Field(min_length=2)
    classes: dict[str, ExplainedClass]
    suspicion: AnswerSuspicion | None = None
    uncertainty: AnswerUncertainty
    gradcam: HeatGrid
    metadata: dict[str, float | str | None] = {}
    image: ReadImage = ReadImage()
    disclaimer: str
    _received: datetime = PrivateAttr(default_factory=lambda: datetime.now(UTC))

    @model_validator(mode="after")
    def _explains_its_codes(self) -> "Answer":
        if missing := {*self.probabilities, self.gradcam.target} - set(self.classes):
            raise ValueError(f"No explanation of {', '.join(sorted(missing))}.")
        return self

    @property
    def received(self) -> datetime:
        """The time at which the page received the answer, UTC."""
        return self._received

    @property
    def ranking(self) -> list[str]:
        """Class codes, the most probable first."""
        return sorted(self.probabilities, key=self.probabilities.__getitem__, reverse=True)

    @property
    def malignancy(self) -> float:
        """The sum of the probabilities of all malignant classes."""
        return sum(p for code, p in self.probabilities.items() if self.classes[code].malignant)

    def promise(self, sensitivity: float | None) -> AlarmPromise | None:
        """Return the alarm's promise of this sensitivity, or else the model server's default; None without promises."""
        if self.suspicion is None:
            return None
        promises = {promise.sensitivity: promise for promise in self.suspicion.promises}
        return promises.get(sensitivity or -1.0) or promises.get(self.suspicion.sensitivity or -1.0)

    def is_flagged(self, sensitivity: float | None) -> bool | None:
        """Return whether the alarm flags the picture; None without promises."""
        promise = self.promise(sensitivity)
        return None if promise is None or self.suspicion is None else self.suspicion.malignant >= promise.threshold

    def kind(self, code: str) -> ClassKind:
        """Return the kind of a class, which decides its colour and its tag."""
        if code == UNKNOWN:
            return "unknown"
        return "malignant" if self.classes[code].malignant else "other"


class RefusedVersion(BaseModel):
    """A version that the promoter did not deploy. `final` is False while the promoter retries."""

    version: str
    reason: str
    final: bool = True


class ReplicaState(BaseModel):
    """One of several TorchServes; `version` is None while it does not answer."""

    name: str
    version: str | None = None


class PromoterState(BaseModel):
    """The promoter's status: the version in the registry, the version that serves, and what went wrong."""

    settled: bool
    champion: str | None = Field(None, validation_alias=AliasPath("desired", "champion", "version"))
    serving: str | None = Field(None, validation_alias=AliasPath("actual", "serving", "version"))
    errors: list[str] = []
    refused: list[RefusedVersion] = []
    replicas: list[ReplicaState] = []
