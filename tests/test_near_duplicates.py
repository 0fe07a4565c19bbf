"""Near-duplicates: the same photograph stored again is found, another photograph is not.

docs/lab-notes.md has the rates on real pictures. Here drawn patterns stand for them.
"""

import hashlib
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from tests.datasets import picture, save, write
from training.data import near_duplicates
from training.data.near_duplicates import candidate_pairs, find_pairs, read_image, read_images


def pairs_among(tmp_path, images: list[Image.Image], quality: int = 92) -> list[list[int]]:
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.jpg", quality=quality)
    digests = read_images([tmp_path / f"{number}.jpg" for number in range(len(images))])
    return find_pairs(np.stack([digest.thumbnail for digest in digests]))[0].tolist()


def framed(grey: np.ndarray, radius: float) -> Image.Image:
    """Show the middle of a picture in a dark round frame."""
    y, x = np.mgrid[-1:1:150j, -1.33:1.33:200j]
    return Image.fromarray(np.where(np.hypot(x, y) < radius, grey, 4).astype(np.uint8))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: image, id="compressed again"),
        pytest.param(lambda image: image.resize((400, 300)), id="larger"),
        pytest.param(lambda image: image.resize((100, 75)), id="smaller"),
        pytest.param(lambda image: image.resize((180, 180)), id="squashed"),
        pytest.param(lambda image: ImageEnhance.Brightness(image).enhance(0.8), id="darker"),
        pytest.param(lambda image: ImageEnhance.Color(image).enhance(0.5), id="paler"),
        *(pytest.param(lambda image, t=t: image.transpose(t), id=t.name.lower()) for t in Image.Transpose),
    ],
)
def test_the_same_photograph_again(tmp_path, change):
    originals = [picture(seed, (200, 150)) for seed in range(5)]
    pairs = pairs_among(tmp_path, originals + [change(image) for image in originals], quality=60)
    assert pairs == [[seed, seed + 5] for seed in range(5)]


@pytest.mark.parametrize("radius", [0.6, 0.9])
def test_another_photograph_in_the_same_round_frame(tmp_path, radius):
    """With the frame, the detail of two photographs agrees. Only the skin inside tells them apart."""
    y, x = np.mgrid[-1:1:150j, -1.33:1.33:200j]
    spot = 180 - 60 * np.exp(-3 * (x**2 + y**2))
    grain = [np.asarray(picture(seed, (200, 150)).convert("L"), dtype=float) - 128 for seed in range(8)]
    photographs = [framed(spot + 0.2 * noise, radius) for noise in grain]
    assert pairs_among(tmp_path, [*photographs, photographs[0].resize((180, 180))]) == [[0, 8]]
    thumbnails = np.stack([np.asarray(photo.resize((64, 64), Image.Resampling.BOX)) for photo in photographs])
    pairs = np.array(list(combinations(range(8), 2)))
    with_frame = [(grey - cv2.GaussianBlur(grey, (0, 0), 2.0)).ravel() for grey in thumbnails.astype(np.float32)]
    assert min(np.corrcoef(with_frame[i], with_frame[j])[0, 1] for i, j in pairs) > 0.85
    details = near_duplicates._Details(thumbnails, [pairs], np.arange(64))
    assert details.correlations(pairs, 0, 0.15).max() < 0.7


def flipped(value: int, bits: Sequence[int]) -> int:
    return value ^ sum(1 << bit for bit in bits)


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=10),
    st.lists(st.sets(st.integers(0, 63), max_size=10).map(sorted), max_size=30),
)
def test_candidates_are_all_pairs_within_the_radius(values, changes):
    """Hashes that differ from another in up to 10 bits are on both sides of the radius."""
    values += [flipped(values[number % len(values)], bits) for number, bits in enumerate(changes)]
    pairs = candidate_pairs(*[np.array(values, dtype=np.uint64)] * 2)
    expected = [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= near_duplicates.HASH_RADIUS
    ]
    assert [tuple(pair) for pair in pairs.tolist()] == expected


def test_candidates_across_blocks(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", 7)
    values = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    values[100:140] = values[5]
    pairs = candidate_pairs(values, values)
    assert len(pairs) == 41 * 40 // 2
    assert set(pairs.ravel().tolist()) == {5, *range(100, 140)}


def test_flat_pictures_are_no_near_duplicates():
    flat = np.stack([np.full((64, 64), grey, np.uint8) for grey in (0, 0, 200, 255)])
    assert len(find_pairs(flat)[0]) == 0


def test_all_orientations_are_different():
    corner = np.arange(9).reshape(1, 3, 3)
    assert (
        len({near_duplicates.orient(corner, number).tobytes() for number in range(near_duplicates.ORIENTATIONS)}) == 8
    )


def test_threads_read_the_same_as_one_and_in_order(tmp_path):
    paths = [save(tmp_path / f"{seed}.jpg", seed) for seed in range(20)]
    paths[7] = write(tmp_path / "bad.jpg", b"bad")
    calls = []
    together = read_images(paths, workers=8, progress=lambda done, total: calls.append((done, total)))
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

    monkeypatch.setattr(near_duplicates, "read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        read_images([Path("1.jpg")] * 5000, workers=1, progress=interrupt)
    assert len(read) < 2500  # all 5,000 would take 50 seconds


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "mole.jpg").touch()
    assert read_image(tmp_path / "mole.jpg") == "The file is empty."
