"""From the manifest to batches.

Images are decoded once, into a cache that is never mistaken for another's; the images that evaluation sees are pixel
for pixel those of serving; an epoch's order and augmentation depend on seed and epoch alone; and augmentation changes
what a lesion's label survives, nothing else.
"""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.files import atomic_file
from handlers.preprocessing import Preprocessing
from tests.tiny_lesions import COLOURS, tiny_manifest
from training.config import load_config
from training.data import image_cache
from training.data.augmentation import LUMA, Augment
from training.data.batches import (
    Images,
    batches,
    classes_in,
    drawn_shares,
    epoch_order,
    even_batches,
    load_split,
    parts_of,
    sampling_weights,
    standardise,
)
from training.data.draws import Draws
from training.data.image_cache import DataError, build_cache
from training.data.manifest import read_manifest
from training.training_views import TrainingViews

SMALL = {"train": 12, "val": 6}
STILL = ["flip=false", "rotate90=false", "rotate_degrees=0", "translate=0", "crop_scale=1", "crop_aspect=1"]
COLOURLESS = ["brightness=0", "contrast=0", "saturation=0", "hue=0"]
CPU = torch.device("cpu")


@pytest.fixture
def frame(tmp_path):
    return read_manifest(tiny_manifest(tmp_path / "data", SMALL))


def augment(*overrides, size=32):
    config = load_config(None, [f"image_size={size}", *overrides])
    return Augment(config, config.preprocessing)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(n, seed=0):
    return Draws((seed,), n)


def pictures(n=8, size=32, seed=0):
    return torch.randint(0, 256, (n, size, size, 3), generator=generator(seed), dtype=torch.uint8)


# ---- the cache


def test_evaluation_sees_the_pixels_of_serving(frame, tmp_path):
    preprocessing = Preprocessing(24)
    images = load_split(frame, "val", ("MEL", "NV", "BCC"), preprocessing, tmp_path / "cache")
    rows = frame[frame["split"] == "val"]
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images.lesions.tolist() == rows["lesion_id"].tolist()
    for pixels, path in zip(images.pixels, rows["path"], strict=True):
        np.testing.assert_array_equal(pixels, preprocessing(Path(path).read_bytes())[0])


