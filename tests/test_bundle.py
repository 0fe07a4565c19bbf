"""A damaged or incomplete bundle is refused; its digest covers every byte; its serving graph agrees with the model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from handlers import graph_export
from handlers.bundle import CONFIG, WEIGHTS, Bundle, BundleError, seal
from handlers.calibration import Calibration, Conformal
from handlers.errors import UserError
from handlers.files import new_folder
from handlers.graph_export import complete
from handlers.predictor import Predictor
from handlers.taxonomy import CODES
from handlers.unknown_class import Rejection
from tests.models import OPTIONS, tiny_bundle
from training import export


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("full") / "bundle")


@pytest.fixture(scope="module")
def slim(full, tmp_path_factory) -> Bundle:
    return export.slim(full.path, tmp_path_factory.mktemp("slim") / "bundle")


def test_completing_adds_the_graph_and_keeps_everything_else(slim, tmp_path):
    full = complete(slim, tmp_path / "full")
    assert not slim.has_graph
    assert full.has_graph
    assert (slim.config.runtime, full.config.runtime) == ("", "openvino")
    assert {name: full.files[name] for name in slim.files} == slim.files


def test_completing_again_changes_nothing(full, tmp_path):
    assert complete(full, tmp_path / "again").digest == full.digest


@pytest.fixture
def completed(full, monkeypatch) -> Callable[[Bundle, Path], Bundle]:
    """The export of `slim`, done once: it takes seconds."""

    def copy(bundle: Bundle, out: Path) -> Bundle:
        return complete(full, out)

    monkeypatch.setattr(graph_export, "complete", copy)
    return copy


def test_a_bundle_is_completed_once_for_a_cache(slim, full, completed, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def overtaken(bundle: Bundle, out: Path) -> Bundle:
        """Another process completes the same bundle in the meantime."""
        monkeypatch.setattr(graph_export, "complete", completed)
        graph_export.complete_once(bundle, cache)
        return completed(bundle, out)

    monkeypatch.setattr(graph_export, "complete", overtaken)
    first = graph_export.complete_once(slim, cache)
    assert first.has_graph
    monkeypatch.delattr(graph_export, "complete")  # a second export would fail
    assert graph_export.complete_once(slim, cache) == first
    assert graph_export.complete_once(full, cache) is full
    assert [path.name for path in cache.iterdir()] == [first.path.name]


@pytest.mark.usefixtures("completed")
def test_a_damaged_or_older_bundle_in_the_cache_is_derived_again(slim, tmp_path, monkeypatch):
    first = graph_export.complete_once(slim, tmp_path)
    (first.path / "graph.bin").write_bytes(b"damaged")
    assert Bundle.load(graph_export.complete_once(slim, tmp_path).path).has_graph
    monkeypatch.setattr("openvino.__version__", "2000.1")
    assert graph_export.complete_once(slim, tmp_path).path != first.path


def test_a_cache_that_cannot_be_written_is_reported(slim, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written: .* Make it writable"):
        graph_export.complete_once(slim, tmp_path / "file")


@pytest.mark.parametrize("name", [WEIGHTS, "graph.bin", "golden.json", "golden/MEL.jpg", "receipt.json"])
def test_a_changed_byte_in_any_file_is_refused(full, tmp_path, name):
    copy = shutil.copytree(full.path, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.load(copy)


def rewritten(bundle: Bundle, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of the bundle with a changed bundle.json."""
    copy = shutil.copytree(bundle.path, folder / "copy")
    values = json.loads((copy / CONFIG).read_text())
    change(values)
    (copy / CONFIG).write_text(json.dumps(values))
    return copy


def test_a_changed_description_changes_the_digest(full, tmp_path):
    copy = rewritten(full, tmp_path, lambda values: values["calibration"].update(temperature=2.0))
    assert Bundle.load(copy).digest != full.digest


