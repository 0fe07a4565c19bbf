"""A picture's age, sex and site in serving.

Graph, form and JSON give the same answer, other requests of the batch are not affected, and a model without metadata
refuses them.
"""

import base64
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from handlers.bundle import CONFIG, WEIGHTS, Bundle, BundleError, seal
from handlers.files import write_json
from handlers.graph_export import _check_golden
from handlers.metadata import FIELDS, SEXES, SITES, Metadata
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request, RequestError
from handlers.skin_lesion_handler import SkinLesionHandler
from mlflow_tracking.version_card import golden_result
from monitoring.log_lines import parse_line
from scripts import predict as predict_script
from tests.models import tiny_bundle
from tests.test_handler import FakeContext

ALL = Metadata.of(FIELDS)
VALUES = {"age": 71, "sex": "male", "site": "head/neck"}


# ---- bundle and predictor


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("metadata") / "bundle", metadata=ALL)


@pytest.fixture(scope="module")
def predictor(bundle) -> Predictor:
    return Predictor(bundle, precision="f32", version="7")


def test_the_bundle_names_its_metadata_and_has_golden_answers_with_and_without(bundle):
    assert bundle.has_graph
    assert bundle.config.metadata == ALL
    cases = bundle.golden()
    assert [not case.metadata for case in cases] == [True] * 4 + [False] * 4
    assert [case.name for case in cases[:4]] == [case.name for case in cases[4:]]
    moved = [
        case.disagreement(other.probabilities, other.grid)[0] for case, other in zip(cases[:4], cases[4:], strict=True)
    ]
    assert min(moved) > 0.01


