"""Quality gates: figures of merit on the frozen evaluation set.

Answers are judged as served: the most probable of the nine classes counts, so a known lesion that is called unknown is
wrong. Intervals resample lesions, because pictures of one lesion are not independent.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from handlers.taxonomy import CODES, UNKNOWN
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, SetGate, Verdict

MELANOMA, UNK = CODES.index("MEL"), CODES.index(UNKNOWN)


class BalancedAccuracyGate(SetGate):
    """Balanced accuracy is not inferior to the champion's.

    A test of non-inferiority: the lower end of the one-sided 95 % interval of the difference must exceed `-margin`. The
    interval is a paired cluster bootstrap over lesions (Davison & Hinkley 1997, section 3.8).
    """

    name: ClassVar[str] = "balanced accuracy"

    margin: float = Field(0.02, ge=0, le=1)
    resamples: int = Field(2000, ge=100)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare with the champion; `not evaluated` without one."""
        ours = metrics.balanced_accuracy(evaluation.labels, candidate.answers.probabilities)
        if candidate.champion is None or candidate.champion_answers is None:
            return self.skipped(f"It is {ours:.3f}, and no other version serves yet to compare with.", candidate=ours)
        theirs = metrics.balanced_accuracy(evaluation.labels, candidate.champion_answers.probabilities)
        lower = lower_difference(evaluation, candidate.answers.top, candidate.champion_answers.top, self.resamples)
        reason = (
            f"It is {ours:.3f}, and version {candidate.champion.version} has {theirs:.3f}. The difference is at least "
            f"{lower:+.3f} (95 %, {len(evaluation)} pictures) and must exceed {-self.margin:+.3f}."
        )
        figures = {"candidate": ours, "champion": theirs, "lower_difference_95": lower, "margin": self.margin}
        return self.verdict(lower > -self.margin, reason, **figures)


