"""Training that starts from a bundle.

The same network begins where the bundle ended. A larger picture gets resampled positions, other classes a new head;
another network is refused. Every model made from the bundle carries its receipt, and a manifest that would test a model
on images of that receipt is refused.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from handlers.bundle import BundleError
from handlers.metadata import Metadata
from handlers.receipt import image_identities, overlap
from handlers.weights import read_weights
from tests.commands import invoke
from tests.models import tiny_backbone, tiny_bundle
from tests.tiny_lesions import tiny_manifest, without_mlflow
from training import average_weights, checkpoints, finish, train
from training.config import load_config
from training.data.batches import classes_in
from training.data.image_cache import DataError
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.leakage import manifest_receipt
from training.initial_weights import InitialWeights

TINY = ["architecture=test_vit", "batch_size=16", "warmup_epochs=0", "ema_decay=0", "bootstrap=0", "threads=1"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """The images that the bundles have seen."""
    return tiny_manifest(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def bundle_of(manifest, tmp_path_factory):
    """Return a function: options of a tiny bundle -> that bundle, with the receipt of `manifest`."""
    frame = read_manifest(manifest)

    def make(**options):
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        return tiny_bundle(folder, receipt=manifest_receipt(frame, fingerprint(frame)), graph=False, **options)

    return make


@pytest.fixture(scope="module")
def initial(bundle_of):
    return InitialWeights.read(bundle_of().path)


def test_the_same_network_begins_where_the_bundle_ended(initial):
    network, original = tiny_backbone(seed=1), tiny_backbone()
    assert initial.put_into(network, initial.bundle.config.classes) == []
    for name, weight in network.state_dict().items():
        assert torch.allclose(weight, original.state_dict()[name], atol=1e-2), name  # the bundle is in fp16


def test_positions_are_resampled(initial):
    larger, original = tiny_backbone(seed=1, image_size=96), tiny_backbone().pos_embed
    assert initial.put_into(larger, initial.bundle.config.classes) == []
    assert larger.pos_embed.shape == (1, 37, 48)
    assert torch.allclose(larger.pos_embed[:, 0], original[:, 0], atol=1e-3)  # the class token has no position
    assert torch.allclose(larger.pos_embed[0, 1:].mean(0), original[0, 1:].mean(0), atol=0.1)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_other_families_start_from_their_bundles_too(tmp_path):
    """Swin's relative positions depend on the image size, and its classifier is `head.fc`."""
    options = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
    network = {"architecture": "swin_tiny_patch4_window7_224", "options": options}
    start = InitialWeights.read(tiny_bundle(tmp_path / "bundle", **network).path)
    larger, original = tiny_backbone(classes=3, seed=1, image_size=96, **network), tiny_backbone(**network)
    assert start.put_into(larger, ("MEL", "NV", "BCC")) == ["head.fc"]
    assert larger.head.fc.weight.shape == (3, 128)
    assert torch.allclose(larger.patch_embed.proj.weight, original.patch_embed.proj.weight, atol=1e-2)


@pytest.mark.parametrize("classes", [("MEL", "NV", "BCC"), "the same in another order"])
def test_other_classes_get_a_new_head(initial, classes):
    classes = classes if isinstance(classes, tuple) else initial.bundle.config.classes[::-1]
    network, original = tiny_backbone(classes=len(classes), seed=1), tiny_backbone()
    before = network.get_classifier().weight.clone()
    assert initial.put_into(network, classes) == ["head"]
    assert torch.equal(network.get_classifier().weight, before)
    assert torch.allclose(network.blocks[0].attn.qkv.weight, original.blocks[0].attn.qkv.weight, atol=1e-2)


@pytest.mark.parametrize(
    ("seen", "inputs", "new_heads"),
    [([], ["age"], ["metadata_head"]), (["sex"], ["sex"], []), (["sex"], ["age"], ["metadata_head"])],
)
def test_other_metadata_get_a_new_head_even_of_the_same_width(bundle_of, seen, inputs, new_heads):
    initial = InitialWeights.read(bundle_of(metadata=Metadata.of(seen)).path)
    network = tiny_backbone(seed=1, metadata_width=len(Metadata.of(inputs).columns))
    before = network.metadata_head.logits.weight.clone()
    assert initial.put_into(network, initial.bundle.config.classes, Metadata.of(inputs)) == new_heads
    assert torch.equal(network.metadata_head.logits.weight, before) is bool(new_heads)


@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 1}, {"embed_dim": 24}])
def test_another_network_is_refused(initial, options):
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3} | options
    with pytest.raises(BundleError, match="set its architecture, stem, depth and head_hidden"):
        initial.put_into(tiny_backbone(options=options), initial.bundle.config.classes)


def test_a_manifest_that_tests_on_seen_images_is_refused(initial, manifest):
    frame = read_manifest(manifest)
    initial.check(frame)
    initial.check(frame.iloc[1:])
    for first, second in (("train", "test"), ("train", "val"), ("val", "calibration")):
        swapped = frame.assign(split=frame["split"].replace({first: second, second: first}))
        with pytest.raises(DataError, match=f"has seen images of this manifest's split ({first}|{second}) in another"):
            initial.check(swapped)
    initial.check(frame.assign(split="train"))


# ---- runs


