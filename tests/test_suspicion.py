"""The alarm: thresholds that keep a promised sensitivity, and the answer that people read."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.calibration import Calibration
from handlers.predictor import Predictor
from handlers.request import Request, RequestError
from handlers.suspicion import Alarm, Promise, Suspicion
from tests.models import tiny_bundle
from training.evaluation.calibration_fit import fit_calibration
from training.evaluation.figures import operating_figure
from training.evaluation.suspicion_fit import SENSITIVITIES, fit_alarm, risk_threshold
from training.evaluation.suspicion_report import suspicion_report

CLASSES = ("MEL", "NV", "BCC")


def lesions_and_shares(n, rng, images=3):
    """Return shares of images of n lesions, which resemble each other, and their lesions."""
    lesions = np.repeat(np.arange(n), rng.integers(1, images + 1, n))
    return 1 / (1 + np.exp(-(rng.normal(1, 1, n)[lesions] + rng.normal(0, 0.5, len(lesions))))), lesions


def missed(shares, lesions, threshold):
    return np.mean([np.mean(shares[lesions == lesion] < threshold) for lesion in np.unique(lesions)])


@pytest.mark.parametrize("risk", [0.05, 0.1, 0.2])
def test_a_new_lesion_is_missed_no_more_often_than_promised(risk):
    """The expectation over calibration sets and new lesions is at most the risk, and not far below it."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(300):
        threshold = risk_threshold(*lesions_and_shares(80, rng), risk)
        rates.append(missed(*lesions_and_shares(200, rng), threshold))
    assert risk - 0.03 < np.mean(rates) < risk + 2 * np.std(rates) / np.sqrt(len(rates))


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.5), st.integers(0, 1000))
def test_the_threshold_is_the_highest_that_the_calibration_lesions_allow(n, risk, seed):
    shares, lesions = lesions_and_shares(n, np.random.default_rng(seed))
    threshold = risk_threshold(shares, lesions, risk)
    if 1 / (n + 1) > risk:
        assert threshold is None
        return
    bound = ((n + 1) * risk - 1) / n
    assert missed(shares, lesions, threshold) <= bound + 1e-9
    higher = shares[shares > threshold]
    if len(higher):
        assert missed(shares, lesions, higher.min()) > bound + 1e-9


