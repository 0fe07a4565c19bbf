"""A bundle written for another runtime gives the golden answers there, and has all that an application needs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from handlers.bundle import Bundle
from handlers.predictor import Predictor
from handlers.taxonomy import CODES
from scripts import export_model
from scripts.export_model import ExportError, Format, golden_inputs, main
from tests.models import known_space, tiny_bundle

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "model_store" / "skin_vit"


@pytest.fixture(params=["tiny", pytest.param("shipped", marks=pytest.mark.slow)])  # the same code, in 15 s
def source(request, tmp_path) -> Path:
    """A bundle with every part of the ninth class: outlier logit and residual."""
    if request.param == "shipped":
        return SHIPPED
    return tiny_bundle(tmp_path / "bundle", classes=CODES, residual_weight=0.3, space=known_space(), graph=False).path


def test_onnx_gives_the_golden_answers_in_any_batch_and_says_how_to_use_it(source, tmp_path):
    main(source, tmp_path / "exported", Format.ONNX)
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["model.json", "model.onnx"]
    bundle, described = Bundle.load(source), json.loads((tmp_path / "exported" / "model.json").read_text())
    assert described["digest"] == bundle.digest
    assert described["classes"] == list(bundle.config.classes)
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "model.onnx")
    assert [slot.name for slot in session.get_inputs()] == [slot["name"] for slot in described["inputs"]]
    inputs = golden_inputs(bundle)
    for rows in (1, len(inputs["pixels"])):
        logits, maps, _ = session.run(None, {name: array[:rows] for name, array in inputs.items()})
        expected = Predictor(bundle, runtime="torch").runtime(*(array[:rows] for array in inputs.values()))
        np.testing.assert_allclose(logits, expected[0], atol=1e-3)
        np.testing.assert_allclose(maps, expected[1], atol=1e-3 * maps.max())
        # the written recipe gives the served probabilities
        calibration = described["calibration"]
        outlier = described["classes"].index("UNK")
        lesions = np.delete(logits, outlier, axis=1)
        known = np.exp(lesions / calibration["temperature"])
        known /= known.sum(1, keepdims=True)
        served = bundle.config.calibration.probabilities(logits, bundle.config.classes, expected[2])
        rejection = calibration["rejection"]
        familiarity = np.log(np.exp(lesions).sum(1)) - logits[:, outlier] - rejection["residual_weight"] * expected[2]
        unknown = 1 / (1 + np.exp((familiarity - rejection["threshold"]) / rejection["scale"]))
        np.testing.assert_allclose(served[:, -1], unknown, atol=1e-4)
        np.testing.assert_allclose(served[:, :-1], known * (1 - unknown)[:, None], atol=1e-4)


def test_a_model_that_answers_differently_is_not_written(tmp_path, monkeypatch):
    def wrong(bundle, inputs, path):
        path.touch()
        count = len(inputs["pixels"])
        return list(inputs), [np.zeros((count, len(bundle.config.classes))), np.zeros((count, 8, 8)), np.zeros(count)]

    monkeypatch.setattr(export_model, "convert_onnx", wrong)
    with pytest.raises(ExportError, match="A golden probability differs by .* in onnx"):
        main(SHIPPED, tmp_path, Format.ONNX)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_bundle_is_refused_in_one_sentence(tmp_path):
    command = [sys.executable, "scripts/export_model.py", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a bundle" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # downloads an environment of its own
@pytest.mark.timeout(1200)
def test_litert_gives_the_golden_answers(tmp_path):
    main(SHIPPED, tmp_path, Format.LITERT)
    assert (tmp_path / "model.tflite").stat().st_size > 1e6
    assert json.loads((tmp_path / "model.json").read_text())["file"] == "model.tflite"