def test_reading_checks_the_files_but_no_hashes(full, tmp_path):
    copy = shutil.copytree(full.path, tmp_path / "copy")
    (copy / WEIGHTS).write_bytes(b"changed")
    assert Bundle.read(copy).digest == full.digest
    (copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"lacks {WEIGHTS}"):
        Bundle.read(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema=2), "schema"),
        (lambda v: v.pop("classes"), "classes"),
        (lambda v: v.update(classes=["MEL", "XYZ"]), "XYZ"),
        (lambda v: v["files"].update({"../outside": {"sha256": ""}}), "outside"),
        (lambda v: v["files"].update({"more.bin": {"sha256": ""}}), "lacks more.bin"),
        (lambda v: v["files"].pop(WEIGHTS), "lacks model.safetensors"),
        (lambda v: v.update(metadata=["age"]), "malformed"),
        (lambda v: v.update(metadata={"height": [1]}), "malformed"),
    ],
)
def test_a_wrong_description_is_refused_with_a_sentence(slim, tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        Bundle.load(rewritten(slim, tmp_path, change))


def test_another_folder_is_no_bundle_and_is_not_overwritten(slim, tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.load(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="Choose another folder"):
        complete(slim, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_weights_of_another_architecture_are_refused(slim, tmp_path):
    copy = shutil.copytree(slim.path, tmp_path / "copy")
    deeper = seal(copy, replace(slim.config, options={**slim.config.options, "depth": 3}))
    with pytest.raises(BundleError, match="do not fit"):
        complete(deeper, tmp_path / "out")


def test_an_unknown_architecture_is_refused_in_a_sentence(slim, tmp_path):
    copy = shutil.copytree(slim.path, tmp_path / "copy")
    bundle = seal(copy, replace(slim.config, architecture="vit_of_tomorrow"))
    with pytest.raises(BundleError, match=r"network cannot be built. timm has no model named 'vit_of_tomorrow'"):
        Predictor(bundle)


def test_an_unreadable_file_is_reported(slim, monkeypatch):
    monkeypatch.setattr("handlers.bundle.file_sha256", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(BundleError, match=r"cannot be read: Input/output error"):
        Bundle.load(slim.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnx"}, "runtime is 'onnx': it must be one of auto, openvino, torch"),
        ({"precision": "int8"}, "precision is 'int8': it must be one of auto, bf16, f32"),
        ({"runtime": "openvino"}, "has no serving graph for OpenVINO"),
    ],
)
def test_an_unknown_runtime_or_precision_is_refused(slim, options, message):
    with pytest.raises(BundleError, match=message):
        Predictor(slim, **options)


def test_a_graph_that_disagrees_is_refused_and_leaves_nothing(slim, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_export, "PROBABILITY_TOLERANCE", -1.0)
    with pytest.raises(BundleError, match="disagrees"):
        complete(slim, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_old_folder(full, tmp_path):
    copy = shutil.copytree(full.path, tmp_path / "copy")

    def fail_halfway():
        with new_folder(copy, CONFIG) as folder:
            (folder / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert Bundle.load(copy).digest == full.digest
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_failed_rename_leaves_the_old_folder(full, tmp_path, monkeypatch):
    copy = shutil.copytree(full.path, tmp_path / "copy")
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"), new_folder(copy, CONFIG) as folder:
        (folder / "file").touch()
    assert Bundle.load(copy).digest == full.digest
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_nan_disagrees(full):
    case = full.golden()[0]
    for code in CODES:
        probability, _ = case.disagreement({**case.probabilities, code: float("nan")}, case.grid)
        assert not probability <= 1


@pytest.mark.parametrize("text", ["[]", "null", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": 3}}'])
def test_json_of_another_shape_is_refused_in_a_sentence(full, tmp_path, text):
    copy = shutil.copytree(full.path, tmp_path / "copy")
    values = json.loads(text)
    if isinstance(values, dict):
        values = json.loads((copy / CONFIG).read_text()) | values
    (copy / CONFIG).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=CONFIG):
        Bundle.load(copy)


def test_a_backbone_that_cannot_be_exported_is_served_by_torch(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle", options={**OPTIONS, "qk_norm": True})
    assert (bundle.config.runtime, bundle.has_graph) == ("torch", False)
    case = bundle.golden()[0]
    [answer] = Predictor(bundle).predict([case.image])
    assert max(case.disagreement(answer.probabilities, answer.grid)) < 1e-4
    assert answer.to_dict()["model"]["runtime"] == "torch"


def test_a_failing_export_is_logged_and_served_by_torch(slim, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(graph_export, "export_graph", fail)
    bundle = complete(slim, tmp_path / "bundle")
    assert (bundle.config.runtime, bundle.has_graph) == ("torch", False)
    assert "torch will serve it, more slowly: no such operation" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}),
        pytest.param("efficientnet_b0", {}, marks=pytest.mark.slow),  # the layers of the next one
        ("tf_efficientnetv2_s", {"channel_multiplier": 0.5, "depth_multiplier": 0.3}),
    ],
)
def test_convolutional_backbones_export(tmp_path, architecture, options):
    bundle = tiny_bundle(tmp_path / "bundle", architecture=architecture, options=options)
    assert bundle.config.runtime == "openvino"  # and the export compared it with the eager model


def test_disagreement_is_zero_for_itself_and_large_for_another(full):
    first, second, *_ = full.golden()
    assert first.disagreement(first.probabilities, first.grid) == pytest.approx((0, 0), abs=1e-9)
    assert max(first.disagreement(second.probabilities, second.grid)) > 1e-3
    flat = np.zeros_like(first.grid).tolist()
    assert first.disagreement(first.probabilities, flat)[1] == 1.0


def test_calibration_arithmetic():
    logits = np.array([[2.0, 0.0, -1.0], [1000.0, 0.0, -1000.0]])
    classes = ("MEL", "NV", "BCC")
    calibration = Calibration(2.0, Rejection(1.0, 0.5), Conformal(0.9, {"MEL": 0.7, "NV": 0.8, "BCC": 0.1}))
    known = calibration.known_probabilities(logits)
    expected = np.exp(logits[0] / 2) / np.exp(logits[0] / 2).sum()
    assert known[0] == pytest.approx(expected)
    nine = calibration.probabilities(logits, classes)
    unknown = 1 / (1 + np.exp(-(1.0 - np.log(np.exp(logits[0]).sum())) / 0.5))
    assert nine.sum(1) == pytest.approx(1)
    assert nine[0, CODES.index("UNK")] == pytest.approx(unknown)
    assert nine[0, 0] == pytest.approx(expected[0] * (1 - unknown))
    assert nine[0, CODES.index("DF")] == 0
    assert calibration.conformal_sets(logits, classes) == [["MEL", "NV"], ["MEL"]]
    assert Calibration.from_dict(asdict(calibration)) == calibration
    assert Calibration().conformal_sets(logits, classes) is None
