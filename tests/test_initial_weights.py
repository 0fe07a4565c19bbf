"""Starting from a bundle.

The same network begins where the bundle ended; a larger picture gets its positions resampled; other classes get a new
head; another network is refused. What the bundle has seen stays in the receipt of every model made from it, and a
manifest that would judge a model by such images is refused.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from handlers.bundle import WEIGHTS, Bundle, BundleError
from handlers.metadata import Metadata
from handlers.receipt import image_identities, overlap, read_receipt
from tests.models import tiny_backbone, tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training import checkpoints, train
from training.config import load_config
from training.data.batches import classes_in
from training.data.image_cache import DataError
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.leakage import manifest_receipt
from training.initial_weights import InitialWeights
from training.interruption import Interruption

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

TINY = ["architecture=test_vit", "image_size=32", "batch_size=16", "warmup_epochs=0", "epochs=1", "bootstrap=0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A bundle with a receipt, and the manifest of its images."""
    folder = tmp_path_factory.mktemp("start")
    manifest = read_manifest(tiny_manifest(folder / "data"))
    bundle = tiny_bundle(folder / "bundle", receipt=manifest_receipt(manifest, fingerprint(manifest)))
    return InitialWeights.read(bundle.path), manifest


def answers(backbone, side=64):
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return backbone.eval()(pixels)


def test_the_same_network_begins_where_the_bundle_ended(start):
    initial, _ = start
    fresh = tiny_backbone(seed=1)
    assert initial.put_into(fresh, initial.bundle.config.classes) == []
    assert torch.allclose(answers(fresh), answers(tiny_backbone()), atol=1e-2)  # the bundle is in fp16
    assert not torch.allclose(answers(tiny_backbone(seed=1)), answers(tiny_backbone()), atol=1e-1)


def test_positions_are_resampled_and_all_else_is_kept(start):
    initial, _ = start
    larger = tiny_backbone(seed=1, image_size=96)
    assert initial.put_into(larger, initial.bundle.config.classes) == []
    ours, theirs = larger.state_dict(), tiny_backbone().state_dict()
    assert ours["pos_embed"].shape == (1, 37, 48)
    assert torch.allclose(
        ours["pos_embed"][:, 0], theirs["pos_embed"][:, 0], atol=1e-3
    )  # the class token's has no place
    centre, before = ours["pos_embed"][0, 1:].mean(0), theirs["pos_embed"][0, 1:].mean(0)
    assert torch.allclose(centre, before, atol=0.1)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-2) for name in ours if name != "pos_embed")


def test_other_classes_get_a_new_head(start):
    initial, _ = start
    other = tiny_backbone(classes=3, seed=1)
    before = other.get_classifier().weight.clone()
    assert initial.put_into(other, ("MEL", "NV", "BCC")) == ["head"]
    assert torch.equal(other.get_classifier().weight, before)
    assert torch.allclose(other.state_dict()["blocks.0.attn.qkv.weight"],
                          tiny_backbone().state_dict()["blocks.0.attn.qkv.weight"], atol=1e-2)  # fmt: skip


def test_the_same_classes_in_another_order_are_others(start):
    initial, _ = start
    assert initial.put_into(tiny_backbone(), initial.bundle.config.classes[::-1]) == ["head"]


def test_metadata_may_be_new(start):
    initial, _ = start
    told = tiny_backbone(seed=1, metadata_width=5)
    inputs = Metadata.of(["age", "sex"])
    assert initial.put_into(told, initial.bundle.config.classes, inputs) == ["metadata_head"]


def test_metadata_of_another_kind_begin_anew_though_they_are_as_wide(tmp_path):
    sex, age = Metadata.of(["sex"]), Metadata.of(["age"])
    assert len(sex.columns) == len(age.columns)
    images = read_manifest(tiny_manifest(tmp_path / "data"))
    given = tiny_bundle(tmp_path / "bundle", metadata=sex, receipt=manifest_receipt(images, fingerprint(images)))
    initial, width = InitialWeights.read(given.path), len(age.columns)
    for inputs, anew in ((sex, []), (age, ["metadata_head"])):
        told = tiny_backbone(seed=1, metadata_width=width)
        before = told.metadata_head.logits.weight.clone()
        assert initial.put_into(told, given.config.classes, inputs) == anew
        assert torch.equal(told.metadata_head.logits.weight, before) is bool(anew)


@pytest.mark.parametrize("options", [{"depth": 3, "embed_dim": 48, "num_heads": 3}, {"depth": 1, "embed_dim": 48,
                                     "num_heads": 3}, {"depth": 2, "embed_dim": 24, "num_heads": 3}])  # fmt: skip
