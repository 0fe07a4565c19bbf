"""The gates.

- a good candidate passes all gates with the limits of the shipped gates.yaml;
- each gate has a candidate that fails it and no other gate;
- a gate that lacks something says so.
"""

import io
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from handlers.bundle import WEIGHTS, Bundle
from handlers.errors import ImageError
from handlers.metadata import Metadata
from handlers.predictor import Predictor
from handlers.taxonomy import CODES
from mlflow_tracking.classification_metrics import balanced_accuracy
from mlflow_tracking.promotion.answers import Answers
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates import identity, robustness
from mlflow_tracking.promotion.gates.base import Outcome
from mlflow_tracking.promotion.gates.judge import GATES, Judgement
from mlflow_tracking.promotion.gates.quality import lower_difference
from mlflow_tracking.torchserve_client import TorchServeError
from tests.gates_world import SIGNATURE, answer, receipt, resealed
from tests.models import tiny_bundle

pytest_plugins = ["tests.fixtures_gates"]


def failed(judgement: Judgement) -> set[str]:
    return {verdict.gate for verdict in judgement.verdicts if verdict.outcome is Outcome.FAILED}


def test_a_good_candidate_passes_all(case):
    judgement = case.judgement()
    assert [(verdict.gate, verdict.reason) for verdict in judgement.verdicts if not verdict.passed] == []
    assert judgement.passed
    assert judgement.outcome == "passed"
    assert judgement.comparison["agreement"] == 1.0


# Each fault fails one gate. Where a gate has an absolute limit, champion and candidate get the same fault, because the
# candidate would otherwise be inferior to the champion as well.


def other_digest(case):
    case.candidate.registered_digest = "sha256:" + "0" * 64


def other_signature(case):
    case.candidate.signature = (SIGNATURE[0], tuple(reversed(SIGNATURE[1])))


def no_signature(case):
    case.candidate.signature = None


def wrong_answers(case):
    case.server.golden_shift = 0.002


def answers_without_a_number(case):
    case.server.golden_shift = float("nan")


def other_model_answers(case):
    case.server.digests["2"] = "sha256:" + "0" * 64


def other_pixels(case):
    cases = [
        {"name": golden.name, "probabilities": golden.probabilities, "grid": golden.grid}
        | {"colours": (np.array(golden.colours) + 2).tolist()}
        for golden in case.candidate.bundle.golden()
    ]
    case.use(resealed(case.candidate.bundle, case.folder, golden=cases))


def seen_in_training(case):
    digest = case.candidate.evaluation.frame["sha256"][5]
    case.use(resealed(case.candidate.bundle, case.folder, receipt=receipt(digest).to_dict()))


def slow(case):
    case.limit("latency", p95_milliseconds=20)
    case.server.seconds = 0.03
    case.candidate.evaluation, case.candidate.champion = None, None  # a slow answer to every picture proves no more


def inferior(case):
    case.server.models["2"] = {"AK": answer(BKL=0.97)}


def blind_to_melanoma(case):
    case.server.models = {version: {"MEL": answer(MEL=0.3, NV=0.6)} for version in "12"}


def silent_alarm(case):
    """Melanoma is first, but the share of malignant classes stays below the alarm's threshold of 0.3."""
    case.server.models["2"] = {"MEL": answer(MEL=0.27, NV=0.26, BKL=0.25, DF=0.17, BCC=0.005, SCC=0.005)}


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
    answers_without_a_number: "golden parity",
    other_model_answers: "golden parity",
    other_pixels: "preprocessing",
    seen_in_training: "leakage",
    slow: "latency",
    inferior: "balanced accuracy",
    blind_to_melanoma: "melanoma sensitivity",
    silent_alarm: "alarm",
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
    case.judge().keep(judgement)
    assert case.judge().kept(judgement.question) == judgement, "any figure can be kept as JSON"


def test_a_model_that_takes_metadata_is_asked_with_and_without(case, tmp_path):
    case.use(tiny_bundle(tmp_path / "takes", metadata=Metadata.of(["age", "sex"]), receipt=receipt("f" * 64)))
    verdict = case.judgement().verdicts[0]
    assert "which takes image, age, sex and returns nine probabilities" in verdict.reason
    inputs = (("image", "binary"), ("age", "double"), ("sex", "string"))
    case.candidate.signature = (inputs, SIGNATURE[1])
    assert failed(case.judgement()) == set()
    case.server.deaf = True
    assert failed(case.judgement()) == {"golden parity"}


