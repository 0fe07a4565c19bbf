"""The manifest has one checked row per photograph, with the best label; no lesion or patient is in two splits.

The best authority on an image decides its diagnosis; an image on which it contradicts itself is left out. Copies become
one row. Near-duplicates and images of one lesion become one group, but no chain of near-duplicates joins lesions or
patients that are known to differ. A Test/ folder and official test sets stay test, with their whole groups. The same
data give the same bytes and fingerprint, wherever they lie. Files are written whole or not at all.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.prepare_data import prepare
from tests.commands import invoke
from tests.datasets import class_folders, ham10000, isic2019_truth, picture, save, write
from training.data.data_sets import data_sets
from training.data.manifest import COLUMNS, ManifestError, fingerprint, read_manifest
from training.data.preparation import SharesError, build_manifest
from training.data.splits import SPLITS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path):
    """Return a function: folders -> the manifest by image id. Its attribute `report` is the last report."""

    def run(*directories, **options):
        out = tmp_path / "out" / "manifest.csv"
        run.report = build_manifest(directories, out, **options)
        return read_manifest(out).set_index("image_id")

    return run


def kinds(part: dict) -> str:
    return " | ".join(part)


# Whose word counts


def test_isic2019_truth_speaks_of_images_in_other_data_sets(tmp_path, build):
    ham = ham10000(tmp_path / "ham", [f"HAM_{n},ISIC_000000{n},akiec,histo,60,male,face" for n in (1, 2, 3)])
    nine = class_folders(tmp_path / "nine", {"Train/nevus/ISIC_0000004(1).jpg": 4, "Train/nevus/ISIC_0000005.jpg": 5})
    csvs = isic2019_truth(
        tmp_path / "csv" / "ISIC_2019_Training_GroundTruth.csv",
        {"ISIC_0000001": "SCC", "ISIC_0000002_downsampled": "AK", "ISIC_0000004_downsampled": "MEL"},
    ).parent
    frame = build(ham, nine, csvs)
    assert list(frame["label"]) == ["SCC", "AK", "AK", "MEL", "NV"]
    assert list(frame["source"]) == ["ham10000"] * 3 + ["folder"] * 2
    assert build.report["labels_settled_by"] == {"isic2019": 3, "ham10000": 1, "folder": 1}
    assert "ham10000 says AK, overruled by isic2019: SCC" in build.report["notes"]
    assert "folder says NV, overruled by isic2019: MEL" in build.report["notes"]
    assert build.report["notes"]["akiec without an ISIC 2019 truth: taken as AK, may be SCC"]["count"] == 1


def test_the_order_of_authorities(tmp_path, build):
    """Five sources describe one image. With the best removed, the next decides."""
    data = tmp_path / "data"
    save(data / "melanoma" / "ISIC_0000001.jpg", 1)
    isic2019_truth(data / "a.csv", {"ISIC_0000001": "VASC"})
    write(data / "b.csv", "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_0000001,0,0,0,0,0,1,0\n")
    write(data / "c.csv", "lesion_id,image_id,dx\nHAM_1,ISIC_0000001,bkl\n")
    write(data / "d.csv", "image,label\nISIC_0000001,BCC\n")
    seen = []
    for table in ("a.csv", "b.csv", "c.csv", "d.csv"):
        seen += list(build(data)["label"])
        (data / table).unlink()
    seen += list(build(data)["label"])
    assert seen == ["VASC", "DF", "BKL", "BCC", "MEL"]


def test_what_folders_alone_contradict_is_left_out(tmp_path, build):
    nine = class_folders(
        tmp_path / "nine",
        {"Train/melanoma/ISIC_0000001.jpg": 1, "Train/seborrheic keratosis/ISIC_0000001.jpg": 1,  # same id
         "Train/melanoma/x.jpg": 2, "Train/seborrheic keratosis/y.jpg": 2,  # same bytes
         "Train/melanoma/z.jpg": 3, "Train/nevus/w.jpg": 4,
         "Train/nevus/ISIC_0000006.jpg": 6, "Train/actinic keratosis/ISIC_0000006.jpg": 6},
    )  # fmt: skip
    save(nine / "Train" / "nevus" / "z again.jpg", 3, size=(180, 180), quality=80)  # near-duplicate
    csvs = isic2019_truth(tmp_path / "csv" / "truth.csv", {"ISIC_0000006": "AK"}).parent
    frame = build(nine, csvs)
    assert frame["label"].to_dict() == {"w": "NV", "ISIC_0000006": "AK", "z": "MEL", "z again": "NV"}
    assert build.report["dropped"]["contradictory diagnoses from folders alone"]["count"] == 2
    assert build.report["notes"]["near-duplicates with different diagnoses"]["count"] == 1
    assert frame.loc["z", "lesion_id"] == frame.loc["z again", "lesion_id"]


def test_a_near_duplicate_of_a_known_image_takes_its_diagnosis(tmp_path, build):
    nine = class_folders(tmp_path / "nine", {"Train/seborrheic keratosis/photo.jpg": 1})
    ham = tmp_path / "ham"
    write(ham / "HAM10000_metadata.csv", "lesion_id,image_id,dx\nHAM_1,ISIC_0000001,mel\n")
    save(ham / "ISIC_0000001.jpg", 1, size=(180, 180), quality=80)
    frame = build(nine, ham)
    assert frame["label"].to_dict() == {"ISIC_0000001": "MEL", "photo": "MEL"}
    assert set(frame["lesion_id"]) == {"HAM_1"}
    assert build.report["duplicates"]["near_pairs"] == 1


def test_tables_that_contradict_each_other_about_one_photograph(tmp_path, build):
    data = class_folders(tmp_path / "x", {"i/ISIC_0000001.jpg": 1, "i/ISIC_0000003.jpg": 3})
    save(data / "i" / "ISIC_0000002.jpg", 1, quality=60)
    isic2019_truth(data / "t.csv", {"ISIC_0000001": "MEL", "ISIC_0000002": "BKL", "ISIC_0000003": "NV"})
    assert list(build(data)["label"]) == ["MEL", "BKL", "NV"]
    assert build.report["notes"]["near-duplicates with different diagnoses"]["count"] == 1


# Copies, groups, splits


def test_copies_become_one_row(tmp_path, build):
    """The file that is kept is that of the first data set in the order of authorities, then the largest."""
    ham = ham10000(tmp_path / "ham", ["HAM_1,ISIC_0000001,nv,histo,40,male,back"])
    save(ham / "images" / "ISIC_0000001(1).jpg", 77, size=(300, 200))  # another picture under the same id
    nine = tmp_path / "nine"
    save(nine / "Train" / "nevus" / "ISIC_0000001.jpg", 1, size=(200, 200))
    save(nine / "Train" / "nevus" / "mole.jpg", 5)
    save(nine / "Train" / "nevus" / "mole 2.jpg", 5)
    frame = build(nine, ham)
    assert frame["image"].str.rsplit("/", n=1).str[1].to_dict() == {
        "ISIC_0000001": "ISIC_0000001.jpg", "mole": "mole.jpg"
    }  # fmt: skip
    assert frame.loc["ISIC_0000001", "source"] == "ham10000"
    assert set(frame["lesion_id"]) == {"HAM_1", "mole"}
    found = build.report["duplicates"]
    assert (found["copies_of_one_file"], found["copies_by_isic_identifier"]) == (1, 2)
    assert len(found["largest_set"]) == 3
    assert "same ISIC identifier, different picture" in build.report["notes"]


def test_groups_join_lesions_and_duplicates(tmp_path, build):
    """1 and 2 share a lesion, 2 and 3 are the same photograph: one group of three."""
    data = tmp_path / "mine"
    write(data / "labels.csv", "image,label,lesion_id\n1,NV,A\n2,NV,A\n3,NV,\n5,NV,\n6,NV,C\n")
    for seed in (1, 2, 5, 6):
        save(data / f"{seed}.jpg", seed)
    save(data / "3.jpg", 2, size=(180, 180), quality=80)
    frame = build(data)
    assert frame["lesion_id"].to_dict() == {"1": "A", "2": "A", "3": "A", "5": "5", "6": "C"}
    assert build.report["largest_group"] == {"lesion_id": "A", "images": 3}
    assert frame.groupby("lesion_id")["split"].nunique().max() == 1


def test_what_is_dropped_still_joins_what_it_belongs_to(tmp_path, build):
    """1 is the same photograph as 2. The undiagnosed 2 shows the lesion of 3: one group."""
    data = tmp_path / "mine"
    write(data / "labels.csv", "image,label,lesion_id\n2,,L\n3,MEL,L\n")
    save(data / "melanoma" / "1.jpg", 1)
    save(data / "2.jpg", 1, size=(180, 180), quality=80)
    save(data / "3.jpg", 3)
    assert build(data)["lesion_id"].to_dict() == {"1": "L", "3": "L"}


def test_a_dropped_copy_in_a_test_folder_keeps_its_group_in_test(tmp_path, build):
    data = class_folders(tmp_path / "x", {f"Train/nevus/{n}.jpg": n for n in range(8)})
    save(data / "Test" / "unsorted" / "again.jpg", 3, size=(180, 180), quality=80)
    frame = build(data, fractions={"train": 1, "val": 0, "calibration": 0, "test": 0})
    assert "again" not in frame.index
    assert list(frame.index[frame["split"] == "test"]) == ["3"]
    assert list(frame["lesion_id"]) == list(frame.index)  # named after an image that is there


def test_a_test_folder_stays_test_and_takes_its_groups_with_it(tmp_path, build):
    ham = ham10000(
        tmp_path / "ham",
        [f"HAM_{number // 2},ISIC_{number:07},nv,,,," for number in range(20)],  # two images a lesion
    )
    nine = class_folders(tmp_path / "nine", {"Test/nevus/ISIC_0000004.jpg": 4, "TEST/nevus/new.jpg": 99})
    save(nine / "Train" / "nevus" / "new again.jpg", 99, size=(180, 180), quality=80)
    frame = build(ham, nine, fractions={"train": 0.8, "val": 0.1, "calibration": 0.1, "test": 0})
    # ISIC_0000004 is in HAM10000 too, whose ISIC_0000005 shows the same lesion.
    assert sorted(frame.index[frame["split"] == "test"]) == ["ISIC_0000004", "ISIC_0000005", "new", "new again"]
    assert build.report["groups_fixed_as_test"] == 2


def test_the_official_test_set_stays_test_and_may_hold_unk(tmp_path, build):
    ham = ham10000(tmp_path / "ham", [f"HAM_{number},ISIC_{number:07},nv,,,," for number in range(10)])
    isic = tmp_path / "isic"
    isic2019_truth(isic / "ISIC_2019_Test_GroundTruth.csv", {"ISIC_0000003": "UNK", "ISIC_0000020": "UNK"})
    save(isic / "ISIC_2019_Test_Input" / "ISIC_0000020.jpg", 20)
    frame = build(ham, isic)
    assert frame.loc[["ISIC_0000003", "ISIC_0000020"], ["label", "split"]].to_numpy().tolist() == [["UNK", "test"]] * 2
    assert build.report["groups_fixed_as_test"] == 2


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(
        # The picture's seed (few: many duplicates); has a lesion id; its class; under Test/; squashed.
        st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from(["MEL", "NV"]), st.booleans(), st.booleans()),
        min_size=1, max_size=16,
    )
)  # fmt: skip
def test_no_lesion_and_no_photograph_is_in_two_splits(tmp_path_factory, images):
    data = tmp_path_factory.mktemp("data")
    lines, shown = ["image,label,lesion_id"], {}
    for number, (seed, has_lesion, code, test, squashed) in enumerate(images):
        folder, lesion = "Test" if test else "Train", has_lesion * (1 + seed // 2)
        name = f"ISIC_{number:07}" if number % 3 == 0 else str(number)
        save(data / folder / f"{name}.jpg", seed, size=(90, 90) if squashed else (96, 72))
        lines.append(f"{folder}/{name}.jpg,{code},{lesion or ''}")
        shown[name] = (seed, lesion, folder)
    write(data / "labels.csv", "\n".join([*lines, "always,NV,"]))
    save(data / "Train" / "always.jpg", 1000)  # the others may all contradict each other
    shown["always"] = (1000, 0, "Train")
    build_manifest([data], data / "m.csv")
    frame = read_manifest(data / "m.csv").set_index("image_id")
    splits_of = {}
    for name, split in frame["split"].items():
        seed, lesion, folder = shown[name.partition("@")[0]]
        splits_of.setdefault(("photo", seed), set()).add(split)
        if lesion:
            splits_of.setdefault(("lesion", lesion), set()).add(split)
        assert folder == "Train" or split == "test"
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_a_lesion_of_two_parts_of_a_data_set_is_one(tmp_path):
    for part in ("train", "test"):
        rows = "".join(f"{part}{number}.jpg,NV,L{number}\n" for number in range(8))
        write(tmp_path / "set" / part / "labels.csv", "image,label,lesion_id\n" + rows)
        for number in range(8):
            save(tmp_path / "set" / part / f"{part}{number}.jpg", number + 100 * len(part))
    for data in ([tmp_path / "set"], [tmp_path / "set" / "train", tmp_path / "set" / "test"]):
        build_manifest(data, tmp_path / "m.csv")
        frame = read_manifest(tmp_path / "m.csv").set_index("image_id")
        for number in range(8):
            assert frame.loc[f"train{number}", "lesion_id"] == frame.loc[f"test{number}", "lesion_id"]


def test_equal_lesion_ids_of_two_folders_are_different_lesions_and_reported(tmp_path):
    for clinic in ("north", "south"):
        write(tmp_path / clinic / "labels.csv", f"image,label,lesion_id\n{clinic}.jpg,NV,L1\n")
        save(tmp_path / clinic / f"{clinic}.jpg", len(clinic) + ord(clinic[0]))
    report = build_manifest([tmp_path], tmp_path / "m.csv")
    assert report["groups"] == 2
    [note] = [entry for kind, entry in report["notes"].items() if "taken for different lesions" in kind]
    assert note == {"count": 1, "examples": ["L1"]}


def test_a_near_duplicate_of_a_copy_that_is_not_kept_is_of_its_group(tmp_path):
    """Two files have one ISIC identifier and show different pictures. A third is a smaller copy of the second."""
    rows = [f"HAM_{number},ISIC_{number:07},nv,,,," for number in range(10)]
    ham = ham10000(tmp_path / "ham", rows)
    nine = tmp_path / "nine"
    for number in range(10):
        save(nine / "nevus" / f"ISIC_{number:07}.jpg", 500 + number)
        save(nine / "nevus" / f"mole_{number}.jpg", 500 + number, size=(80, 60))
    build_manifest([ham, nine], tmp_path / "m.csv")
    frame = read_manifest(tmp_path / "m.csv").set_index("image_id")
    for number in range(10):
        assert frame.loc[f"mole_{number}", "lesion_id"] == frame.loc[f"ISIC_{number:07}", "lesion_id"]


# The same data, the same manifest


@pytest.fixture
def mixed(tmp_path):
    """A HAM10000 and class folders that overlap, with some lesions and near duplicates."""
    rows = [
        f"HAM_{number // 2},ISIC_{number:07},{'nv' if number < 20 else 'mel'},,50,male,back" for number in range(30)
    ]
    ham = ham10000(tmp_path / "data" / "ham", rows)
    names = {
        f"{'Test' if n % 7 == 0 else 'Train'}/nevus/ISIC_{n:07}.jpg": n for n in range(0, 40, 3) if not 20 <= n < 30
    }
    nine = class_folders(tmp_path / "data" / "nine", names)
    save(nine / "Train" / "nevus" / "other.jpg", 33, size=(150, 150))
    return ham, nine


def test_the_same_bytes_again_and_in_any_order(tmp_path, mixed):
    out = tmp_path / "one" / "m.csv"
    written = []
    for directories in (mixed, mixed[::-1], (mixed[0].parent,)):
        build_manifest(directories, out)
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    everything = mixed[0].parent
    for directories in ((everything, mixed[1]), (mixed[1], everything), (mixed[1] / "Train" / "nevus", everything)):
        build_manifest(directories, out)
        assert out.read_bytes() == written[0]
    build_manifest([everything, everything], out)
    report = (tmp_path / "one" / "m.report.json").read_bytes()
    build_manifest([everything], out)
    assert (tmp_path / "one" / "m.report.json").read_bytes() == report


def test_the_fingerprint_knows_content_and_not_place(tmp_path, mixed):
    first = build_manifest(mixed, tmp_path / "m.csv")["fingerprint"]
    assert re.fullmatch("sha256:[0-9a-f]{64}", first)
    moved = shutil.copytree(mixed[0].parent, tmp_path / "elsewhere" / "deeper")
    assert build_manifest([moved / "ham", moved / "nine"], tmp_path / "other" / "m.csv")["fingerprint"] == first

    frame = read_manifest(tmp_path / "m.csv")
    assert fingerprint(frame) == first
    assert fingerprint(frame.sample(frac=1, random_state=0)) == first
    for column, value in {"label": "DF", "split": "val", "lesion_id": "x", "sha256": "0" * 64, "age": 1.0, "sex": "",
                          "site": "x"}.items():  # fmt: skip
        changed = frame.copy()
        changed.loc[3, column] = value
        assert fingerprint(changed) != first, column
    assert build_manifest(mixed, tmp_path / "m.csv", seed=1)["fingerprint"] != first


def test_report(tmp_path, mixed):
    report = build_manifest(mixed, tmp_path / "m.csv")
    assert report == json.loads((tmp_path / "m.report.json").read_text())
    frame = read_manifest(tmp_path / "m.csv")
    assert report["images"] == len(frame)
    assert report["groups"] == frame["lesion_id"].nunique()
    for name, (rows, columns) in {
        "class_by_split": ("label", "split"),
        "source_by_split": ("source", "split"),
        "class_by_source": ("label", "source"),
    }.items():
        counts = pd.DataFrame(report["counts"][name]).T
        expected = pd.crosstab(frame[rows], frame[columns]).loc[counts.index, counts.columns]
        assert (counts.to_numpy() == expected.to_numpy()).all()
        assert counts.to_numpy().sum() == len(frame)
    dropped = sum(entry["count"] for entry in report["dropped"].values())
    assert report["image_files"] == len(frame) + dropped
    assert report["data"][0]["tables"][0]["kind"] == "ham10000"


def test_shares_and_seed_are_options(tmp_path, build):
    data = class_folders(tmp_path / "x", {f"nevus/{number}.jpg": number for number in range(20)})
    frame = build(data, fractions={"train": 0.5, "val": 0.2, "calibration": 0.2, "test": 0.1})
    assert frame["split"].value_counts().to_dict() == {"train": 10, "val": 4, "calibration": 4, "test": 2}
    assert not build(data, seed=5)["split"].equals(build(data)["split"])
    build(data, fractions={"train": 0.9, "val": 0.1, "calibration": 0, "test": 0})
    assert "class without an image in calibration" in build.report["notes"]


@pytest.mark.parametrize(
    "fractions",
    [{"train": 0.7, "val": 0.1}, dict.fromkeys(SPLITS, 0.3), dict(zip(SPLITS, (1.2, -0.1, -0.1, 0), strict=True)),
     dict(zip(SPLITS, (0, 0.4, 0.3, 0.3), strict=True)), dict.fromkeys(SPLITS, float("nan"))],
)  # fmt: skip
def test_shares_that_make_no_sense(tmp_path, build, fractions):
    data = class_folders(tmp_path / "x", {"nevus/1.jpg": 1})
    with pytest.raises(SharesError, match="share"):
        build(data, fractions=fractions)


# Writing and reading


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    data = class_folders(tmp_path / "x", {"nevus/1.jpg": 1})
    out = tmp_path / "out" / "m.csv"
    build_manifest([data], out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    save(data / "nevus" / "2.jpg", 2)
    os.link(out, tmp_path / "old.csv")
    build_manifest([data], out)  # another file takes the name: who reads the old one reads it to the end
    assert (tmp_path / "old.csv").read_bytes() == before[out] != out.read_bytes()
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    save(data / "nevus" / "3.jpg", 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ManifestError, match="cannot be written: No space left on device"):
        build_manifest([data], out)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


def test_an_out_that_cannot_be(tmp_path):
    data = class_folders(tmp_path / "x", {"nevus/1.jpg": 1})
    write(tmp_path / "file", "")
    with pytest.raises(ManifestError, match="cannot be written"):
        build_manifest([data], tmp_path / "file" / "m.csv")
    with pytest.raises(ManifestError, match="cannot be written"):
        build_manifest([data], tmp_path / "x")  # a folder


def test_paths_below_the_manifest_are_relative_and_move_with_it(tmp_path):
    inside = class_folders(tmp_path / "data" / "nine", {"nevus/ä, b.jpg": 1})
    outside = class_folders(tmp_path / "more", {"melanoma/2.jpg": 2})
    build_manifest([inside, outside], tmp_path / "data" / "manifest.csv")
    frame = read_manifest(tmp_path / "data" / "manifest.csv")
    assert tuple(frame.columns) == (*COLUMNS, "path")
    assert sorted(frame["image"]) == sorted(["nine/nevus/ä, b.jpg", str(tmp_path / "more" / "melanoma" / "2.jpg")])
    (tmp_path / "data").rename(tmp_path / "moved")
    frame = read_manifest(tmp_path / "moved" / "manifest.csv")
    assert str(tmp_path / "moved" / "nine" / "nevus" / "ä, b.jpg") in list(frame["path"])
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in frame["path"])
    (tmp_path / "more" / "melanoma" / "2.jpg").unlink()
    with pytest.raises(ManifestError, match="1 of the 2 images"):
        read_manifest(tmp_path / "moved" / "manifest.csv")


def test_types_and_hashes(tmp_path, build):
    frame = build(class_folders(tmp_path / "x", {"nevus/1.jpg": 1}))
    assert frame["age"].dtype == np.float64
    assert re.fullmatch("[0-9a-f]{16}", frame.loc["1", "phash"])
    assert frame.loc["1", "site"] == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda frame: frame.drop(columns=["phash", "sex"]), "lacks the column sex, phash"),
        (
            lambda frame: frame.assign(label=["NV", "MELANOMA"]),
            "Line 3 of m.csv has the wrong label 'MELANOMA'. The column label holds one of MEL",
        ),
        (lambda frame: frame.assign(split="dev"), "Line 2 of m.csv has the wrong split 'dev'"),
        (lambda frame: frame.assign(source="web"), "wrong source 'web'"),
        (lambda frame: frame.assign(lesion_id=["", "x"]), "wrong lesion_id ''"),
        (lambda frame: frame.assign(sha256="abc"), "wrong sha256 'abc'"),
        (lambda frame: frame.assign(phash="xyz"), "wrong phash 'xyz'"),
        (lambda frame: frame.assign(age="old"), "wrong age 'old'"),
        (lambda frame: frame.assign(image_id="same"), "Line 3 of m.csv has the wrong image_id 'same'"),
        (lambda frame: frame.assign(lesion_id="same", split=["train", "test"]), "the lesion same into several splits"),
        (lambda frame: frame.assign(patient_id="p", split=["train", "test"]), "the patient p into several splits"),
        (lambda frame: frame.iloc[:0], "no rows"),
    ],
    ids=lambda value: "" if callable(value) else value,
)
def test_a_manifest_that_was_tampered_with(tmp_path, change, sentence):
    path = tmp_path / "m.csv"
    build_manifest([class_folders(tmp_path / "x", {"nevus/1.jpg": 1, "melanoma/2.jpg": 2})], path)
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert sentence in str(error.value).replace(f"{tmp_path}/", "")


def test_a_manifest_with_a_comma_too_many_in_each_row(tmp_path):
    path = tmp_path / "m.csv"
    build_manifest([class_folders(tmp_path / "x", {"nevus/1.jpg": 1, "melanoma/2.jpg": 2})], path)
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row + "," for row in rows)]) + "\n")
    with pytest.raises(ManifestError, match="more fields than the header"):
        read_manifest(path)


def test_no_manifest(tmp_path):
    with pytest.raises(ManifestError, match="There is no manifest"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(write(tmp_path / "empty.csv", ""))
    picture(1).save(tmp_path / "picture.png")
    with pytest.raises(ManifestError):
        read_manifest(tmp_path / "picture.png")


# The command


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--eval-images", 20], "need --freeze-eval"),
        (["--eval-split", "val"], "need --freeze-eval"),
        (["--freeze-eval", "--eval-split", "tset"], "not one of"),
        (["--val", "0.95"], "sum to 1"),
    ],
)
def test_command_refuses_options_before_it_works(tmp_path, options, sentence):
    data = class_folders(tmp_path / "x", {"nevus/1.jpg": 1})
    code, output = invoke(prepare, "--data", data, "--out", tmp_path / "m.csv", *options)
    assert code == 2
    assert sentence in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "m.csv").exists()


def test_command_prints_the_report(tmp_path, mixed):
    write(mixed[0] / "submission.csv", "image,MEL,NV,BCC\nISIC_0000001,0.5,0.3,0.2\n")
    out = tmp_path / "m.csv"
    options = ("--out", out, "--test", "0.2", "--seed", 3, "--workers", 1)
    code, output = invoke(prepare, "--data", mixed[0], "--data", mixed[1], *options)
    assert code == 0, output
    report = json.loads((tmp_path / "m.report.json").read_text())
    assert report["fractions"]["train"] == pytest.approx(0.6)
    assert report["seed"] == 3
    for words in (report["fingerprint"], str(out), "ham10000, 30 rows", "calibration", "Left out", "submission.csv"):
        assert words in output
    assert re.search(rf"all .*{report['images']} ", output)


def test_command_lists_the_known_data_sets_and_those_of_a_folder(mixed):
    code, output = invoke(prepare, "--sources", "--data", mixed[0])
    assert code == 0, output
    assert all(name in output for name in data_sets())
    assert "30 images, 30 of them with a diagnosis" in output


@pytest.mark.parametrize("folder", ["[missing]", "."])
def test_command_faults_are_one_sentence(tmp_path, folder):
    code, output = invoke(prepare, "--data", tmp_path / folder, "--out", tmp_path / "m.csv")
    assert code == 1
    assert output.endswith(".") and "Traceback" not in output
    assert not (tmp_path / "m.csv").exists()


def test_command_as_people_run_it(tmp_path):
    """From another folder; what it writes is what the function writes."""
    data = class_folders(
        tmp_path / "x", {f"{name}/{name} {n}.jpg": 100 * n for n in range(3) for name in ("nevus", "bcc")}
    )
    save(data / "nevus" / "one.jpg", 1)
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", "--data", "x", "--out", "y/m.csv"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    report = build_manifest([data], tmp_path / "z" / "m.csv")
    assert json.loads((tmp_path / "y" / "m.report.json").read_text()) == report
