"""The monitor's answers, checked before the page shows them. docs/api.md describes them."""

from datetime import datetime

from pydantic import BaseModel

Share = float | None


class DriftFigures(BaseModel):
    """The evidence of drift as logarithms to base 10; None without a reference."""

    joint: float | None = None
    input: float | None = None
    output: float | None = None


class ReferenceFigures(BaseModel):
    """What is normal for a version: its figures on the calibration split."""

    unknown_share: Share = None
    flagged_share: Share = None
    mean_set_size: float | None = None


class VersionDrift(DriftFigures):
    """The drift of a version now. `statistics` has the evidence of each statistic."""

    pictures: int
    alarm_since: datetime | None
    alarm_at: float
    statistics: dict[str, float]
    reference: ReferenceFigures


class Figures(BaseModel):
    """The figures of a period; a share or a percentile of nothing is None."""

    predictions: int
    refusals: int
    errors: int
    refusals_by_code: dict[str, int]
    latency_ms: dict[str, float | None]
    classes: dict[str, Share]
    unknown_share: Share
    flagged_share: Share
    set_sizes: dict[str, int]
    drift: DriftFigures = DriftFigures()

    @property
    def mean_set_size(self) -> float | None:
        """The mean number of likely classes; None without sets."""
        sets = sum(self.set_sizes.values())
        return sum(int(size) * count for size, count in self.set_sizes.items()) / sets if sets else None


class Interval(Figures):
    """The figures of an interval that begins at `start`."""

    start: datetime


class RecorderState(BaseModel):
    """The state of the record; `reason` says why nothing is recorded."""

    recording: bool
    database_up: bool
    behind: int
    reason: str


class ServingVersion(BaseModel):
    """The version that serves."""

    version: str | None
    since: datetime


class PatientGroup(BaseModel):
    """The figures of the patients of one sex, age or site; `group` is None where it was not sent."""

    field: str
    group: str | None
    outcomes: int
    accuracy: Share
    accuracy_95: tuple[float, float] | None
    malignant: int
    malignant_missed: int
    malignant_missed_95: tuple[float, float] | None


class Realised(BaseModel):
    """The figures over predictions whose outcome is known; a figure without pictures is None."""

    outcomes: int
    accuracy: Share = None
    malignant_missed: Share = None
    intervals_95: dict[str, tuple[float, float]] = {}
    slices: list[PatientGroup] = []


class Performance(BaseModel):
    """The accuracy that the model expects of itself, and what outcomes say."""

    estimated_accuracy: Share
    estimated_interval_95: tuple[float, float] | None = None
    calibration_holds: bool = True
    realised: Realised
    realised_random: Realised = Realised(outcomes=0)


class Summary(BaseModel):
    """The figures of the last hours, or of one `version`: in total, by version, and by interval."""

    now: datetime
    since: datetime
    version: str | None
    state: RecorderState
    serving: ServingVersion | None
    total: Figures
    performance: Performance
    versions: dict[str, Figures]
    drift: dict[str, VersionDrift]
    intervals: list[Interval]

    @property
    def newest_drift(self) -> VersionDrift | None:
        """The drift of the version that serves, or else of the newest in the period; None without a reference."""
        serving = self.serving.version if self.serving else None
        if serving in self.drift:
            return self.drift[serving]
        return next(reversed(self.drift.values()), None)


class VersionEvent(BaseModel):
    """A line of the promoter's audit log."""

    at: datetime
    event: str
    by: str
    version: str = ""
    alias: str = ""
    remark: str = ""
    reason: str = ""


class VersionHistory(BaseModel):
    """What happened to the versions, oldest first."""

    events: list[VersionEvent]


class RecordedPrediction(BaseModel):
    """One of the latest predictions."""

    time: datetime
    request_id: str
    version: str
    code: str
    confidence: float
    flagged: bool | None
    milliseconds: float


class LatestPredictions(BaseModel):
    """The latest predictions, newest first."""

    predictions: list[RecordedPrediction]