@pytest.mark.parametrize("options", [{"runtime": "torch"}, {"runtime": "openvino", "precision": "f32"}])
def test_golden_answers_in_both_runtimes(bundle, options):
    cases = bundle.golden()
    answers = Predictor(bundle, **options).predict([Request(case.image, metadata=case.metadata) for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        probability, cam = case.disagreement(answer.probabilities, answer.grid)
        assert probability < 1e-4
        assert cam < 1e-3


def test_the_card_counts_golden_answers_with_and_without_metadata(bundle):
    cases = bundle.golden()
    assert len({case.image for case in cases}) < len(cases)
    assert golden_result(bundle).startswith(f"{len(cases)} golden answers, probabilities within ")


def test_a_graph_that_forgets_the_metadata_is_not_sealed(bundle, tmp_path):
    swapped = [dict(vars(case)) for case in bundle.golden()]
    for case in swapped:
        del case["image"]
        case["metadata"] = None
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / CONFIG).unlink()
    write_json(copy / "golden.json", swapped)
    with pytest.raises(BundleError, match="disagrees with the model"):
        _check_golden(seal(copy, bundle.config))


def test_without_metadata_the_answer_is_that_of_the_picture(predictor, tmp_path, sample_images):
    asked = [
        Request(sample_images[0], metadata=informed)
        for informed in (None, {}, {"age": ""}, dict.fromkeys(FIELDS, "unknown"), VALUES)
    ]
    *nothing, informed = predictor.predict(asked)
    # The same network without the metadata head.
    bundle = predictor.bundle
    weights = {name: t for name, t in load_file(bundle.path / WEIGHTS).items() if not name.startswith("metadata_head")}
    copy = shutil.copytree(bundle.path, tmp_path / "alone")
    (copy / CONFIG).unlink()
    save_file(weights, copy / WEIGHTS)
    config = replace(bundle.config, metadata=Metadata())
    [alone] = Predictor(seal(copy, config), runtime="torch").predict(sample_images[:1])
    assert nothing[0].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    assert alone.metadata == {}
    for answer in nothing:
        assert answer.probabilities == pytest.approx(nothing[0].probabilities, abs=1e-6)
        assert answer.metadata == dict.fromkeys(FIELDS)
    assert informed.metadata == {"age": 71.0, "sex": "male", "site": "head/neck"}
    assert max(abs(informed.probabilities[code] - p) for code, p in nothing[0].probabilities.items()) > 0.01


def test_each_request_of_a_batch_has_its_own_metadata(predictor, sample_images):
    informed = [{}, VALUES, {"age": "24"}, {"sex": "elf"}, {"sex": "female", "site": "Lower Extremity"}]
    requests = [
        Request(image, tta=place % 2 == 0, metadata=values)
        for place, (image, values) in enumerate(zip(sample_images, informed, strict=False))
    ]
    together = predictor.predict(requests)
    assert isinstance(together[3], RequestError)
    for request, answer in zip(requests, together, strict=True):
        [alone] = predictor.predict([request])
        if isinstance(answer, Prediction):
            assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
            assert answer.grid == pytest.approx(np.array(alone.grid), abs=1e-3)


def test_the_answer_names_the_metadata_taken_and_used(predictor, sample_images):
    [answer] = predictor.predict([Request(sample_images[0], metadata={"age": "55"})])
    informed = answer.to_dict()
    assert informed["metadata"] == {"age": 55.0, "sex": None, "site": None}
    assert informed["model"]["takes"] == {"age": [0, 120], "sex": list(SEXES), "site": list(SITES)}
    json.dumps(informed, allow_nan=False)


# ---- handler


@pytest.fixture(scope="module")
def ask(bundle):
    handler = SkinLesionHandler()
    handler.initialize(FakeContext(bundle.path.parent))

    def ask(*rows):
        context = FakeContext(bundle.path.parent)
        answers = [json.loads(answer) for answer in handler.handle(list(rows), context)]
        return [(context.statuses.get(index, 200), answer) for index, answer in enumerate(answers)]

    ask.handler = handler
    return ask


def test_form_and_json_give_the_same_answer(ask, sample_images):
    image = sample_images[0]
    encoded = base64.b64encode(image).decode()
    informed = {"age": bytearray(b"71"), "sex": bytearray(b"male"), "site": bytearray(b"head/neck")}
    answers = ask(
        {"data": bytearray(image), **informed},
        {"body": {"image": encoded, "age": 71, "sex": "male", "site": "head/neck"}},
        {"body": {"image": encoded, "age": "71.0", "sex": "Male", "site": " head/neck "}},
        {"body": {"image": encoded, "age": None}},
        {"body": bytearray(image)},
    )
    assert [status for status, _ in answers] == [200] * 5
    first, *others = (answer for _, answer in answers)
    assert first["metadata"] == {"age": 71.0, "sex": "male", "site": "head/neck"}
    for answer in others[:2]:
        assert answer["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    assert others[2]["probabilities"] == pytest.approx(others[3]["probabilities"], abs=1e-6)
    assert others[2]["probabilities"] != pytest.approx(first["probabilities"], abs=1e-3)


def test_the_log_has_the_values_that_were_sent(bundle, sample_images, monkeypatch, caplog):
    monkeypatch.setenv("LOG_PREDICTIONS", "1")
    handler, context = SkinLesionHandler(), FakeContext(bundle.path.parent)
    handler.initialize(context)
    with caplog.at_level("INFO"):
        handler.handle([{"data": bytearray(sample_images[0]), "age": bytearray(b"71"), "sex": bytearray(b"")}], context)
    [line] = [record.message for record in caplog.records if record.message.startswith("prediction {")]
    row = parse_line(line.removeprefix("prediction ").encode(), "")
    assert row is not None
    assert row["metadata_sent"] == {"age": 71.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"age": "old"}, "must be years from 0 to 120"),
        ({"age": -3}, "must be years from 0 to 120"),
        ({"age": float("inf")}, "must be years from 0 to 120"),
        ({"age": float("nan")}, "must be years from 0 to 120"),
        ({"age": 10**30}, "must be years from 0 to 120"),
        ({"age": 10**400}, "at most 40 characters"),
        ({"age": True}, "must be years from 0 to 120"),
        ({"age": [55]}, "'age' has the wrong type in JSON"),
        ({"sex": {"$ne": 1}}, "'sex' has the wrong type in JSON"),
        ({"site": "'; DROP TABLE"}, "must be one of anterior torso"),
        ({"site": "\u0000" * 40}, "must be one of anterior torso"),
        ({"site": "elbow" * 5000}, "at most 40 characters"),
        ({"ages": "5"}, "'ages' is not an option"),
    ],
)
def test_a_hostile_value_fails_its_own_request_only(ask, sample_images, fields, words):
    encoded = base64.b64encode(sample_images[0]).decode()
    good = {"body": {"image": encoded, "age": 50}}
    before, refused, after = ask(good, {"body": {"image": encoded, **fields}}, good)
    assert (before[0], refused[0], after[0]) == (200, 400, 200)
    assert refused[1]["error"]["code"] == "invalid_request"
    assert words in refused[1]["error"]["message"]
    assert len(refused[1]["error"]["message"]) < 350


# ---- the command line


def test_predict_sends_metadata(bundle, tmp_path, sample_images):
    (tmp_path / "lesion.jpg").write_bytes(sample_images[0])
    app = typer.Typer()
    app.command()(predict_script.main)
    args = [str(tmp_path / "lesion.jpg"), "--bundle", str(bundle.path), "--json"]
    informed = CliRunner().invoke(app, [*args, "--age", "71", "--site", "head/neck"])
    assert informed.exit_code == 0
    assert json.loads(informed.stdout)["metadata"] == {"age": 71.0, "sex": None, "site": "head/neck"}
    refused = CliRunner().invoke(app, [*args, "--sex", "x"])
    assert refused.exit_code == 1
    assert "it must be one of female, male" in json.loads(refused.stdout)["error"]["message"]
