"""Metadata: a picture's age, sex and site.

Encoding: each value has its own place, a missing value is zeros, and a wrong value is refused in one sentence.
Network: missing metadata add exactly nothing, and the heatmap equals autograd's on the fused logits. A model learns
classes that only the site separates, and its conformal sets also hold without metadata.
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handlers.backbone import MetadataHead, build_backbone
from handlers.bundle import Bundle
from handlers.gradcam import AutogradGradCam, TappedBackbone, grad_cam
from handlers.metadata import FIELDS, SEXES, SITES, Metadata, MetadataError
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.serving_graph import serving_module
from tests.commands import invoke
from tests.models import ARCHITECTURE, OPTIONS, tiny_backbone, tiny_bundle
from tests.tiny_lesions import COLOURS, tiny_manifest, without_mlflow
from training import evaluate, train
from training.config import ConfigError, load_config
from training.data.batches import encode_rows, withhold
from training.data.draws import Draws
from training.data.image_cache import DataError
from training.data.manifest import read_manifest
from training.evaluation.calibration_fit import fit_calibration
from training.evaluation.served_predictions import predict_rows
from training.recipe import heads_of, make_optimizer, set_trainable
from training.training_data import load_splits

ALL = Metadata.of(FIELDS)
VALUES = {"age": 71, "sex": "male", "site": "head/neck"}

ages = st.none() | st.floats(0, 120).map(lambda years: round(years, 2))
values = st.fixed_dictionaries({"age": ages, "sex": st.sampled_from([None, *SEXES]),
                                "site": st.sampled_from([None, *SITES])})  # fmt: skip


# ---- encoding


@given(values)
def test_parsing_twice_changes_nothing(row):
    as_text = {name: "" if value is None else str(value) for name, value in row.items()}
    assert ALL.parse(row) == row == ALL.parse(as_text)


@given(values, st.sampled_from(FIELDS))
def test_a_missing_value_is_zeros_and_changes_no_other(row, name):
    encoded, without = ALL.encode(row), ALL.encode(row | {name: None})
    mine = np.array([FIELDS[index] == name for index in ALL.columns])
    assert encoded.dtype == np.float32
    assert len(encoded) == len(ALL.columns) == 2 + len(SEXES) + len(SITES)
    assert not without[mine].any()
    assert np.array_equal(without[~mine], encoded[~mine])
    assert encoded[mine].any() == (row[name] is not None)


@given(values, values)
def test_different_values_are_encoded_differently(one, other):
    assert (one == other) == np.array_equal(ALL.encode(one), ALL.encode(other))


@pytest.mark.parametrize("fields", [(), ("age",), ("site", "sex"), FIELDS])
def test_metadata_survive_json(fields):
    some = Metadata.of(fields)
    assert Metadata.from_dict(json.loads(json.dumps(asdict(some)))) == some
    assert some.fields == tuple(name for name in FIELDS if name in fields) == tuple(some.choices)
    assert len(some.encode({})) == len(some.columns)


@pytest.mark.parametrize("missing", [None, "", " ", "unknown", "Unknown", float("nan")])
def test_missing_values(missing):
    assert ALL.parse(dict.fromkeys(FIELDS, missing)) == dict.fromkeys(FIELDS)


@pytest.mark.parametrize(("text", "years"), [("55", 55), (" 55.5 ", 55.5), (0, 0), (120.0, 120), (np.float64(7), 7)])
def test_ages(text, years):
    assert ALL.parse({"age": text})["age"] == years


HOSTILE_AGES = [
    "-1", "121", "1e1", "1_0", "inf", "nan", "0x10", "٣", "5 5", "5,5", "55 years", "1" * 400, True, [5], {},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("age", value) for value in HOSTILE_AGES), ("sex", "f"), ("sex", 1), ("site", "elbow"), ("site", "<b>" * 999)],
)
def test_wrong_values_are_refused_in_a_short_sentence(name, value):
    with pytest.raises(MetadataError, match=rf"^{name} is .*: it must be .*, or unknown\.$") as caught:
        ALL.parse({name: value})
    assert len(str(caught.value)) < 220
    assert ALL.understood({name: value, "sex": "male"} if name != "sex" else {name: value})[name] is None


def test_a_field_that_the_model_does_not_take_is_refused():
    with pytest.raises(MetadataError, match="This model takes no age. Leave it out"):
        Metadata.of(["sex"]).parse({"sex": "male", "age": 5})


def test_rows_of_a_manifest(tmp_path):
    frame = pd.DataFrame({"age": [55.0, np.nan], "sex": ["male", ""], "site": ["elbow", "head/neck"]})
    encoded = encode_rows(frame, ALL)
    assert np.array_equal(encoded[0], ALL.encode({"age": 55, "sex": "male"})), "an unknown word counts as missing"
    assert np.array_equal(encoded[1], ALL.encode({"site": "head/neck"}))
    assert encode_rows(frame, Metadata()).shape == (2, 0)


# ---- network


def test_missing_metadata_add_exactly_nothing():
    head = MetadataHead(len(ALL.columns), 8)
    torch.nn.init.normal_(head.logits.weight)
    assert not head(torch.zeros(3, len(ALL.columns))).any()
    assert head(torch.tensor(ALL.encode({"sex": "male"}))).any()
    assert not MetadataHead(5, 8)(torch.randn(3, 5)).any(), "it begins with the picture alone"


CAMS = {
    "vit": (ARCHITECTURE, OPTIONS),
    "vit-average-pooling": (ARCHITECTURE, {**OPTIONS, "global_pool": "avg"}),
    "vit-query-key-norm": (ARCHITECTURE, {**OPTIONS, "qk_norm": True}),
    "resnet18": ("resnet18", {}),
}


def test_a_heatmap_by_autograd_takes_metadata_in_serving(tmp_path, sample_images):
    bundle = tiny_bundle(tmp_path / "bundle", options={**OPTIONS, "qk_norm": True}, metadata=ALL)
    assert isinstance(serving_module(bundle).cam, AutogradGradCam)
    [answer] = Predictor(bundle, runtime="torch").predict([Request(sample_images[0], metadata={"sex": "male"})])
    assert answer.metadata["sex"] == "male" and answer.grid


@pytest.mark.parametrize("name", CAMS)
def test_the_heatmap_equals_that_of_autograd_on_the_fused_logits(name):
    architecture, options = CAMS[name]
    backbone = tiny_backbone(architecture=architecture, options=options, metadata_width=len(ALL.columns))
    torch.manual_seed(1)
    images, target = torch.randn(4, 3, 64, 64), torch.tensor([-1, -1, 4, -1])
    informed = torch.tensor(np.stack([ALL.encode(v) for v in (VALUES, {"sex": "female"}, VALUES, {})]))
    with torch.no_grad():
        backbone.metadata_head.logits.weight.mul_(5)  # so that the metadata decides
    logits, maps, _ = grad_cam(backbone, 64)(images, target, informed)
    alone, maps_alone, _ = AutogradGradCam(backbone)(images, target)
    target_classes = torch.where(target < 0, logits.argmax(1), target)

    kept, tapped = [], TappedBackbone(backbone)
    tapped.layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    fused = tapped(images) + backbone.metadata_head(informed)  # what is tested, by hand
    (gradient,) = torch.autograd.grad(fused.gather(1, target_classes[:, None]).sum(), kept[0])
    activation, weight = tapped.channels_first(kept[0]), tapped.channels_first(gradient).mean((2, 3))
    expected = torch.einsum("nchw,nc->nhw", activation, weight).relu().detach()
    fused, maps, maps_alone = (tensor.detach() for tensor in (fused, maps, maps_alone))
    torch.testing.assert_close(logits.detach(), fused, atol=1e-4, rtol=1e-4)
    assert float((maps - expected).abs().max() / expected.max()) < 1e-4
    torch.testing.assert_close(logits[3].detach(), alone[3], atol=1e-5, rtol=1e-4)
    assert (logits.argmax(1) != alone.argmax(1))[:2].any(), "the metadata move the top class, and the map with it"
    torch.testing.assert_close(maps[2:], maps_alone[2:], atol=1e-4 * float(maps.max()), rtol=1e-3)


def test_values_are_withheld_together_and_one_by_one():
    encoded = torch.tensor(ALL.encode(VALUES)).repeat(20_000, 1)
    kept = withhold(encoded, ALL, 0.25, Draws((0,), 20_000))
    assert ((kept == encoded) | (kept == 0)).all()
    known = torch.stack([kept[:, torch.tensor(ALL.columns) == index].any(1) for index in range(3)], 1)
    assert (~known.any(1)).float().mean() == pytest.approx(0.25 + 0.75 * 0.25**3, abs=0.02)
    for index in range(3):
        assert known[:, index].float().mean() == pytest.approx(0.75**2, abs=0.02)
    assert torch.equal(withhold(encoded, ALL, 0.0, Draws((0,), 20_000)), encoded)


def test_a_model_without_metadata_draws_no_random_numbers():
    assert withhold(torch.zeros(4, 0), Metadata(), 0.5, None).shape == (4, 0)
    assert not hasattr(build_backbone("test_vit", 3, 32), "metadata_head")


def test_the_metadata_head_is_optimised_and_not_frozen_with_the_backbone():
    model = build_backbone("test_vit", 3, 32, metadata_width=len(ALL.columns))
    groups = make_optimizer(model, load_config(None, ["layer_decay=0.5"])).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scales[id(p)] for p in model.metadata_head.parameters()} == {1.0}, "it learns as fast as the head"
    set_trainable(model, heads_of(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", "metadata_head.hidden.weight", "metadata_head.logits.weight"}


# ---- calibration


def test_the_conformal_promise_holds_with_and_without_metadata():
    rng = np.random.default_rng(0)
    classes, level = ["MEL", "NV", "BCC"], 0.9

    def draw(n):
        labels = rng.integers(3, size=n)
        alone = rng.normal(0, 1, (n, 3)) + 1.0 * np.eye(3)[labels]
        return labels, alone, alone + 1.5 * np.eye(3)[labels] + rng.normal(0, 0.5, (n, 3))

    labels, alone, informed = draw(3000)
    calibration = fit_calibration(informed, labels, classes, level, image_logits=alone)
    fresh, *ways = draw(6000)
    for way in ways:
        sets = calibration.conformal_sets(way, classes)
        for k, code in enumerate(classes):
            inside = [code in chosen for chosen, label in zip(sets, fresh, strict=True) if label == k]
            assert np.mean(inside) > level - 0.02
    # Fitted with metadata only, the sets would not cover images without metadata.
    narrow = fit_calibration(informed, labels, classes, level).conformal_sets(ways[0], classes)
    assert np.mean([classes[k] in chosen for k, chosen in zip(fresh, narrow, strict=True)]) < level - 0.05
    assert fit_calibration(informed, labels, classes, level, image_logits=informed).temperature == pytest.approx(
        fit_calibration(informed, labels, classes, level).temperature, rel=1e-3
    )


# ---- training


def test_settings():
    assert load_config(None, ["metadata=[age, site]"]).metadata_inputs == Metadata.of(["age", "site"])
    assert load_config(None).metadata_inputs == Metadata()
    with pytest.raises(ConfigError, match="metadata is 'colour': it must be 'age', 'sex' or 'site'"):
        load_config(None, ["metadata=[colour]"])
    with pytest.raises(ConfigError, match="mix_probability below 1"):
        load_config(None, ["metadata=[age]", "mixup_alpha=1", "mix_probability=1"])


def test_metadata_without_values_in_the_manifest_are_refused(tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    config = load_config(None, ["metadata=[sex]", f"manifest={manifest}"])
    with pytest.raises(DataError, match="has a known sex; leave sex out"):
        load_splits(config, read_manifest(manifest), tuple(COLOURS), lambda: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on pictures that tell MEL from the others, where only the site tells NV from BCC."""
    folder = tmp_path_factory.mktemp("trained")
    counts = {"train": 144, "val": 36, "calibration": 60, "test": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COLOURS, "BCC", COLOURS["NV"])
        manifest = tiny_manifest(folder / "data", counts)
    frame = pd.read_csv(manifest, keep_default_na=False, dtype=str)
    rng = np.random.default_rng(0)
    place = {"MEL": "lower extremity", "NV": "posterior torso", "BCC": "head/neck"}
    frame["site"] = [place[label] for label in frame["label"]]
    frame["age"] = rng.integers(20, 80, len(frame)).astype(str)
    frame.loc[rng.random(len(frame)) < 0.1, "age"] = ""
    frame.to_csv(manifest, index=False)
    with without_mlflow():
        code, output = invoke(
            train.main, "architecture=test_vit", "image_size=32", "batch_size=16", "lr=3e-3", "warmup_epochs=1",
            "bootstrap=0", "threads=1", "pretrained=false", "metadata=[age, site]", f"manifest={manifest}", "epochs=12",
            "ema_decay=0.9", "mixup_alpha=0.2", "mix_probability=0.2", "--output", folder / "run",
        )  # fmt: skip
    assert code == 0, output
    return SimpleNamespace(run=folder / "run", manifest=manifest, bundle=Bundle.load(folder / "run" / "bundle"))


