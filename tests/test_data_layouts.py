"""Each layout of data folders is recognised by its tables and folders.

Tables describe an ISIC image wherever it lies, and other names only inside their own data set.
tests/test_data_sets.py has the public data sets.
"""

import pytest

from tests.datasets import class_folders, count, ham10000, isic2019_truth, save, write
from training.data.manifest import ManifestError

pytest_plugins = ["tests.fixtures_data"]


def test_ham10000(tmp_path, build):
    data = ham10000(
        tmp_path / "ham",
        ["HAM_1,ISIC_0000001,bkl,histo,80.0,male,scalp", "HAM_1,ISIC_0000002,bkl,histo,80.0,male,scalp",
         "HAM_2,ISIC_0000003,nv,follow_up,,unknown,unknown"],
    )  # fmt: skip
    frame = build(data)
    assert frame["label"].to_dict() == {"ISIC_0000001": "BKL", "ISIC_0000002": "BKL", "ISIC_0000003": "NV"}
    assert list(frame["lesion_id"]) == ["HAM_1", "HAM_1", "HAM_2"]
    assert set(frame["source"]) == {"ham10000"}
    assert tuple(frame.loc["ISIC_0000001", ["age", "sex", "site"]]) == (80.0, "male", "head/neck")
    assert tuple(frame.loc["ISIC_0000003", ["sex", "site"]]) == ("", "")
    assert frame["age"].isna()["ISIC_0000003"]


def test_ham10000_as_dataverse_names_it_in_parts_with_the_challenges_test_set(tmp_path, build):
    data = tmp_path / "dataverse_files"
    write(data / "HAM10000_metadata", "lesion_id,image_id,dx\nHAM_1,ISIC_0000001,mel\nHAM_2,ISIC_0000002,df\n")
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
    row = "HAMTEST_0000000,ISIC_0034524,nv,follow_up,40.0,female,back,vidir_molemax"
    write(data / "ISIC2018_Task3_Test_GroundTruth.csv", f"{header}\n{row}\n")
    save(data / "HAM10000_images_part_1" / "ISIC_0000001.jpg", 1)
    save(data / "HAM10000_images_part_2" / "ISIC_0000002.jpg", 2)
    save(data / "HAM10000_segmentations" / "ISIC_0000002_segmentation.png", 3)
    save(data / "ISIC2018_Task3_Test_Images" / "ISIC_0034524.jpg", 4)
    frame = build(data)
    assert frame["label"].to_dict() == {"ISIC_0000001": "MEL", "ISIC_0000002": "DF", "ISIC_0034524": "NV"}
    assert frame["split"]["ISIC_0034524"] == "test"
    assert not build.report["dropped"]
    assert count(build.report["notes"], "mask or superpixels") == 1


def test_isic2019(tmp_path, build):
    data = tmp_path / "isic"
    isic2019_truth(
        data / "ISIC_2019_Training_GroundTruth.csv",
        {"ISIC_0000001": "SCC", "ISIC_0000002_downsampled": "UNK", "ISIC_0000003": "AK"},
    )
    write(
        data / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex\nISIC_0000001,55,anterior torso,BCN_1,female\n"
        "ISIC_0000002_downsampled,,,,\nISIC_0000003,85,,BCN_1,female\n",
    )
    for number, name in enumerate(["ISIC_0000001", "ISIC_0000002_downsampled", "ISIC_0000003"]):
        save(data / "ISIC_2019_Training_Input" / f"{name}.jpg", number)
    frame = build(data)
    assert frame["label"].to_dict() == {"ISIC_0000001": "SCC", "ISIC_0000002": "UNK", "ISIC_0000003": "AK"}
    assert frame["lesion_id"].to_dict() == {
        "ISIC_0000001": "BCN_1", "ISIC_0000002": "ISIC_0000002", "ISIC_0000003": "BCN_1"
    }  # fmt: skip
    assert tuple(frame.loc["ISIC_0000001", ["source", "age", "sex", "site"]]) == (
        "bcn20000", 55.0, "female", "anterior torso"
    )  # fmt: skip
    assert count(build.report["notes"], "without a lesion id") == 1
    assert count(build.report["notes"], "more than one diagnosis") == 1


def test_isic2018(tmp_path, build):
    data = tmp_path / "isic2018"
    header = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    write(
        data / "ISIC2018_Task3_Training_GroundTruth.csv",
        header + "ISIC_0000001,0.0,0.0,0.0,1.0,0.0,0.0,0.0\nISIC_0000002,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
    )
    write(
        data / "ISIC2018_Task3_Training_LesionGroupings.csv",
        "image,lesion_id,diagnosis_confirm_type\nISIC_0000001,HAM_7,histopathology\nISIC_0000002,HAM_8,consensus\n",
    )
    write(data / "ISIC2018_Task3_Test_GroundTruth.csv", header + "ISIC_0000003,0,1,0,0,0,0,0\n")
    for number in (1, 2, 3):
        save(data / "images" / f"ISIC_000000{number}.jpg", number)
    frame = build(data, fractions={"train": 1, "val": 0, "calibration": 0, "test": 0})
    assert list(frame["label"]) == ["AK", "MEL", "NV"]
    assert list(frame["lesion_id"]) == ["HAM_7", "HAM_8", "ISIC_0000003"]
    assert list(frame["split"]) == ["train", "train", "test"]
    assert set(frame["source"]) == {"isic2018"}
    assert count(build.report["notes"], "akiec without an ISIC 2019 truth") == 1