def test_standardisation_is_the_textbook_formula():
    """(x / 255 - mean) / std, for each channel."""
    preprocessing = Preprocessing(32)
    pixels = pictures()
    textbook = (pixels.numpy() / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    np.testing.assert_allclose(standardise(pixels, preprocessing), textbook.transpose(0, 3, 1, 2), atol=2e-6)


def test_images_are_decoded_once(frame, tmp_path):
    calls = []
    first = build_cache(frame, Preprocessing(16), tmp_path / "cache", lambda done, total: calls.append((done, total)))
    assert calls == [(done, len(frame)) for done in range(1, len(frame) + 1)]
    for path in frame["path"]:
        Image.new("RGB", (40, 32)).save(path)  # what is on disk now is not looked at
    again = build_cache(frame, Preprocessing(16), tmp_path / "cache", lambda done, total: calls.append("decoded"))
    assert "decoded" not in calls
    np.testing.assert_array_equal(first, again)
    assert not again.flags.writeable


def test_two_containers_fill_the_same_cache(frame, tmp_path, monkeypatch):
    """Each has processes of the same numbers as the other."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    real, begun = image_cache._fill, []

    def fill(path, *rest):
        real(path, *rest)
        if not begun:  # the other one begins, and ends, before this one has given its file its name
            begun.append(path)
            build_cache(frame, Preprocessing(16), tmp_path)

    monkeypatch.setattr(image_cache, "_fill", fill)
    pixels = build_cache(frame, Preprocessing(16), tmp_path)
    assert pixels.any(axis=(1, 2, 3)).all()
    with atomic_file(tmp_path / "manifest") as ours:
        with atomic_file(tmp_path / "manifest") as theirs:
            theirs.write(b"theirs")
        ours.write(b"ours")
    assert (tmp_path / "manifest").read_bytes() == b"ours"


def test_other_sizes_or_images_get_another_cache(frame, tmp_path):
    cache = tmp_path / "cache"
    build_cache(frame, Preprocessing(16), cache)
    build_cache(frame, Preprocessing(20), cache)
    build_cache(frame, Preprocessing(16, interpolation="bilinear"), cache)
    shorter = build_cache(frame.iloc[1:].reset_index(drop=True), Preprocessing(16), cache)
    assert len(shorter) == len(frame) - 1
    assert [file.suffix for file in cache.iterdir()] == [".npy"] * 4
    shapes = sorted(np.load(file, mmap_mode="r").shape for file in cache.iterdir())
    assert shapes == [(17, 16, 16, 3), (18, 16, 16, 3), (18, 16, 16, 3), (18, 20, 20, 3)]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: Image.effect_noise((40, 32), 50).save(path), "has changed since the manifest was written"),
    ],
)
def test_a_bad_image_stops_the_cache_and_leaves_no_file(frame, tmp_path, spoil, says):
    spoil(Path(frame["path"][7]))
    with pytest.raises(DataError, match=says) as caught:
        build_cache(frame, Preprocessing(16), tmp_path / "cache")
    assert frame["path"][7] in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_one_sentence(frame, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="image cache in .*file.* cannot be used"):
        build_cache(frame, Preprocessing(16), tmp_path / "file" / "cache")


def test_an_interrupted_cache_is_not_used(frame, tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(frame, Preprocessing(16), tmp_path / "cache", interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert build_cache(frame, Preprocessing(16), tmp_path / "cache").any(axis=(1, 2, 3)).all()


def test_classes_are_those_of_the_training_split_in_taxonomy_order(frame):
    assert classes_in(frame) == ("MEL", "NV", "BCC")
    assert set(COLOURS) == {"MEL", "NV", "BCC"}
    frame.loc[(frame["label"] == "NV") & (frame["split"] == "train"), "label"] = "SCC"
    assert classes_in(frame) == ("MEL", "BCC", "SCC")


def test_a_class_without_a_logit_is_marked(frame, tmp_path):
    images = load_split(frame, "val", ("NV", "BCC"), Preprocessing(16), tmp_path / "cache")
    assert images.labels.tolist() == [-1, 0, 1, -1, 0, 1]


# ---- order and batches


def images_of(labels, sources=None):
    """Return images without pixels."""
    sources = np.full(len(labels), "ham") if sources is None else sources
    return Images(np.empty((len(labels), 0)), labels, labels.astype(str), sources, np.empty((len(labels), 0)))


def test_the_order_depends_on_seed_and_epoch_alone():
    weights = np.full(50, 1 / 50)
    orders = {(s, e): epoch_order(weights, s, e) for s, e in itertools.product((0, 1), (0, 1))}
    for (s, e), order in orders.items():
        assert sorted(order) == list(range(50))
        np.testing.assert_array_equal(order, epoch_order(weights, s, e))
    assert len({tuple(order) for order in orders.values()}) == 4


@pytest.mark.parametrize(("power", "expected"), [(0.0, 0.9), (0.5, 0.75), (1.0, 0.5)])
def test_the_sampler_draws_by_frequency_to_the_power(power, expected):
    """9 to 1: weights 9 * 9^-p and 1, so shares 0.9, 3 / (3 + 1) and 0.5."""
    labels = np.array([0] * 9000 + [1] * 1000)
    weights = sampling_weights(images_of(labels), power, by_source=False)
    drawn = labels[epoch_order(weights, 0, 0)]
    assert len(drawn) == len(labels)
    assert (drawn == 0).mean() == pytest.approx(expected, abs=0.02)
    assert drawn_shares(labels, weights, ("NV", "MEL"), 0.0) == pytest.approx([expected, 1 - expected])


def test_the_sampler_balances_classes_within_sources():
    """A class that one source holds alone no longer tells the source: each of the four groups gets a quarter."""
    labels, sources = np.array([0] * 700 + [1] * 100 + [0] * 50 + [1] * 150), np.array(["ham"] * 800 + ["bcn"] * 200)
    weights = sampling_weights(images_of(labels, sources), 1.0, by_source=True)
    groups = [weights[(labels == k) & (sources == s)].sum() for k in (0, 1) for s in ("ham", "bcn")]
    assert groups == pytest.approx([0.25] * 4)
    assert drawn_shares(labels, weights, ("NV", "MEL"), 0.0) == pytest.approx([0.5, 0.5])
    with_outliers = drawn_shares(labels, weights, ("NV", "MEL", "UNK"), 0.1)
    assert with_outliers == pytest.approx([0.45, 0.45, 0.1])


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_batches_hold_the_images_in_order(batch_size):
    pixels = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 4, 4, 3))
    told = np.arange(40, dtype=np.float32).reshape(20, 2)
    images = Images(pixels, np.arange(20) * 10, np.arange(20).astype(str), np.full(20, "ham"), told)
    order = epoch_order(np.full(20, 1 / 20), 0, 0)
    seen = list(batches(images, even_batches(order, batch_size), CPU))
    sizes = [len(labels) for _, labels, _ in seen]
    assert len(seen) == math.ceil(20 / batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(torch.cat([labels for _, labels, _ in seen]), order * 10)
    np.testing.assert_array_equal(torch.cat([p[:, 0, 0, 0] for p, _, _ in seen]), order)
    np.testing.assert_array_equal(torch.cat([m for _, _, m in seen]), told[order])


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_processes_divide_every_batch_without_leaving_or_repeating_an_image(processes, accumulate):
    order = epoch_order(np.full(50, 1 / 50), 0, 0)
    divided = [parts_of(even_batches(order, 16), processes, process, accumulate) for process in range(processes)]
    assert {len(parts) for parts in divided} == {4 * accumulate}
    for step in range(4):
        parts = [part for parts in divided for part in parts if part.step == step]
        sizes = [len(part.images) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert sum(part.is_last for part in parts) == processes
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), parts[0].batch)
    images = np.concatenate([part.images for parts in divided for part in parts])
    assert sorted(images) == list(range(50))


# ---- augmentation


def test_an_images_view_does_not_depend_on_how_the_batch_is_divided():
    classes, pixels, labels = ("MEL", "NV", "UNK"), pictures(7, size=40), torch.arange(7) % 2
    settings = ["image_size=32", "randaugment=5", "resample=0.5", "outliers=0.3", "metadata=[age, sex]"]
    views = TrainingViews(load_config(None, settings), classes)
    metadata = torch.ones(7, 4)  # two numbers of each field
    whole = views(pixels, labels, metadata, Draws((1, 2), 7))
    rows = [slice(0, 3), slice(3, 4), slice(4, 7)]
    parts = [views(pixels[part], labels[part], metadata[part], Draws((1, 2), 7, part)) for part in rows]
    for together, *divided in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(divided), together, atol=1e-4, rtol=0)
    assert (whole[1] == 2).any()
    assert (whole[2] == 0).any()


def test_the_same_seed_gives_the_same_views():
    whole, pixels = augment(), pictures()
    first, again, other = (whole(pixels, draws(8, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_each_image_has_its_own_random_numbers():
    pixels = pictures(1).repeat(6, 1, 1, 1)
    views = augment()(pixels, draws(6))
    assert len({tuple(view.flatten()[:50].tolist()) for view in views}) == 6


def test_without_augmentation_the_image_is_standardised():
    whole = augment(*STILL, *COLOURLESS)
    pixels = pictures()
    torch.testing.assert_close(whole(pixels, draws(8)), standardise(pixels, whole.preprocessing), atol=2e-4, rtol=0)


def test_flips_and_quarter_turns_are_exact_and_all_occur():
    whole = augment(*STILL[2:], *COLOURLESS)
    picture = pictures(1)
    views = whole(picture.repeat(64, 1, 1, 1), draws(64))
    base = standardise(picture, whole.preprocessing)[0]
    eight = [torch.rot90(side, turns, (1, 2)) for side in (base, base.flip(2)) for turns in range(4)]
    found = set()
    for view in views:
        distances = [float((view - one).abs().max()) for one in eight]
        assert min(distances) < 5e-3
        found.add(int(np.argmin(distances)))
    assert found == set(range(8))


def test_a_larger_cache_is_brought_to_the_networks_size():
    views = augment(size=32)(pictures(4, size=40), draws(4))
    assert views.shape == (4, 3, 32, 32)
    assert views.is_contiguous()
    assert torch.isfinite(views).all()


def test_the_crop_keeps_the_least_share_of_the_area():
    whole = augment("crop_scale=0.5", "crop_aspect=1.3", "rotate90=false", "rotate_degrees=0", "translate=0")
    theta = whole.geometry(draws(500))
    area = (theta[:, 0, 0] * theta[:, 1, 1]).abs()
    assert area.max() <= 1.0001
    assert area.min() >= 0.5 / 1.3  # a stretched crop is cut off at the picture's edge
    assert area.min() < 0.6
    # nothing from beyond the edge
    reach = theta[:, :, 2].abs() + torch.stack([theta[:, 0, 0].abs(), theta[:, 1, 1]], 1)
    assert reach.max() <= 1.0001


def test_a_crop_turned_by_quarters_stays_in_the_picture_and_reaches_its_edges():
    turned = augment("crop_scale=0.5", "crop_aspect=1.3", "rotate_degrees=0", "translate=0")
    theta = turned.geometry(draws(500))
    reach = theta[:, :, 2].abs() + theta[:, :, :2].abs().sum(2)
    assert (reach.amax(0) <= 1.0001).all()
    assert (reach.amax(0) > 0.98).all()


def colours(overrides, pixels):
    """Only the colours change: uint8 (N, S, S, 3) to float (N, 3, S, S) in [0, 255]."""
    whole = augment(*STILL, *COLOURLESS, *overrides)
    std, mean = (torch.tensor(v)[:, None, None] for v in (whole.preprocessing.std, whole.preprocessing.mean))
    return (whole(pixels, draws(len(pixels))) * std + mean) * 255


def grey_of(images):
    return (images * torch.tensor(LUMA)[:, None, None]).sum(1)


def test_saturation_and_hue_leave_brightness_alone():
    pixels = pictures()
    before = pixels.permute(0, 3, 1, 2).float()
    after = colours(["saturation=0.5", "hue=0.2"], pixels)
    torch.testing.assert_close(grey_of(after), grey_of(before), atol=0.5, rtol=0)
    assert (after - before).abs().mean() > 5


def test_grey_stays_grey():
    grey = pictures()[..., :1].repeat(1, 1, 1, 3)
    after = colours(["saturation=0.5", "hue=0.2", "brightness=0.3", "contrast=0.3"], grey)
    assert (after.amax(1) - after.amin(1)).max() < 0.5


def test_contrast_turns_about_each_images_mean():
    pixels = pictures()
    before, after = grey_of(pixels.permute(0, 3, 1, 2).float()), grey_of(colours(["contrast=0.5"], pixels))
    torch.testing.assert_close(after.mean((1, 2)), before.mean((1, 2)), atol=0.1, rtol=0)
    ratio = after.std((1, 2)) / before.std((1, 2))
    assert ratio.min() < 0.8
    assert ratio.max() > 1.2


def test_white_balance_multiplies_each_channel_by_itself():
    pixels = pictures(32)
    before = pixels.permute(0, 3, 1, 2).float()
    ratio = (colours(["white_balance=0.2"], pixels).mean((2, 3)) / before.mean((2, 3))).T
    assert all(0.8 <= gains.min() < 0.9 and 1.1 < gains.max() <= 1.2 for gains in ratio)
    assert (ratio.amax(0) - ratio.amin(0)).median() > 0.05


def test_brightness_multiplies():
    pixels = pictures(32)
    ratio = colours(["brightness=0.4"], pixels).mean((1, 2, 3)) / pixels.float().mean((1, 2, 3))
    assert 0.6 <= ratio.min() < 0.9
    assert 1.1 < ratio.max() <= 1.4
