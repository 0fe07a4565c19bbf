"""How good are the candidate's answers to the frozen evaluation set?

They are judged as they are served: nine probabilities, the most probable class is the answer, and a known lesion that
is called unknown is wrong. Intervals resample lesions, as pictures of one lesion are not independent.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from handlers.taxonomy import CODES, UNKNOWN
from mlflow_tracking import metrics
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import NO_CHAMPION, Candidate, SetGate, Verdict

MELANOMA, UNK = CODES.index("MEL"), CODES.index(UNKNOWN)


class BalancedAccuracy(SetGate):
    """Balanced accuracy is not inferior to the champion's.

    The lower end of the one-sided 95 % interval of the difference, from a paired bootstrap over lesions, must lie above
    `-margin` (a test of non-inferiority; the resampling is the cluster bootstrap, Davison & Hinkley 1997, section 3.8).
    """

    name: ClassVar[str] = "balanced accuracy"

    margin: float = Field(0.02, ge=0, le=1)
    resamples: int = Field(2000, ge=100)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """`not evaluated` without a champion to compare with."""
        ours = metrics.balanced_accuracy(evaluation.labels, candidate.answers.probabilities)
        if candidate.champion is None or candidate.champion_answers is None:
            return self.skips(f"it is {ours:.3f}, and {NO_CHAMPION}", candidate=ours)
        theirs = metrics.balanced_accuracy(evaluation.labels, candidate.champion_answers.probabilities)
        lower = lower_difference(evaluation, candidate.answers.top, candidate.champion_answers.top, self.resamples)
        reason = (
            f"{ours:.3f}, version {candidate.champion.version} has {theirs:.3f}; the difference is at least "
            f"{lower:+.3f} (95 %, {len(evaluation)} pictures), and may be {-self.margin:+.3f}"
        )
        figures = {"candidate": ours, "champion": theirs, "lower_difference_95": lower, "margin": self.margin}
        return self.holds(lower > -self.margin, reason, **figures)


class MelanomaSensitivity(SetGate):
    """Of the melanomas at least the share `floor` is called melanoma first of all."""

    name: ClassVar[str] = "melanoma sensitivity"

    floor: float = Field(0.5, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """`not evaluated` on fewer than `images` melanomas."""
        melanomas = evaluation.labels == MELANOMA
        if (number := int(melanomas.sum())) < self.images:
            return self.skips(f"the set holds {number} melanomas, and {self.images} are needed")
        found = float((candidate.answers.top[melanomas] == MELANOMA).mean())
        reason = f"{found:.3f} of {number} melanomas are called so; the floor is {self.floor:g}"
        return self.holds(found >= self.floor, reason, sensitivity=found, melanomas=number, floor=self.floor)


class CalibrationError(SetGate):
    """The probabilities mean what they say: expected calibration error (15 bins) of the served nine is low enough."""

    name: ClassVar[str] = "calibration"

    ceiling: float = Field(0.1, gt=0, le=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """See mlflow_tracking.metrics.expected_calibration_error."""
        error = metrics.expected_calibration_error(evaluation.labels, candidate.answers.probabilities)
        reason = f"the expected calibration error is {error:.3f}; the ceiling is {self.ceiling:g}"
        return self.holds(error <= self.ceiling, reason, error=error, ceiling=self.ceiling)


class UnknownDetection(SetGate):
    """Pictures of no known class get a higher probability of UNK than the others: its area under the ROC curve."""

    name: ClassVar[str] = "unknown detection"

    floor: float = Field(0.6, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """`not evaluated` on fewer than `images` pictures of UNK, or on nothing else."""
        number = int((evaluation.labels == UNK).sum())
        if number < self.images or number == len(evaluation):
            return self.skips(f"the set holds {number} pictures of UNK, and {self.images} beside others are needed")
        area = float(metrics.aucs(evaluation.labels, candidate.answers.probabilities)[UNK])
        reason = f"the AUC of UNK is {area:.3f} over {number} pictures; the floor is {self.floor:g}"
        return self.holds(area >= self.floor, reason, auc=area, images=number, floor=self.floor)


class MalignantCalls(SetGate):
    """Of the pictures of no known class at most the share `ceiling` is called malignant first of all."""

    name: ClassVar[str] = "malignant calls"

    ceiling: float = Field(0.5, ge=0, le=1)
    images: int = Field(20, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """`not evaluated` on fewer than `images` pictures of UNK."""
        unknown = evaluation.labels == UNK
        if (number := int(unknown.sum())) < self.images:
            return self.skips(f"the set holds {number} pictures of UNK, and {self.images} are needed")
        share = float(candidate.answers.malignant[unknown].mean())
        reason = f"{share:.3f} of {number} pictures of UNK are called malignant; the ceiling is {self.ceiling:g}"
        return self.holds(share <= self.ceiling, reason, share=share, images=number, ceiling=self.ceiling)


def lower_difference(
    evaluation: EvaluationSet, ours: NDArray[np.int64], theirs: NDArray[np.int64], resamples: int
) -> float:
    """The 5 % quantile of (our balanced accuracy - theirs) when lesions are drawn with replacement.

    Args:
        ours, theirs: predicted classes (N,), indices into CODES.
    """
    lesions = int(evaluation.lesions.max()) + 1
    total = _count(evaluation, np.ones(len(evaluation)), lesions)
    right = [_count(evaluation, answers == evaluation.labels, lesions) for answers in (ours, theirs)]
    # How often each lesion is drawn, (resamples, lesions): counts add up, so no picture is touched again.
    drawn = np.random.default_rng(0).multinomial(lesions, np.full(lesions, 1 / lesions), size=resamples)
    with np.errstate(invalid="ignore"):
        ours_drawn, theirs_drawn = (np.nanmean((drawn @ one) / (drawn @ total), axis=1) for one in right)
    return float(np.quantile(ours_drawn - theirs_drawn, 0.05))


def _count(evaluation: EvaluationSet, values: NDArray[np.generic], lesions: int) -> NDArray[np.float64]:
    """The sum of `values` (N,) by lesion and true class: (lesions, 9)."""
    table = np.zeros((lesions, len(CODES)))
    np.add.at(table, (evaluation.lesions, evaluation.labels), values.astype(float))
    return table