def sample(n, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return rng.normal(size=(n, 3)) + (2 - shift) * np.eye(3)[labels], labels


def test_each_source_keeps_the_promise():
    (easy, y), (hard, z) = sample(600, 1), sample(600, 2, shift=1.0)
    logits, labels, sources = np.concatenate([easy, hard]), np.concatenate([y, z]), np.repeat(["a", "b"], 600)
    both = fit_calibration(logits, labels, CLASSES, sources=sources).malignant
    hard_alone = fit_calibration(hard, z, CLASSES).malignant
    assert both.sensitivities == SENSITIVITIES
    promise = both.promise(0.9)
    probabilities = fit_calibration(logits, labels, CLASSES).known_probabilities(hard)
    share = both.share(probabilities, CLASSES)
    assert np.mean(share[z != 1] < promise.threshold) <= 0.1
    assert promise.benign_flagged < hard_alone.promise(0.9).benign_flagged
    costs = [promise.benign_flagged for promise in both.promises]
    assert costs == sorted(costs)


def test_a_source_with_few_lesions_neither_lowers_thresholds_nor_breaks_their_order():
    logits, labels = sample(1200, 5)
    sources = np.where(np.arange(1200) < 20, "small", "large")
    logits[:20] = 3 * np.eye(3)[1]  # every lesion of the small source looks benign
    alarm = fit_calibration(logits, labels, CLASSES, sources=sources).malignant
    alone = fit_calibration(logits, labels, CLASSES).malignant
    assert alarm.promise(0.9).threshold == pytest.approx(alone.promise(0.9).threshold, rel=0.2)
    thresholds = [promise.threshold for promise in alarm.promises]
    assert thresholds == sorted(thresholds, reverse=True)


def test_promises_need_enough_lesions():
    labels = np.where(np.arange(200) < 12, 0, 1)  # 12 melanomas: 1 / 13 > 0.05
    alarm = fit_alarm([np.eye(3)[labels]], labels, CLASSES, ("MEL",), np.arange(200))
    assert alarm.lesions == 12
    assert alarm.sensitivities == (0.8, 0.85, 0.9)
    assert fit_alarm([np.eye(3)[labels]], labels, CLASSES, ("BCC",), np.arange(200)).promises == ()


def test_the_bundle_keeps_the_alarms():
    logits, labels = sample(400)
    calibration = fit_calibration(logits, labels, CLASSES)
    assert calibration.melanoma.codes == ("MEL",)
    assert Calibration.from_dict(asdict(calibration)) == calibration


def test_without_a_choice_the_promise_is_nine_in_ten_or_the_highest():
    promises = tuple(Promise(s, 0.1, 0.3) for s in (0.8, 0.85, 0.9, 0.95))
    alarm = Alarm(("MEL",), 60, promises)
    assert alarm.promise().sensitivity == 0.9
    assert alarm.promise(0.95).sensitivity == 0.95
    assert alarm.promise(0.99) is None
    assert replace(alarm, promises=promises[:2]).promise().sensitivity == 0.85
    assert Suspicion(0.05, alarm, replace(alarm, promises=()).promise()).flagged is None


def test_the_report_counts_lesions_by_source():
    """Two melanomas of three images in all: one is flagged in one of two images, the other in its only one."""
    labels = ["MEL", "MEL", "MEL", "NV", "NV", "UNK"] * 10
    lesions = [f"{name}{turn}" for turn in range(10) for name in ("a", "a", "b", "c", "d", "e")]
    rows = pd.DataFrame({"label": labels, "lesion_id": lesions, "source": "ham"})
    shares = np.array([0.9, 0.1, 0.9, 0.2, 0.6, 0.9] * 10)
    report = suspicion_report(rows, Alarm(("MEL",), 60, (Promise(0.9, 0.5, 0.2),)), shares, 200)
    figures = report["sources"]["ham"]
    assert (figures["lesions"], figures["other_lesions"]) == (20, 20)
    [promise] = figures["promises"]
    assert (promise["sensitivity"], promise["benign_flagged"]) == (0.75, 0.5)
    assert promise["sensitivity_95"][0] < 0.75 < promise["sensitivity_95"][1]
    curve = figures["curve"]
    assert (curve["sensitivity"][0], curve["benign_flagged"][0]) == (1.0, 1.0)
    assert sorted(curve["sensitivity"], reverse=True) == curve["sensitivity"]
    assert report["sources"]["all sources"] == figures
    assert len(operating_figure(report).axes[0].lines) == 5


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    bundle = tiny_bundle(tmp_path_factory.mktemp("alarm") / "bundle")
    alarm = Alarm(("MEL", "BCC", "SCC"), 60, (Promise(0.8, 0.99, 0.1), Promise(0.9, 0.0, 0.4)))
    calibration = replace(bundle.config.calibration, malignant=alarm, melanoma=Alarm(("MEL",), 3, ()))
    return Predictor(replace(bundle, config=replace(bundle.config, calibration=calibration)), runtime="torch")


def test_the_answer_says_whether_the_lesion_is_suspicious_and_at_what_price(predictor, drawn_image):
    [answer] = predictor.predict([Request(drawn_image("MEL", 1))])
    suspicion = answer.to_dict()["suspicion"]
    assert 0 <= suspicion["malignant"] <= 1
    assert {key: suspicion[key] for key in ("flagged", "threshold", "sensitivity", "benign_flagged")} == {
        "flagged": True, "threshold": 0.0, "sensitivity": 0.9, "benign_flagged": 0.4
    }  # fmt: skip
    assert [promise["sensitivity"] for promise in suspicion["promises"]] == [0.8, 0.9]
    assert suspicion["melanoma"] == {
        "melanoma": suspicion["melanoma"]["melanoma"],
        "flagged": None, "threshold": None, "sensitivity": None, "benign_flagged": None, "promises": [],
    }  # fmt: skip


def test_another_promise_can_be_chosen_and_unknown_ones_are_refused(predictor, drawn_image):
    image = drawn_image("MEL", 1)
    low, wrong = predictor.predict([Request(image, sensitivity=0.8), Request(image, sensitivity=0.93)])
    assert low.to_dict()["suspicion"]["threshold"] == 0.99
    assert isinstance(wrong, RequestError)
    assert "0.8, 0.9" in str(wrong)


def test_a_model_without_alarm_answers_without_suspicion(tmp_path, drawn_image):
    bundle = tiny_bundle(tmp_path / "bundle")
    calibration = replace(bundle.config.calibration, malignant=None)
    plain = Predictor(replace(bundle, config=replace(bundle.config, calibration=calibration)), runtime="torch")
    answer, refused = plain.predict([Request(drawn_image("NV", 1)), Request(drawn_image("NV", 1), sensitivity=0.9)])
    assert answer.to_dict()["suspicion"] is None
    assert "promises no sensitivity" in str(refused)
