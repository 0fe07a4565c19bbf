"""The gates: each asks one question, and each has a candidate here that fails it and no other.

A good candidate passes all of them, with the limits of the gates.yaml that is shipped; a gate that lacks what it needs
says so.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from handlers.bundle import WEIGHTS, Bundle
from handlers.errors import ImageError
from handlers.metadata import Metadata
from handlers.predictor import Predictor
from handlers.taxonomy import CODES
from mlflow_tracking.metrics import balanced_accuracy
from mlflow_tracking.promotion.answers import Answers
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates import behaviour
from mlflow_tracking.promotion.gates.base import Outcome
from mlflow_tracking.promotion.gates.judge import GATES, Judgement, load_gates
from mlflow_tracking.promotion.gates.quality import lower_difference
from mlflow_tracking.promotion.torchserve_client import TorchServeError
from tests.gates_world import SETTINGS, SIGNATURE, answer, receipt, resealed
from tests.models import tiny_bundle

pytest_plugins = ["tests.fixtures_gates"]


def failed(judgement: Judgement) -> set[str]:
    return {verdict.gate for verdict in judgement.verdicts if verdict.outcome is Outcome.FAILED}


def test_a_good_candidate_passes_all(case):
    judgement = case.judgement()
    assert [(one.gate, one.outcome, one.reason) for one in judgement.verdicts if not one.passed] == []
    assert judgement.passed
    assert judgement.word == "passed"
    assert judgement.comparison["agreement"] == 1.0


# What is wrong with a candidate -> the one gate that must see it. Both versions get what only the set's own limits
# shall judge, or it would be inferior to the champion as well.


def other_digest(case):
    case.candidate.registered_digest = "sha256:" + "0" * 64


def other_signature(case):
    case.candidate.signature = (SIGNATURE[0], tuple(reversed(SIGNATURE[1])))


def no_signature(case):
    case.candidate.signature = None


def wrong_answers(case):
    case.server.golden_shift = 0.002


def other_model_answers(case):
    case.server.digests["2"] = "sha256:" + "0" * 64


def other_pixels(case):
    cases = [{"name": one.name, "probabilities": one.probabilities, "grid": one.grid} |
             {"colours": (np.array(one.colours) + 2).tolist()} for one in case.candidate.bundle.golden()]  # fmt: skip
    case.use(resealed(case.candidate.bundle, case.folder, golden=cases))


def seen_in_training(case):
    digest = case.candidate.evaluation.frame["sha256"][5]
    case.use(resealed(case.candidate.bundle, case.folder, receipt=receipt(digest).to_dict()))


def slow(case):
    case.gates["latency"] = case.gates["latency"].model_copy(update={"p95_milliseconds": 20})
    case.server.seconds = 0.03
    # Asking the whole set that slowly proves nothing more.
    case.candidate.evaluation, case.candidate.champion = None, None


def inferior(case):
    case.server.models["2"] = {"AK": answer(BKL=0.97)}


def blind_to_melanoma(case):
    case.server.models = {version: {"MEL": answer(MEL=0.3, NV=0.6)} for version in "12"}


def unsure(case):
    case.server.models["2"] = {code: answer(**{code: 0.4}) for code in CODES}


def knows_all(case):
    case.server.models = {version: {"UNK": answer(NV=0.6, UNK=0.0)} for version in "12"}


def cries_wolf(case):
    case.server.models = {version: {"UNK": answer(MEL=0.5, UNK=0.45)} for version in "12"}


def easily_disturbed(case):
    case.server.disturbed = True


FAULTS = {
    other_digest: "digest and signature",
    other_signature: "digest and signature",
    no_signature: "digest and signature",
    wrong_answers: "golden parity",
    other_model_answers: "golden parity",
    other_pixels: "preprocessing",
    seen_in_training: "leakage",
    slow: "latency",
    inferior: "balanced accuracy",
    blind_to_melanoma: "melanoma sensitivity",
    unsure: "calibration",
    knows_all: "unknown detection",
    cries_wolf: "malignant calls",
    easily_disturbed: "stress",
}


def test_every_gate_has_a_candidate_that_fails_it():
    assert set(FAULTS.values()) == {gate.name for gate in GATES}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_one_gate_and_no_other(case, fault):
    fault(case)
    judgement = case.judgement()
    assert failed(judgement) == {FAULTS[fault]}
    assert not judgement.passed
    assert judgement.reason.startswith(FAULTS[fault])


def test_a_model_that_takes_metadata_is_asked_with_and_without(case, tmp_path):
    takes = Metadata.of(["age", "sex"])
    case.use(tiny_bundle(tmp_path / "takes", metadata=takes, receipt=receipt("f" * 64)))
    [verdict] = [one for one in case.judgement().verdicts if one.gate == "digest and signature"]
    assert verdict.reason == (
        "its signature is not one image and age and sex in, nine probabilities in taxonomy order out"
    )
    inputs = (("image", "binary"), ("age", "double"), ("sex", "string"))
    case.candidate.signature = (inputs, SIGNATURE[1])
    assert failed(case.judgement()) == set()
    case.server.deaf = True
    assert failed(case.judgement()) == {"golden parity"}


@pytest.mark.parametrize("at", [0, 3, 8])
def test_an_answer_that_is_no_number_is_not_close(case, at):
    [expected, *_] = case.candidate.bundle.golden()
    none = dict(expected.probabilities) | {CODES[at]: float("nan")}
    assert np.isnan(expected.difference(none))


def test_a_golden_answer_that_is_no_number_is_refused(case):
    case.server.golden_shift = float("nan")
    assert failed(case.judgement()) == {"golden parity"}


def test_a_golden_picture_that_is_refused_is_no_answer(bundle, monkeypatch):
    good, other = bundle.golden()[:2]
    predictor = Predictor(bundle)
    monkeypatch.setattr(Bundle, "golden", lambda own: [good, replace(other, image=b"no image")])
    with pytest.raises(ImageError):
        predictor.golden_difference()


def test_a_checkpoint_that_is_another_model_fails_golden_parity(case, tmp_path):
    weights = (tiny_bundle(tmp_path / "other", seed=1).path / WEIGHTS).read_bytes()
    gate = load_gates(SETTINGS)[1]
    assert gate.evaluate(case.candidate).passed, "the checkpoint agrees"
    case.use(resealed(case.candidate.bundle, case.folder, model=weights))
    verdict = gate.evaluate(case.candidate)
    assert verdict.outcome is Outcome.FAILED
    assert "its checkpoint gives a golden probability off by" in verdict.reason


def test_a_worker_that_dies_over_golden_pictures_costs_the_candidate_nothing(case, monkeypatch):
    monkeypatch.setattr("mlflow_tracking.promotion.answers.time.sleep", lambda seconds: None)
    gate = case.gates["golden parity"]
    case.server.fail = [507, 500]
    assert gate.evaluate(case.candidate).passed
    case.server.fail = [503] * 3
    with pytest.raises(TorchServeError):
        gate.evaluate(case.candidate)
    case.server.fail = [400]  # the handler's own word
    assert gate.evaluate(case.candidate).outcome is Outcome.FAILED


def test_large_pictures_are_changed_in_small(case, monkeypatch):
    """Their PNG would be over the server's limit, and the version could never be judged."""
    sent = []
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=30)
    monkeypatch.setattr(EvaluationSet, "images", lambda self, positions: [buffer.getvalue()] * len(positions))
    monkeypatch.setattr(behaviour, "metadata_of", lambda *given: [{}] * 2)
    monkeypatch.setattr(case.server, "predict", lambda image, version, metadata=None: sent.append(len(image)) or {
        "model": {"digest": case.server.digests[version]}, "probabilities": answer(NV=0.97)})  # fmt: skip
    gate = case.gates["stress"].model_copy(update={"images": 2})
    monkeypatch.setattr(type(case.candidate), "answers", Answers(np.eye(9)[[1, 1]], np.ones(2)))
    assert gate.evaluate(case.candidate).passed
    assert len(sent) == 8
    assert max(sent) < 4e6