def test_another_network_is_refused(start, options):
    initial, _ = start
    with pytest.raises(BundleError, match="set its architecture, stem, depth and head_hidden"):
        initial.put_into(tiny_backbone(options=options), initial.bundle.config.classes)


def test_what_it_has_seen_cannot_judge(start):
    initial, manifest = start
    initial.check(manifest, fingerprint(manifest))
    moved = manifest.assign(split=manifest["split"].replace({"train": "test", "test": "train"}))
    with pytest.raises(DataError, match="has seen images outside this manifest's training split"):
        initial.check(moved, fingerprint(moved))
    more = manifest.assign(split="train")
    initial.check(more, fingerprint(more))


def test_a_run_starts_from_it_and_hands_its_receipt_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    stop = Interruption()
    monkeypatch.setattr(stop, "watch", lambda: None)

    def run(name, manifest, *settings, checkpoint=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train.train(load_config(None, [*TINY, f"manifest={manifest}", *settings]), folder, checkpoint, stop)
        return Bundle.load(folder / "bundle")

    first = tiny_manifest(tmp_path / "data1")
    second = tiny_manifest(tmp_path / "data2", size=(48, 40))  # other images
    seen = read_manifest(first)
    one = tiny_bundle(tmp_path / "one", architecture="test_vit", options={},
                      receipt=manifest_receipt(seen, fingerprint(seen)))  # fmt: skip
    still = [f"initial_bundle={one.path}", "lr=1e-12", "ema_decay=0", "image_size=48"]
    two = run("two", second, *still)

    assert two.config.evidence["initial_bundle"] == one.digest
    assert "initial_bundle" not in one.config.evidence
    assert two.config.preprocessing.image_size == 48
    theirs, ours = (load_file(bundle.path / WEIGHTS) for bundle in (one, two))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours if name.startswith("blocks.0.attn"))

    receipt = read_receipt(two.path)
    for manifest in (first, second):
        frame = read_manifest(manifest)
        for split in ("train", "val", "calibration"):
            rows = frame[frame["split"] == split]
            assert len(overlap(receipt, image_identities(rows)).same_image) == len(rows)
        assert not overlap(receipt, image_identities(frame[frame["split"] == "test"])).leaks

    # a resumed run needs the bundle no more; ending it again makes the same receipt
    for file in one.path.rglob("*.*"):
        file.unlink()
    checkpoint = checkpoints.load(tmp_path / "two" / "last.pt")
    again = run("two", second, *still, checkpoint=checkpoint)
    assert read_receipt(again.path) == receipt
    with pytest.raises(train.TrainingError, match="has its weights already"):
        run("two", second, "initial_bundle=another", "ema_decay=0", "image_size=48", checkpoint=checkpoint)


def test_frozen_epochs_train_only_what_the_bundle_did_not_bring(tmp_path, monkeypatch):
    """So a model learns what age, sex and site add, and answers pictures alone as before; in a resumed run, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    stop = Interruption()
    monkeypatch.setattr(stop, "watch", lambda: None)
    manifest = tiny_manifest(tmp_path / "data")
    table = pd.read_csv(manifest)
    table.assign(site=np.where(table["label"] == "NV", "head/neck", "palms/soles")).to_csv(manifest, index=False)
    seen = read_manifest(manifest)
    one = tiny_bundle(tmp_path / "one", architecture="test_vit", options={}, classes=classes_in(seen),
                      receipt=manifest_receipt(seen, fingerprint(seen)))  # fmt: skip
    settings = [*TINY, f"manifest={manifest}", f"initial_bundle={one.path}", "metadata=[site]", "ema_decay=0"]
    settings += ["image_size=64", "freeze_epochs=2", "mixup_alpha=0.5", "mix_probability=0.3",
                 "batch_size=8", "lr=0.01"]  # fmt: skip
    with monkeypatch.context() as patch:  # as if it had been stopped after the first epoch
        patch.setattr(train, "finish", lambda *given: given[5].end("KILLED"))
        train.train(load_config(None, settings), tmp_path, None, stop)
    checkpoint = checkpoints.load(tmp_path / "last.pt")
    # The weights that are exported are those of the last epoch, whichever is better.
    checkpoint["best"] = None
    train.train(load_config(None, [*settings, "epochs=2"]), tmp_path, checkpoint, stop)
    before, after = (load_file(bundle / WEIGHTS) for bundle in (one.path, tmp_path / "bundle"))
    assert {name for name in after if name not in before or not torch.equal(after[name], before[name])} == {
        "metadata_head.hidden.weight", "metadata_head.logits.weight"}  # fmt: skip
    assert after["metadata_head.logits.weight"].any()
