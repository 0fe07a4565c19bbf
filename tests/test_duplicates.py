"""Near duplicates: the same photograph stored again is found, another photograph is not.

The rates on real images stand in training/data/duplicates.py; here drawn patterns stand for them.
"""

import hashlib
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from tests.datasets import picture, save, write
from training.data import duplicates
from training.data.duplicates import candidate_pairs, confirm, read_image, read_images


def same(tmp_path, first: Image.Image, second: Image.Image, **options) -> bool:
    first.save(tmp_path / "a.jpg", quality=92)
    second.save(tmp_path / "b.jpg", **{"quality": 92, **options})
    images = [image for image in read_images([tmp_path / "a.jpg", tmp_path / "b.jpg"]) if not isinstance(image, str)]
    pairs = candidate_pairs(np.array([image.phash for image in images], dtype=np.uint64))
    return len(pairs) == 1 and bool(confirm(np.stack([image.thumbnail for image in images]), pairs)[0])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: image, id="compressed again"),
        pytest.param(lambda image: image.resize((400, 300)), id="larger"),
        pytest.param(lambda image: image.resize((100, 75)), id="smaller"),
        pytest.param(lambda image: image.resize((180, 180)), id="squashed"),
        pytest.param(lambda image: ImageEnhance.Brightness(image).enhance(0.8), id="darker"),
        pytest.param(lambda image: ImageEnhance.Color(image).enhance(0.5), id="paler"),
    ],
)
def test_the_same_photograph_again(tmp_path, change):
    for seed in range(5):
        image = picture(seed, (200, 150))
        assert same(tmp_path, image, change(image), quality=60)


def test_another_photograph_of_the_same_make(tmp_path):
    """A dark spot in a round vignette, twice: alike to the coarse measures, told apart by the detail."""

    def spot(seed: int) -> Image.Image:
        y, x = np.mgrid[-1:1:150j, -1.33:1.33:200j]
        radius = np.hypot(x, y)
        grey = 200 * np.exp(-(radius**6)) - 120 * np.exp(-10 * radius**2)
        grain = np.asarray(picture(seed, (200, 150)).convert("L"), dtype=float) - 128
        return Image.fromarray(np.clip(grey + 0.12 * grain, 0, 255).astype(np.uint8))

    assert same(tmp_path, spot(0), spot(0).resize((180, 180)), quality=85)
    thumbnails = np.stack([np.asarray(spot(seed).resize((64, 64), Image.Resampling.BOX)) for seed in range(8)])
    pairs = np.array(list(combinations(range(8), 2)))
    coarse = duplicates._coarse(thumbnails.astype(np.float32))
    alike = np.abs(coarse[pairs[:, 0]] - coarse[pairs[:, 1]]).mean(axis=1) <= duplicates.MAX_COARSE_DIFFERENCE
    assert alike.all()
    assert not confirm(thumbnails, pairs).any()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(0, 64), st.sampled_from([0, 1, 2, 3]))
def test_candidates_are_all_pairs_within_the_radius(values, radius, copies):
    values += values[:copies] + [value ^ 0b1011 for value in values[:copies]]
    pairs = candidate_pairs(np.array(values, dtype=np.uint64), radius)
    expected = [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= radius
    ]
    assert [tuple(pair) for pair in pairs.tolist()] == expected


def test_candidates_across_blocks():
    values = np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)
    values[2999] = values[3] ^ np.uint64(1)
    values[1500] = values[1400]
    assert candidate_pairs(values, 4).tolist() == [[3, 2999], [1400, 1500]]


def test_flat_pictures_are_the_same_only_if_equal():
    flat = np.stack([np.full((64, 64), grey, np.uint8) for grey in (0, 0, 255)])
    assert confirm(flat, np.array([[0, 1], [0, 2]])).tolist() == [True, False]


def test_threads_read_the_same_as_one_and_in_order(tmp_path):
    paths = [save(tmp_path / f"{seed}.jpg", seed) for seed in range(20)]
    paths[7] = write(tmp_path / "bad.jpg", b"bad")
    calls = []
    together = read_images(paths, workers=8, progress=lambda *told: calls.append(told))
    assert calls == [(done, 20) for done in range(1, 21)]
    for path, image in zip(paths, together, strict=True):
        alone = read_image(path)
        if isinstance(image, str) or isinstance(alone, str):
            assert image == alone
            assert path == paths[7]
        else:
            assert (image.sha256, image.phash) == (alone.sha256, alone.phash)
            assert (image.thumbnail == alone.thumbnail).all()
    assert hashlib.sha256(paths[3].read_bytes()).hexdigest() == together[3].sha256


def test_an_interrupt_ends_the_reading(monkeypatch):
    read = []

    def slow(path: Path) -> str:
        read.append(path)
        time.sleep(0.01)
        return "read"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        read_images([Path("1.jpg")] * 5000, workers=1, progress=interrupt)
    assert len(read) < 2500  # all 5,000 would take 50 seconds


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "mole.jpg").touch()
    assert read_image(tmp_path / "mole.jpg") == "The file is empty."
