"""Corrections join a manifest: a picture keeps its split for ever, and none is both for testing and for training."""

import hashlib
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.receipt import CORRECTION, ImageIdentity, image_identities, make_receipt
from scripts.retrain import NothingToLearn, joined_manifest, without_seen
from training.data.corrected_pictures import SHARES, CorrectedPicture, correction_split, with_corrections
from training.data.data_sets import CORRECTIONS
from training.data.manifest import read_manifest, write_manifest
from training.data.near_duplicates import describe, hash_text
from training.data.synthetic import draw_lesion
from training.evaluation.leakage import manifest_receipt


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[CorrectedPicture]:
    """Twenty corrections, of which every fifth is random."""
    folder = tmp_path_factory.mktemp("kept")
    made = []
    for number in range(20):
        sha256 = hashlib.sha256(f"upload {number}".encode()).hexdigest()
        path = folder / f"{sha256}.jpg"
        draw_lesion(number, "MEL" if number % 2 else "NV", size=(96, 72)).save(path, quality=90)
        made.append(CorrectedPicture(path, sha256, "MEL" if number % 2 else "NV", number % 5 == 0))
    return made


def manifest_of(folder: Path, pictures: list[CorrectedPicture], split: str) -> pd.DataFrame:
    """A manifest of other copies of some pictures, all in one split."""
    rows = []
    for number, picture in enumerate(pictures):
        image = describe(picture.path.read_bytes())
        names = {"image_id": f"image{number}", "label": picture.label, "lesion_id": f"lesion{number}", "split": split}
        row = {"path": str(picture.path), "patient_id": "", "source": "folder", "age": "", "sex": "", "site": ""}
        rows.append(names | row | {"sha256": image.sha256, "phash": hash_text(image.phash)})
    write_manifest(folder / "manifest.csv", pd.DataFrame(rows))
    return read_manifest(folder / "manifest.csv")


def splits(frame: pd.DataFrame) -> dict[str, str]:
    corrections = frame[frame["source"] == CORRECTIONS]
    return dict(zip(corrections["image_id"].str.removeprefix(CORRECTION), corrections["split"], strict=True))


def learned(frame: pd.DataFrame) -> set[str]:
    """The corrections in the receipt of a model that is made from a manifest."""
    seen = manifest_receipt(frame, "sha256:x").splits.values()
    return {digits for split in seen for digits in split.corrections}


def test_corrections_are_a_source_of_their_own_whose_random_share_is_for_testing(tmp_path, pictures):
    frame = manifest_of(tmp_path, pictures[19:], "train")
    joined, left_out = with_corrections(frame, pictures[:19])
    assert not left_out
    assert len(joined) == 20
    random = {picture.sha256 for picture in pictures[:19] if picture.is_random}
    assert {sha256 for sha256, split in splits(joined).items() if split == "test"} == random
    write_manifest(tmp_path / "joined.csv", joined)
    again = read_manifest(tmp_path / "joined.csv")
    assert learned(again) == {sha256[:16] for sha256 in splits(joined)} - {sha256[:16] for sha256 in random}


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), first=st.integers(1, 11))
def test_later_corrections_move_none_of_the_earlier(pictures, order, first):
    frame = pd.DataFrame(columns=["path", "image_id", "lesion_id", "split", "source", "phash"])
    chosen = [pictures[number] for number in order]
    before, after = (splits(with_corrections(frame, part)[0]) for part in (chosen[:first], chosen))
    assert before.items() <= after.items()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_copy_follows_the_manifest_and_is_never_tested_on_what_trains(tmp_path, pictures, split):
    frame = manifest_of(tmp_path, pictures, split)
    joined, left_out = with_corrections(frame, pictures)
    random = sum(picture.is_random for picture in pictures)
    assert left_out.total() == (0 if split == "test" else random)
    assert set(splits(joined).values()) == {split}
    write_manifest(tmp_path / "joined.csv", joined)
    again = read_manifest(tmp_path / "joined.csv")  # no split divides a lesion
    joined_lesions = {sha256[:16] for sha256 in splits(joined)}
    assert learned(again) == (set() if split == "test" else joined_lesions), "also those of a known lesion"


def test_too_few_corrections_are_a_sentence_and_random_ones_do_not_count(tmp_path, pictures):
    frame = manifest_of(tmp_path, pictures[19:], "train")
    with pytest.raises(NothingToLearn, match="There are 15 corrections to learn from, and at least 16 are needed"):
        joined_manifest(frame, pictures[:19], 16)
    assert len(joined_manifest(frame, pictures[:19], 15)) == 20


def test_a_correction_that_the_champion_has_seen_in_another_split_is_left_out(tmp_path, pictures):
    joined = joined_manifest(manifest_of(tmp_path, pictures[19:], "train"), pictures[:19], 1)
    apart = joined[(joined["source"] == CORRECTIONS) & (joined["split"] != "train")]
    receipt = make_receipt({"train": image_identities(apart.iloc[:2])}, "sha256:x")
    assert set(joined["image_id"]) - set(without_seen(joined, receipt)["image_id"]) == set(apart["image_id"].iloc[:2])
    assert len(without_seen(joined, make_receipt({}, "sha256:x"))) == len(joined)


def test_a_damaged_file_is_left_out(tmp_path, pictures):
    (tmp_path / "damaged.jpg").write_bytes(b"no picture")
    damaged = CorrectedPicture(tmp_path / "damaged.jpg", "0" * 64, "NV", False)
    _, left_out = with_corrections(manifest_of(tmp_path, pictures[:1], "train"), [damaged])
    assert left_out == Counter({"have a file that cannot be read": 1})


def test_splits_have_their_shares():
    counts = Counter(correction_split(hashlib.sha256(str(i).encode()).hexdigest()) for i in range(4000))
    assert {split: counts[split] / 4000 for split in SHARES} == pytest.approx(SHARES, abs=0.03)


def test_a_receipt_without_a_split_knows_the_others():
    images = [ImageIdentity("correction-" + "1" * 64, "1" * 64, "lesion", "0" * 16, "")]
    receipt = make_receipt({"train": images, "val": images}, "sha256:x")
    assert receipt.without("val").splits.keys() == {"train"}
    assert receipt.splits["train"].corrections == ("1" * 16,)