@pytest.mark.parametrize("lacking", ["melanomas", "champion"])
def test_a_gate_says_what_it_lacks(case, lacking):
    gate = {"melanomas": "melanoma sensitivity", "champion": "balanced accuracy"}[lacking]
    if lacking == "melanomas":
        few = case.candidate.evaluation.frame.query("label != 'MEL'").reset_index(drop=True)
        case.candidate.evaluation = replace(case.candidate.evaluation, frame=few)
    if lacking == "champion":
        case.candidate.champion = None
    verdict = case.gates[gate].evaluate(case.candidate)
    assert verdict.outcome is Outcome.NOT_EVALUATED
    assert {"melanomas": "0 melanomas", "champion": "it is 1.000"}[lacking] in verdict.reason


def test_the_interval_is_that_of_a_plain_bootstrap_over_lesions(evaluation):
    """Against a loop that draws lesions and computes both balanced accuracies anew."""
    rng = np.random.default_rng(1)
    ours, theirs = (
        np.where(rng.random(len(evaluation)) < share, evaluation.labels, rng.integers(9, size=len(evaluation)))
        for share in (0.6, 0.7)
    )
    members = [np.flatnonzero(evaluation.lesions == lesion) for lesion in range(evaluation.lesions.max() + 1)]
    differences = []
    for _ in range(600):
        chosen = np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])
        both = [balanced_accuracy(evaluation.labels[chosen], np.eye(9)[answers[chosen]]) for answers in (ours, theirs)]
        differences.append(both[0] - both[1])
    assert lower_difference(evaluation, ours, theirs, 2000) == pytest.approx(np.quantile(differences, 0.05), abs=0.012)
    assert lower_difference(evaluation, ours, ours, 200) == 0.0, "a model is not inferior to itself"
