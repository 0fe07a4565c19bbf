"""Near-duplicates join lesions, but no chain joins lesions or patients that are known to differ."""

import pytest
from PIL import Image

from tests.datasets import class_folders, picture, save, write
from training.data.manifest import read_manifest
from training.data.photos import original_name
from training.data.preparation import build_manifest

SMALLER = {"size": (180, 180), "quality": 80}
DOUBTFUL = "near-duplicates of different lesions or patients: not joined"


@pytest.fixture
def build(tmp_path):
    """Return a function: folder -> the manifest by image id. Its attribute `report` is the last report."""

    def run(folder):
        run.report = build_manifest([folder], tmp_path / "out" / "m.csv")
        return read_manifest(tmp_path / "out" / "m.csv").set_index("image_id")

    return run


@pytest.mark.parametrize("column", ["lesion_id", "patient_id"])
def test_a_near_duplicate_does_not_join_what_is_known_to_differ(tmp_path, build, column):
    """3 is a copy of 2, but their lesions (patients) differ: nothing is joined or dropped, and the pair is reported."""
    data = tmp_path / "mine"
    write(data / "labels.csv", f"image,label,{column}\n1,NV,A\n2,NV,A\n3,MEL,B\n4,NV,B\n5,NV,\n")
    for seed in (1, 2, 4, 5):
        save(data / f"{seed}.jpg", seed)
    save(data / "3.jpg", 2, **SMALLER)
    frame = build(data)
    assert frame["label"].to_dict() == {"1": "NV", "2": "NV", "3": "MEL", "4": "NV", "5": "NV"}
    assert frame[column].iloc[:4].tolist() == ["A", "A", "B", "B"]
    assert frame["lesion_id"]["2"] != frame["lesion_id"]["3"]
    assert build.report["notes"][DOUBTFUL] == {"count": 1, "examples": ["2 and 3"]}


def test_a_chain_through_an_image_without_a_lesion_joins_no_two_lesions(tmp_path, build):
    data = tmp_path / "mine"
    write(data / "labels.csv", "image,label,lesion_id\n1,NV,A\n2,NV,\n3,NV,B\n")
    save(data / "1.jpg", 1)
    save(data / "2.jpg", 1, **SMALLER)
    save(data / "3.jpg", 1, size=(64, 64))
    frame = build(data)
    assert (frame["lesion_id"]["1"], frame["lesion_id"]["3"]) == ("A", "B")
    assert frame["lesion_id"]["2"] in ("A", "B")
    assert DOUBTFUL in build.report["notes"]


def test_no_split_divides_a_patient(tmp_path, build):
    data = tmp_path / "mine"
    rows = "".join(f"{n},NV,L{n // 2},P{n // 6}\n" for n in range(60))
    write(data / "labels.csv", "image,label,lesion_id,patient_id\n" + rows)
    for number in range(60):
        save(data / f"{number}.jpg", number)
    frame = build(data)
    assert frame["lesion_id"].nunique() == 30
    assert frame["patient_id"].nunique() == build.report["patients"] == 10
    assert frame.groupby("patient_id")["split"].nunique().max() == 1
    assert set(frame["split"]) == {"train", "val", "calibration", "test"}


def test_equal_patient_ids_of_two_data_sets_are_two_patients(tmp_path, build):
    for clinic in ("north", "south"):
        write(tmp_path / "data" / clinic / "labels.csv", f"image,label,patient_id\n{clinic}.jpg,NV,1\n")
        save(tmp_path / "data" / clinic / f"{clinic}.jpg", ord(clinic[0]))
    frame = build(tmp_path / "data")
    assert frame["patient_id"].nunique() == 2
    assert all(patient.startswith("1@") for patient in frame["patient_id"])


@pytest.mark.parametrize("orientation", list(Image.Transpose))
def test_mirrored_and_turned_copies_are_of_the_same_group(tmp_path, build, orientation):
    data = class_folders(tmp_path / "x", {f"nevus/{n}.jpg": n for n in range(4)})
    picture(2).transpose(orientation).save(data / "nevus" / "aug_0_1234.jpg", quality=85)
    frame = build(data)
    assert frame["lesion_id"]["aug_0_1234"] == frame["lesion_id"]["2"]
    assert frame["lesion_id"].nunique() == 4


def test_copies_with_an_augmented_name_are_of_the_same_group(tmp_path, build):
    data = class_folders(tmp_path / "x", {f"nevus/mole{n}.jpg": n for n in range(4)})
    names = ("mole1_aug1", "mole1_flip", "mole1_rot_15", "nevus_original_mole1.jpg_" + "0" * 36)
    for number, name in enumerate(names):
        save(data / "nevus" / f"{name}.jpg", 100 + number)  # changed beyond recognition
    save(data / "nevus" / "aug_0_1234.jpg", 200)
    frame = build(data)
    assert {frame["lesion_id"][name] for name in names} == {frame["lesion_id"]["mole1"]}
    assert "aug_0_1234" not in frame.index
    assert build.report["dropped"]["augmented copy without its original"]["count"] == 1


@pytest.mark.parametrize(
    ("stem", "original"),
    [
        ("mole_aug1", "mole"), ("mole-flip", "mole"), ("mole_hflip", "mole"),
        ("ISIC_0024306_rotated_90", "ISIC_0024306"), ("aug_0_1234", ""), ("PAT_59_93_342", None),
        ("mole", None), ("_aug1", None), ("carrot", None),
    ],
)  # fmt: skip
def test_names_of_augmented_copies(stem, original):
    assert original_name(stem) == original