def test_a_model_learns_classes_that_only_the_site_separates(trained):
    reports = json.loads((trained.run / "metrics.json").read_text())
    assert set(reports) == {"val", "val_picture_alone", "test", "test_picture_alone"}
    assert reports["test"]["summary"]["balanced_accuracy"] > 0.9
    assert reports["test_picture_alone"]["summary"]["balanced_accuracy"] < 0.85
    assert reports["test_picture_alone"]["per_class"]["MEL"]["recall"] > 0.8, "the picture still counts"
    assert trained.bundle.config.metadata == Metadata.of(["age", "site"])
    assert "test_picture_alone" in trained.bundle.config.evidence["metrics"]


def test_evaluation_uses_the_manifests_metadata(trained):
    rows, _ = evaluate.open_rows(trained.manifest, "test", trained.run)
    predictor = Predictor(trained.bundle, precision="f32")
    answers, alone = predict_rows(predictor, rows), predict_rows(predictor, rows, picture_alone=True)
    right, right_alone = (np.mean([a.code == label for a, label in zip(some, rows["label"], strict=True)])
                          for some in (answers, alone))  # fmt: skip
    assert right > right_alone + 0.1
    reports = json.loads((trained.run / "metrics.json").read_text())
    assert evaluate.evaluate(rows, answers, 0)["summary"]["balanced_accuracy"] == pytest.approx(
        reports["test"]["summary"]["balanced_accuracy"], abs=0.05
    )