@pytest.fixture(scope="module")
def exports():
    """The arguments of each export of a run, in place of its bundle."""
    calls = []

    def export(out, backbone, config, receipt, space, reference_pictures):
        calls.append(SimpleNamespace(config=config, receipt=receipt))
        return SimpleNamespace(path=out, digest="")

    with without_mlflow() as patch:
        patch.setattr(finish, "export_bundle", export)
        yield calls


def run(folder, *settings, resume=False):
    folder.mkdir(exist_ok=True)
    checkpoint = checkpoints.load(folder / "last.pt") if resume else None
    stop = SimpleNamespace(watch=lambda: None, check=lambda agree=int: None, number=0)
    train.train(load_config(None, [*TINY, *settings]), folder, checkpoint, stop)
    return checkpoints.load(folder / "best.pt")["weights"]


def test_a_run_carries_the_receipt_on_even_if_the_bundle_is_gone(bundle_of, manifest, exports, tmp_path):
    other = tiny_manifest(tmp_path / "data", size=(48, 40))  # other images
    bundle = bundle_of(architecture="test_vit", options={})
    before = read_weights(bundle).network
    settings = [f"manifest={other}", f"initial_bundle={bundle.path}", "lr=1e-12", "epochs=1", "image_size=48"]
    after = run(tmp_path / "run", *settings)
    assert all(torch.allclose(after[name], before[name], atol=1e-3) for name in after if name.startswith("blocks."))
    for file in bundle.path.rglob("*.*"):
        file.unlink()
    run(tmp_path / "run", *settings, resume=True)
    first, again = exports[-2:]
    assert first.config.evidence["initial_bundle"] == again.config.evidence["initial_bundle"] == bundle.digest
    assert first.config.preprocessing.image_size == 48
    assert first.receipt == again.receipt
    for path in (manifest, other):
        for split, rows in read_manifest(path).groupby("split"):
            seen = overlap(first.receipt, image_identities(rows)).same_image
            assert len(seen) == (0 if split == "test" else len(rows))
    with pytest.raises(train.TrainingError, match="has its weights already"):
        run(tmp_path / "run", *settings, "initial_bundle=another", resume=True)


def test_frozen_epochs_train_only_new_heads_even_in_a_resumed_run(bundle_of, exports, tmp_path):
    """So a model learns what age, sex and site add, and its answers to pictures alone stay as they were."""
    manifest = tiny_manifest(tmp_path / "data", size=(44, 40))
    table = pd.read_csv(manifest)
    table.assign(site=np.where(table["label"] == "NV", "head/neck", "palms/soles")).to_csv(manifest, index=False)
    bundle = bundle_of(architecture="test_vit", options={}, classes=classes_in(read_manifest(manifest)))
    settings = [f"manifest={manifest}", f"initial_bundle={bundle.path}", "metadata=[site]", "image_size=64", "lr=0.01",
                "freeze_epochs=2", "mixup_alpha=0.5", "mix_probability=0.3"]  # fmt: skip
    run(tmp_path / "run", *settings, "epochs=1")
    run(tmp_path / "run", *settings, "epochs=2", resume=True)
    before, state = read_weights(bundle).network, checkpoints.load(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 2
    changed = {name for name, weight in state["model"].items()
               if name not in before or not torch.equal(weight, before[name].to(weight))}  # fmt: skip
    assert changed == {"metadata_head.hidden.weight", "metadata_head.logits.weight"}
    assert state["model"]["metadata_head.logits.weight"].any()


def test_an_average_is_the_mean_of_the_runs_and_their_bundle(bundle_of, exports, tmp_path):
    manifest = tiny_manifest(tmp_path / "data", size=(46, 40))
    bundle = bundle_of(architecture="test_vit", options={}, classes=classes_in(read_manifest(manifest)))
    settings = [f"manifest={manifest}", f"initial_bundle={bundle.path}", "image_size=64", "epochs=1"]
    runs = [tmp_path / name for name in ("first", "second", "other", "without")]
    weights = [run(folder, *settings, f"seed={seed}", "lr=1e-3") for seed, folder in enumerate(runs[:2])]
    average = tmp_path / "average"
    code, output = invoke(average_weights.main, *runs[:2], "--output", average)
    assert code == 0 and "val_accuracy 0." in output, output
    resumed = run(average, *settings, resume=True)
    for name, value in read_weights(bundle).network.items():
        assert torch.allclose(resumed[name], (value + weights[0][name] + weights[1][name]) / 3, atol=1e-6), name
    assert not torch.allclose(resumed["norm.weight"], weights[0]["norm.weight"], atol=1e-5)

    run(runs[2], *settings, f"manifest={tiny_manifest(tmp_path / 'more', size=(50, 40))}")
    run(runs[3], *settings, "initial_bundle=''")
    for wrong, sentence in (
        ([runs[0], runs[2]], "differ in classes, manifest or initial_bundle"),
        ([runs[0], "image_size=48"], "another network than these settings"),
        ([runs[3]], "The first run has no initial_bundle."),
        (["lr=1"], "No run is named."),
    ):
        code, output = invoke(average_weights.main, *wrong, "--output", tmp_path / "new")
        assert code == 1 and sentence in output
        assert not (tmp_path / "new").exists()
    code, output = invoke(average_weights.main, *runs[:2], "--output", average)
    assert code == 1 and "holds a run already" in output