class MelanomaSensitivityGate(SetGate):
    """At least the share `floor` of the melanomas is called melanoma."""

    name: ClassVar[str] = "melanoma sensitivity"

    floor: float = Field(0.5, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare recall with the floor; `not evaluated` on fewer than `images` melanomas."""
        melanomas = evaluation.labels == MELANOMA
        if (number := int(melanomas.sum())) < self.images:
            return self.skipped(f"The set has {number} melanomas; at least {self.images} are needed.")
        recall = float((candidate.answers.top[melanomas] == MELANOMA).mean())
        reason = f"{recall:.3f} of {number} melanomas are called melanoma; the floor is {self.floor:g}."
        return self.verdict(recall >= self.floor, reason, sensitivity=recall, melanomas=number, floor=self.floor)


class AlarmGate(SetGate):
    """The bundle's alarm keeps its promised sensitivity on the set, and does not flag too many other lesions.

    The promise is kept if it lies below the upper end of the one-sided 95 % interval of the sensitivity, a bootstrap
    over lesions.
    """

    name: ClassVar[str] = "alarm"

    ceiling: float = Field(0.6, ge=0, le=1)
    lesions: int = Field(20, ge=1)
    resamples: int = Field(2000, ge=100)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare with promise and ceiling; `not evaluated` without a promise or enough lesions to be found."""
        alarm = candidate.bundle.config.calibration.malignant
        promise = alarm.promise() if alarm else None
        if alarm is None or promise is None:
            return self.skipped("The bundle promises no sensitivity.")
        nine = candidate.answers.probabilities
        eight = nine[:, :UNK] / np.maximum(1 - nine[:, [UNK]], 1e-9)  # UNK takes no part in the alarm
        flagged = alarm.share(eight, CODES[:UNK]) >= promise.threshold
        positive = np.isin(evaluation.labels, [CODES.index(code) for code in alarm.codes])
        others = ~positive & (evaluation.labels != UNK)
        kept, price = (metrics.group_means(flagged[rows], evaluation.lesions[rows]) for rows in (positive, others))
        if len(kept) < self.lesions or not len(price):
            return self.skipped(
                f"The set has {len(kept)} lesions of {', '.join(alarm.codes)} and {len(price)} others; it needs "
                f"{self.lesions} of the first and one other."
            )
        upper = float(np.quantile(metrics.bootstrap_means(kept, self.resamples), 0.95))
        sensitivity, cost = float(kept.mean()), float(price.mean())
        reason = (
            f"It flags {sensitivity:.3f} of {len(kept)} malignant lesions (at most {upper:.3f}, 95 %) and promises "
            f"{promise.sensitivity:g}. It flags {cost:.3f} of the others; the ceiling is {self.ceiling:g}."
        )
        figures = {"sensitivity": sensitivity, "upper_95": upper, "promise": promise.sensitivity}
        passed = upper >= promise.sensitivity and cost <= self.ceiling
        return self.verdict(passed, reason, **figures, benign_flagged=cost, ceiling=self.ceiling)


class CalibrationGate(SetGate):
    """The expected calibration error (15 bins) of the served probabilities is within the ceiling."""

    name: ClassVar[str] = "calibration"

    ceiling: float = Field(0.1, gt=0, le=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare mlflow_tracking.classification_metrics.expected_calibration_error with the ceiling."""
        error = metrics.expected_calibration_error(evaluation.labels, candidate.answers.probabilities)
        reason = f"The expected calibration error is {error:.3f}; the ceiling is {self.ceiling:g}."
        return self.verdict(error <= self.ceiling, reason, error=error, ceiling=self.ceiling)


class UnknownDetectionGate(SetGate):
    """The probability of UNK separates pictures of no known class from the others: area under the ROC curve."""

    name: ClassVar[str] = "unknown detection"

    floor: float = Field(0.6, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare the area with the floor; `not evaluated` on fewer than `images` pictures of UNK, or on UNK only."""
        number = int((evaluation.labels == UNK).sum())
        if number < self.images or number == len(evaluation):
            return self.skipped(
                f"The set has {number} pictures of UNK; it needs at least {self.images}, and pictures of other classes."
            )
        area = float(metrics.aucs(evaluation.labels, candidate.answers.probabilities)[UNK])
        reason = f"The AUC of UNK is {area:.3f} over {number} pictures; the floor is {self.floor:g}."
        return self.verdict(area >= self.floor, reason, auc=area, images=number, floor=self.floor)


class MalignantCallsGate(SetGate):
    """At most the share `ceiling` of the pictures of no known class is called malignant."""

    name: ClassVar[str] = "malignant calls"

    ceiling: float = Field(0.5, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare the share with the ceiling; `not evaluated` on fewer than `images` pictures of UNK."""
        unknown = evaluation.labels == UNK
        if (number := int(unknown.sum())) < self.images:
            return self.skipped(f"The set has {number} pictures of UNK; at least {self.images} are needed.")
        share = float(candidate.answers.malignant[unknown].mean())
        reason = f"{share:.3f} of {number} pictures of UNK are called malignant; the ceiling is {self.ceiling:g}."
        return self.verdict(share <= self.ceiling, reason, share=share, images=number, ceiling=self.ceiling)


def lower_difference(
    evaluation: EvaluationSet, ours: NDArray[np.int64], theirs: NDArray[np.int64], resamples: int
) -> float:
    """Return the 5 % quantile of (our balanced accuracy - theirs) when lesions are drawn with replacement.

    Args:
        ours, theirs: predicted classes (N,), indices into CODES.
    """
    lesions = int(evaluation.lesions.max()) + 1

    def counts(selected: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Count pictures by lesion and true class: (lesions, 9)."""
        table = np.zeros((lesions, len(CODES)))
        np.add.at(table, (evaluation.lesions, evaluation.labels), selected.astype(float))
        return table

    total = counts(np.ones(len(evaluation), bool))
    right = [counts(answers == evaluation.labels) for answers in (ours, theirs)]
    # Counts add up, so a resampling only needs how often each lesion is drawn: (resamples, lesions).
    drawn = np.random.default_rng(0).multinomial(lesions, np.full(lesions, 1 / lesions), size=resamples)
    with np.errstate(invalid="ignore"):
        ours_drawn, theirs_drawn = (np.nanmean((drawn @ table) / (drawn @ total), axis=1) for table in right)
    return float(np.quantile(ours_drawn - theirs_drawn, 0.05))