@pytest.mark.parametrize("at", [0, 3, 8])
def test_nan_in_an_answer_makes_the_difference_nan(bundle, at):
    expected = bundle.golden()[0]
    assert np.isnan(expected.difference(expected.probabilities | {CODES[at]: float("nan")}))


def test_a_refused_golden_picture_is_no_answer(bundle, monkeypatch):
    good, other = bundle.golden()[:2]
    predictor = Predictor(bundle)
    monkeypatch.setattr(Bundle, "golden", lambda self: [good, replace(other, image=b"no image")])
    with pytest.raises(ImageError):
        predictor.golden_difference()


def test_a_checkpoint_of_another_model_fails_golden_parity(case, tmp_path, monkeypatch, capsys):
    gate = case.limit("golden parity", checkpoint=True)
    verdict = gate.evaluate(case.candidate)
    assert verdict.passed and set(verdict.figures) >= {"checkpoint", "graph"}
    weights = (tiny_bundle(tmp_path / "other", seed=1, graph=False).path / WEIGHTS).read_bytes()
    case.use(resealed(case.candidate.bundle, case.folder, model=weights))
    # In this process, as starting another one and importing torch takes seconds.

    def here(command, **_):
        capsys.readouterr()
        return subprocess.CompletedProcess(command, identity._main(command[-1]), capsys.readouterr().out)

    monkeypatch.setattr(identity.subprocess, "run", here)
    verdict = gate.evaluate(case.candidate)
    assert verdict.outcome is Outcome.FAILED
    assert "Its checkpoint differs from a golden answer by" in verdict.reason


def test_a_worker_that_dies_over_golden_pictures_costs_the_candidate_nothing(case, monkeypatch):
    monkeypatch.setattr("mlflow_tracking.torchserve_client.RETRY_WAITS", (0.0, 0.0))
    gate = case.gates["golden parity"]
    case.server.fail = [507, 500]
    assert gate.evaluate(case.candidate).passed
    case.server.fail = [503] * 3
    with pytest.raises(TorchServeError):
        gate.evaluate(case.candidate)
    case.server.fail = [400]  # from the handler
    assert gate.evaluate(case.candidate).outcome is Outcome.FAILED


def test_large_pictures_are_changed_at_a_smaller_size(case, monkeypatch):
    """As PNG in full size they would exceed TorchServe's limit, and no version could be judged."""
    sizes = []

    def predict(image, version, metadata=None, recorded=True):
        sizes.append(len(image))
        return {"model": {"digest": case.server.digests[version]}, "probabilities": answer(NV=0.97)}

    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=30)
    monkeypatch.setattr(EvaluationSet, "images", lambda self, positions: [buffer.getvalue()] * len(positions))
    monkeypatch.setattr(robustness, "metadata_of", lambda *arguments: [{}])
    monkeypatch.setattr(case.server, "predict", predict)
    monkeypatch.setattr(type(case.candidate), "answers", Answers(np.eye(9)[[1]], np.ones(1)))
    assert case.limit("stress", images=1).evaluate(case.candidate).passed
    assert len(sizes) == 4
    assert max(sizes) < 4e6


def no_melanomas(case):
    frame = case.candidate.evaluation.frame.query("label != 'MEL'").reset_index(drop=True)
    case.candidate.evaluation = replace(case.candidate.evaluation, frame=frame)


def no_champion(case):
    case.candidate.champion = None


def no_promise(case):
    config = case.candidate.bundle.config
    config = replace(config, calibration=replace(config.calibration, malignant=None))
    case.candidate.bundle = replace(case.candidate.bundle, config=config)


LACKS = [
    (no_promise, "alarm", "The bundle promises no sensitivity."),
    (no_melanomas, "melanoma sensitivity", "The set has 0 melanomas; at least 20 are needed."),
    (no_champion, "balanced accuracy", "It is 1.000, and no other version serves yet to compare with."),
]


@pytest.mark.parametrize(("remove", "gate", "reason"), LACKS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_gate_says_what_it_lacks(case, remove, gate, reason):
    remove(case)
    verdict = case.gates[gate].evaluate(case.candidate)
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_EVALUATED, reason)


def test_the_interval_is_that_of_a_plain_bootstrap_over_lesions(evaluation):
    """Against a loop that draws lesions and computes both balanced accuracies each time."""
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
    assert lower_difference(evaluation, ours, theirs, 2000) == pytest.approx(np.quantile(differences, 0.05), abs=0.02)
    assert lower_difference(evaluation, ours, ours, 200) == 0.0, "a model is not inferior to itself"
