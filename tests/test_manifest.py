"""The manifest has one checked row per photograph, with the best label; no lesion or patient is in two splits.

The best authority on an image decides its diagnosis; an image on which it contradicts itself is left out. Copies become
one row. Near-duplicates and images of one lesion become one group, but no chain of near-duplicates joins lesions or
patients that are known to differ. A Test/ folder and official test sets stay test, with their whole groups. The same
data give the same bytes and fingerprint, wherever they lie.
"""

import json
import re
import shutil

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets import class_folders, ham10000, isic2019_truth, save, write
from training.data.manifest import fingerprint, read_manifest
from training.data.preparation import SharesError, build_manifest
from training.data.splits import SPLITS

pytest_plugins = ["tests.fixtures_data"]


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