def test_labels_csv(tmp_path, build):
    data = tmp_path / "mine"
    write(
        data / "labels.csv",
        "image,label,lesion_id,age,sex,site\nphotos/a.jpg,Malignant melanoma,L1,85+,F,Back\nb,nevi,L1,,,\n"
        "C.JPG,unk,,,,\nshots\\d.png,seborrheic_keratosis,,999,x,elbow\n",
    )
    for number, name in enumerate(["photos/a.jpg", "photos/b.jpg", "photos/c.jpg", "shots/d.png"]):
        save(data / name, number)
    frame = build(data)
    assert frame["label"].to_dict() == {"a": "MEL", "b": "NV", "c": "UNK", "d": "BKL"}
    assert frame["lesion_id"].to_dict() == {"a": "L1", "b": "L1", "c": "c", "d": "d"}
    assert tuple(frame.loc["a", ["source", "age", "sex", "site"]]) == ("labels", 85.0, "female", "posterior torso")
    assert tuple(frame.loc["d", ["sex", "site"]]) == ("", "elbow")
    assert frame["age"].isna()["d"]


def test_class_folders(tmp_path, build):
    data = class_folders(
        tmp_path / "nine",
        {"Train/actinic keratosis/1.jpg": 1, "Train/nevus/1.jpg": 2, "Train/pigmented benign keratosis/2.jpg": 3,
         "Test/vascular lesion/3.jpg": 4, "Train/SCC/deeper/4.jpg": 5},
    )  # fmt: skip
    frame = build(data)
    by_name = dict(zip(frame["image"].str.split("nine/").str[1], frame["label"], strict=True))
    assert by_name == {
        "Train/actinic keratosis/1.jpg": "AK", "Train/nevus/1.jpg": "NV", "Test/vascular lesion/3.jpg": "VASC",
        "Train/pigmented benign keratosis/2.jpg": "BKL", "Train/SCC/deeper/4.jpg": "SCC",
    }  # fmt: skip
    assert frame.loc["3", "split"] == "test"
    # Two different pictures both called 1.jpg stay two.
    assert sorted(name.partition("@")[0] for name in frame.index) == ["1", "1", "2", "3", "4"]
    assert frame["lesion_id"].is_unique


@pytest.mark.parametrize("folder", ["Train", "Test"])
def test_one_part_of_class_folders_is_a_data_folder(tmp_path, build, folder):
    data = class_folders(tmp_path / "nine", {f"{folder}/nevus/{number}.jpg": number for number in range(3)})
    frame = build(data / folder)
    assert len(frame) == 3
    assert set(frame["label"]) == {"NV"}
    assert (set(frame["split"]) == {"test"}) == (folder == "Test")


def test_the_name_of_a_collection_is_not_a_class(tmp_path, build):
    data = ham10000(tmp_path / "melanoma", ["HAM_1,ISIC_0000001,nv,,,,"])
    save(data / "images" / "unlisted.jpg", 2)
    assert list(build(data)["label"]) == ["NV"]
    class_folders(tmp_path / "nine", {"nevus/1.jpg": 1})
    with pytest.raises(ManifestError, match="give the folder above the class"):
        build(tmp_path / "nine" / "nevus")


def test_all_data_sets_below_one_folder(tmp_path, build):
    ham10000(tmp_path / "data" / "ham", ["HAM_1,ISIC_0000001,nv,,,,"])
    class_folders(tmp_path / "data" / "nine", {"Train/melanoma/ISIC_0000002.jpg": 2, "Test/bcc/ISIC_0000003.jpg": 3})
    isic2019_truth(tmp_path / "data" / "isic2019" / "truth.csv", {"ISIC_0000002": "NV"})
    frame = build(tmp_path / "data")
    assert frame["label"].to_dict() == {"ISIC_0000001": "NV", "ISIC_0000002": "NV", "ISIC_0000003": "BCC"}
    assert list(frame["source"]) == ["ham10000", "folder", "folder"]


def test_a_table_does_not_describe_the_files_of_another_data_set(tmp_path, build):
    for name, label, lesion in (("a", "MEL", "1"), ("b", "NV", "1")):
        write(tmp_path / name / "labels.csv", f"image,label,lesion_id\n1.jpg,{label},{lesion}\n")
        save(tmp_path / name / "1.jpg", ord(name))
    frame = build(tmp_path / "a", tmp_path / "b")
    assert sorted(frame["label"]) == ["MEL", "NV"]
    assert frame["lesion_id"].nunique() == 2
    assert all(lesion.startswith("1@") for lesion in frame["lesion_id"])


def test_tables_of_one_folder_describe_the_same_lesions(tmp_path, build):
    for name, label in (("first", "MEL"), ("second", "NV")):
        write(tmp_path / "mine" / f"{name}.csv", f"image,label,lesion_id\n{name}.jpg,{label},1\n")
        save(tmp_path / "mine" / f"{name}.jpg", len(name))
    assert list(build(tmp_path / "mine")["lesion_id"]) == ["1", "1"]


def test_a_table_describes_images_in_a_folder_next_to_it(tmp_path, build):
    write(tmp_path / "mine" / "csv" / "labels.csv", "image,label\n1.jpg,MEL\n")
    save(tmp_path / "mine" / "images" / "1.jpg", 1)
    assert list(build(tmp_path / "mine")["label"]) == ["MEL"]
