"""The leakage receipt of a bundle.

It detects the same file, the same ISIC image under another name and encoding, another photograph of a seen lesion, and
many near-duplicates. It accepts the model's own test split, foreign images with the same file names, and a few similar
hashes.
"""

import json

import numpy as np
import pandas as pd
import pytest

from handlers.bundle import RECEIPT, Bundle, BundleError
from handlers.files import write_json
from handlers.receipt import COPY_RADIUS, Overlap, image_identities, overlap, read_receipt
from tests.models import tiny_bundle
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.leakage import manifest_receipt

RNG = np.random.default_rng(0)


def table(count, split="test", start=0, isic=True):
    """Rows of a manifest: image `i` of lesion `i // 2`, all hashes drawn."""
    rows = []
    for i in range(start, start + count):
        sha256, phash = ("".join(RNG.choice(list("0123456789abcdef"), n)) for n in (64, 16))
        name = f"ISIC_{i:07d}" if isic else f"img_{i}"
        rows.append((name, f"HAM_{i // 2:07d}", "", split, sha256, phash, "NV", float("nan"), "", ""))
    return pd.DataFrame(
        rows, columns=["image_id", "lesion_id", "patient_id", "split", "sha256", "phash", "label", "age", "sex", "site"]
    )


@pytest.fixture(scope="module")
def known():
    parts = [table(40, "train").assign(patient_id="IP_1"), table(10, "calibration", 40), table(20, "test", 50)]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def receipt(known):
    return manifest_receipt(known, fingerprint(known))


def compare(receipt, frame) -> Overlap:
    return overlap(receipt, image_identities(frame))


def changed(row, **values):
    return pd.DataFrame([{**row, **values}])


def flipped(phash, bits):
    return f"{int(phash, 16) ^ sum(1 << (7 * i) for i in range(bits)):016x}"


def test_the_models_own_test_split_is_accepted(known, receipt):
    seen = compare(receipt, known[known["split"] == "test"])
    assert not seen.leaks
    assert "None of the 20 images" in str(seen)


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_every_split_that_training_looks_at_is_refused(known, receipt, split):
    rows = known[known["split"] == split]
    seen = compare(receipt, rows)
    assert seen.leaks
    assert seen.same_image == rows["image_id"].tolist()


def test_each_kind_of_overlap_is_named_once(known, receipt):
    row, new = known.iloc[0], table(1, start=900).iloc[0]
    cases = {
        "same_image": [
            changed(new, sha256=row["sha256"]),
            changed(new, image_id=f"{row['image_id'].lower()}_downsampled"),
        ],
        "same_lesion": [changed(new, lesion_id=row["lesion_id"])],
        "same_patient": [changed(new, patient_id=row["patient_id"])],
        "near": [changed(new, phash=flipped(row["phash"], COPY_RADIUS))],
    }
    for kind, frames in cases.items():
        for frame in frames:
            seen = compare(receipt, frame)
            assert seen.leaks
            assert {name for name in cases if getattr(seen, name)} == {kind}
            assert frame["image_id"][0] in str(seen)
    assert not compare(receipt, changed(new, phash=flipped(row["phash"], COPY_RADIUS + 1))).leaks


def test_ham10000_posing_as_another_data_set_is_caught(known, receipt):
    """Encoded again and under other names: lesion ids tell; without them the hashes do, as all are near."""
    posing = known[known["split"] == "train"].assign(
        image_id=[f"img_{i}" for i in range(40)], sha256=table(40)["sha256"].to_numpy()
    )
    assert len(compare(receipt, posing).same_lesion) == 40
    nameless = posing.assign(
        patient_id="", lesion_id=posing["image_id"], phash=[flipped(phash, 2) for phash in posing["phash"]]
    )
    assert len(compare(receipt, nameless).near) == 40
    assert compare(receipt, nameless).leaks


def test_a_few_similar_hashes_are_no_overlap(known, receipt):
    strangers = table(100, start=5000)
    strangers.loc[:3, "phash"] = known["phash"][:4].to_numpy()
    seen = compare(receipt, strangers)
    assert len(seen.near) == 4
    assert not seen.leaks


def test_foreign_files_may_have_the_same_names():
    ours, theirs = table(10, "train", isic=False), table(10, isic=False)
    ours["lesion_id"], theirs["lesion_id"] = ours["image_id"], theirs["image_id"]
    assert not compare(manifest_receipt(ours, "sha256:x"), theirs).leaks
    theirs["lesion_id"] = ours["lesion_id"] = [f"patient 7, lesion {i}" for i in range(10)]
    assert len(compare(manifest_receipt(ours, "sha256:x"), theirs).same_lesion) == 10


def test_it_is_part_of_the_bundle_and_its_digest(tmp_path, receipt):
    bundle = tiny_bundle(tmp_path / "bundle", receipt=receipt)
    assert RECEIPT in bundle.files
    assert read_receipt(bundle.path) == receipt
    write_json(bundle.path / RECEIPT, receipt.to_dict() | {"dataset_fingerprint": "sha256:another"})
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.load(bundle.path)


def test_a_missing_or_damaged_receipt_is_refused(tmp_path):
    with pytest.raises(BundleError, match=RECEIPT):
        read_receipt(tmp_path)
    for text in ("no JSON", "[]", json.dumps({"schema": 1}), json.dumps({"schema": 2})):
        (tmp_path / RECEIPT).write_text(text)
        with pytest.raises(BundleError, match=RECEIPT):
            read_receipt(tmp_path)


def test_a_receipt_without_patients_is_read(tmp_path, receipt):
    values = receipt.to_dict()
    for split in values["splits"].values():
        del split["patients"]
    write_json(tmp_path / RECEIPT, values)
    assert all(seen.patients == () for seen in read_receipt(tmp_path).splits.values())


def test_it_holds_no_picture_and_no_path(tmp_path, receipt):
    from tests.tiny_lesions import tiny_manifest

    frame = read_manifest(tiny_manifest(tmp_path))
    text = json.dumps(manifest_receipt(frame, fingerprint(frame)).to_dict())
    assert str(tmp_path) not in text
    assert frame["sha256"][0] not in text  # a prefix is enough
