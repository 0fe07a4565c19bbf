"""Each public data set is recognised by the columns of its tables and read as data_sets.yaml describes it.

Every case has a few rows in the publisher's columns, and pictures where the publisher puts them.
"""

import io
import shutil
from collections import Counter

import pytest

from handlers.errors import UserError
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import CODES
from tests.datasets import isic2019_truth, picture, save, write
from tests.hostile import dicom
from training.data.data_sets import ROLES, data_sets
from training.data.image_cache import build_cache
from training.data.manifest import read_manifest
from training.data.preparation import build_manifest
from training.data.synthetic import draw_lesion

ARCHIVE = (
    "isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
    "diagnosis_4,diagnosis_5,diagnosis_confirm_type,image_type,lesion_id,patient_id,sex\n"
)


@pytest.fixture
def build(tmp_path):
    """Return a function: table (name, text), image paths -> the manifest by image id, and the report."""

    def run(name, text, images, **options):
        data = tmp_path / "data"
        write(data / name, text)
        for number, image in enumerate(images):
            save(data / image, number)
        report = build_manifest([data], tmp_path / "m.csv", **options)
        return read_manifest(tmp_path / "m.csv").set_index("image_id"), report

    return run


def isic(*numbers: int, folder: str = "images") -> list[str]:
    return [f"{folder}/ISIC_{number:07}.jpg" for number in numbers]


CASES = {
    "isic2020": (
        "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n"
        "ISIC_0000001,IP_1,male,45.0,head/neck,melanoma,malignant,1\n"
        "ISIC_0000002,IP_1,male,45.0,torso,unknown,benign,0\nISIC_0000003,IP_2,,,,seborrheic keratosis,benign,0\n"
        "ISIC_0000004,IP_2,,,,lentigo NOS,benign,0\n",
        isic(1, 2, 3, 4, folder="train"),
        {"ISIC_0000001": "MEL", "ISIC_0000003": "BKL"},
    ),
    "isic2024": (
        "isic_id,target,patient_id,age_approx,sex,anatom_site_general,image_type,iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,"
        "iddx_5\nISIC_0000001,1,IP_1,60,male,posterior torso,TBP tile: close-up,x,Malignant,"
        'Malignant adnexal epithelial proliferations - Follicular,Basal cell carcinoma,"Basal cell carcinoma, '
        'Nodular",\n'
        'ISIC_0000002,0,IP_1,60,male,,TBP tile: close-up,x,Benign,Benign melanocytic proliferations,Nevus,"Nevus, '
        'Atypical, Dysplastic, or Clark",\nISIC_0000003,0,IP_2,60,male,,TBP tile: close-up,Benign,Benign,,,,\n',
        isic(1, 2, 3, folder="image"),
        {"ISIC_0000001": "BCC", "ISIC_0000002": "NV"},
    ),
    "isic_archive": (
        ARCHIVE + "ISIC_0000001,a,CC-0,60,torso,Malignant,Malignant melanocytic proliferations (Melanoma),,,,,"
        "dermoscopic,IL_1,IP_1,male\nISIC_0000002,a,CC-0,60,torso,Benign,Benign epidermal proliferations,Solar lentigo,"
        ",,,,IL_2,IP_1,male\nISIC_0000003,a,CC-0,60,torso,Malignant,x,Squamous cell carcinoma in situ,,,,dermoscopic,"
        "IL_3,IP_2,\n",
        isic(1, 2, 3, folder="."),
        {"ISIC_0000001": "MEL", "ISIC_0000002": "BKL", "ISIC_0000003": "SCC"},
    ),
    "isic2017": (
        "image_id,melanoma,seborrheic_keratosis\nISIC_0000001,1.0,0.0\nISIC_0000002,0.0,1.0\nISIC_0000003,0.0,0.0\n",
        isic(1, 2, 3),
        {"ISIC_0000001": "MEL", "ISIC_0000002": "BKL", "ISIC_0000003": "NV"},
    ),
    "isic2016": (
        "ISIC_0000001,malignant\nISIC_0000002,benign\nISIC_0000003,malignant\n",
        isic(1, 2, 3),
        {"ISIC_0000001": "MEL", "ISIC_0000003": "MEL"},
    ),
    "bcn20000": (
        "bcn_filename,age_approx,anatom_site_general,diagnosis,lesion_id,capture_date,sex,split\n"
        "BCN_0000000001.jpg,55.0,anterior torso,MEL,BCN_0003884,2012-05-16,male,train\n"
        "BCN_0000000003.jpg,50.0,,SCC,BCN_0000019,2015-07-09,female,train\n",
        ["BCN_20k_train/BCN_0000000001.jpg", "BCN_20k_train/BCN_0000000003.jpg"],
        {"BCN_0000000001": "MEL", "BCN_0000000003": "SCC"},
    ),
    "derm7pt": (
        "case_num,diagnosis,seven_point_score,location,sex,management,clinic,derm\n"
        "1,reed or spitz nevus,1,head neck,female,excision,NEL/Nel1.jpg,NEL/Nel2.jpg\n"
        "2,melanoma (in situ),5,back,male,excision,NEL/Nel3.jpg,NEL/Nel4.jpg\n"
        "3,lentigo,5,back,male,excision,NEL/Nel5.jpg,NEL/Nel6.jpg\n",
        [f"images/NEL/Nel{n}.jpg" for n in range(1, 7)],
        {"Nel2": "NV", "Nel4": "MEL", "Nel6": "UNK"},
    ),
    "pad_ufes_20": (
        "patient_id,lesion_id,age,gender,region,diagnostic,img_id,biopsed\nPAT_1,10,55,FEMALE,NECK,NEV,PAT_1_10_1.png,True\n"
        "PAT_1,11,55,FEMALE,ARM,ACK,PAT_1_11_2.png,True\nPAT_2,12,55,FEMALE,ARM,SEK,PAT_2_12_3.png,True\n",
        ["imgs_part_1/PAT_1_10_1.png", "imgs_part_1/PAT_1_11_2.png", "imgs_part_2/PAT_2_12_3.png"],
        {"PAT_1_10_1": "NV", "PAT_1_11_2": "AK", "PAT_2_12_3": "BKL"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_public_data_set(build, name):
    text, images, labels = CASES[name]
    frame, report = build("table.csv", text, images)
    assert frame["label"].to_dict() == labels
    assert set(frame["source"]) == {name}
    assert [table["kind"] for table in report["data"][0]["tables"]] == [name]


def test_every_data_set_has_a_test():
    tested_elsewhere = {"isic2019", "isic2018", "ham10000", "milk10k", "labels", "metadata"}
    assert CASES.keys() | tested_elsewhere == data_sets().keys()


def test_descriptions_name_known_codes_and_roles():
    for data_set in data_sets().values():
        one_hot = data_set.one_hot if isinstance(data_set.one_hot, dict) else {}
        codes = {data_set.otherwise, *data_set.labels.values(), *one_hot.values()}
        assert codes <= {"", *CODES}, data_set.name
        assert data_set.columns.keys() == set(ROLES)


def test_diagnoses_that_do_not_map_are_listed_with_counts(build):
    _, report = build("train.csv", *CASES["isic2020"][:2])
    assert report["notes"]["unknown diagnosis 'lentigo NOS' in train.csv"]["count"] == 1
    kept_out = report["dropped"]
    assert sum(entry["count"] for entry in kept_out.values()) == 2


def test_patients_age_and_site(build):
    frame, report = build("metadata.csv", *CASES["pad_ufes_20"][:2])
    assert frame["patient_id"].tolist() == ["PAT_1", "PAT_1", "PAT_2"]
    assert frame["lesion_id"].nunique() == 3
    assert frame["site"].tolist() == ["head/neck", "upper extremity", "upper extremity"]
    assert (report["patients"], report["images_with_a_patient"]) == (2, 3)


@pytest.mark.parametrize(
    ("name", "clinical", "images"),
    [("isic2024", None, 2), ("isic2024", True, 2), ("pad_ufes_20", None, 3), ("derm7pt", None, 3), ("derm7pt", True, 6),
     ("derm7pt", False, 3)],
)  # fmt: skip
def test_pictures_that_are_no_dermoscopy(build, name, clinical, images):
    frame, report = build("metadata.csv", *CASES[name][:2], clinical=clinical)
    assert len(frame) == images
    uses = any(kind.startswith("no dermoscopy, but used") for kind in report["notes"])
    assert uses == (clinical is True or name != "derm7pt")
    if name == "derm7pt" and clinical:
        assert frame["lesion_id"].nunique() == 3  # both pictures of a case are one lesion


@pytest.mark.parametrize("name", ["isic2024", "pad_ufes_20"])
def test_no_clinical_leaves_out_whole_data_sets(build, name):
    with pytest.raises(UserError, match="no dermoscopy: .*photographs"):
        build("metadata.csv", *CASES[name][:2], clinical=False)


def test_other_image_types_of_the_archive_are_left_out(build):
    rows = "ISIC_0000001,,,,,Benign,,Nevus,,,,dermoscopic,,,\nISIC_0000002,,,,,Benign,,Nevus,,,,clinical: close-up,,,\n"
    frame, report = build("metadata.csv", ARCHIVE + rows, isic(1, 2))
    assert list(frame.index) == ["ISIC_0000001"]
    assert report["dropped"]["no dermoscopy: clinical: close-up"]["count"] == 1


def test_truth_keyed_by_lesion(tmp_path, build):
    """MILK10k: the truth names lesions, the metadata say which images show them."""
    write(
        tmp_path / "data" / "truth.csv",
        "lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC\nIL_1,0,0,0,0,0,0,0,0,0,1,0\n"
        "IL_2,0,0,1,0,0,0,0,0,0,0,0\nIL_3,0,1,0,0,0,0,0,0,0,0,0\n",
    )
    metadata = (
        "lesion_id,image_type,isic_id,age_approx,sex\nIL_1,dermoscopic,ISIC_0000001,50,male\n"
        "IL_1,clinical: close-up,ISIC_0000002,50,male\nIL_2,dermoscopic,ISIC_0000003,50,male\n"
    )
    frame, report = build("metadata.csv", metadata, isic(1, 2, 3))
    assert frame["label"].to_dict() == {"ISIC_0000001": "SCC"}
    assert frame["source"].tolist() == ["milk10k"]
    assert report["notes"]["lesion without an image in truth.csv"]["count"] == 1


def test_labels_keyed_by_lesion(tmp_path, build):
    write(tmp_path / "data" / "labels.csv", "lesion_id,diagnosis\nL1,nevus\nL2,melanoma\n")
    frame, _ = build("images.csv", "image,lesion_id\na.jpg,L1\nb.jpg,L1\nc.jpg,L2\n", ["a.jpg", "b.jpg", "c.jpg"])
    assert frame["label"].tolist() == ["NV", "NV", "MEL"]


def test_isic2019_names_the_collection_as_source(tmp_path, build):
    isic2019_truth(tmp_path / "data" / "truth.csv", {f"ISIC_000000{n}": "NV" for n in range(1, 5)})
    metadata = (
        "image,lesion_id\nISIC_0000001,HAM_0000118\nISIC_0000002,BCN_0000001\nISIC_0000003,MSK4_1\nISIC_0000004,\n"
    )
    frame, _ = build("metadata.csv", metadata, isic(1, 2, 3, 4))
    assert frame["source"].tolist() == ["ham10000", "bcn20000", "msk", "isic2019"]


# Files


def test_bytes_decide_what_is_a_picture(tmp_path):
    data = tmp_path / "x" / "nevus"
    for number, name in enumerate(("a.jfif", "b.jpe", "c", "d.JPG")):
        buffer = io.BytesIO()
        picture(number).save(buffer, "JPEG")
        write(data / name, buffer.getvalue())
    for name in ("notes", "thumbs.db"):
        write(data / name, b"no picture")
    build_manifest([tmp_path / "x"], tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["image_id"].tolist() == ["a", "b", "c", "d"]


def test_masks_and_superpixels_are_no_pictures(tmp_path):
    names = ("segmentation", "superpixels", "attribute_pigment_network", "Segmentation")
    for number, name in enumerate(names):
        save(tmp_path / "x" / "melanoma" / f"ISIC_0000001_{name}.png", number)
    save(tmp_path / "x" / "melanoma" / "ISIC_0000001.jpg", 9)
    report = build_manifest([tmp_path / "x"], tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["image_id"].tolist() == ["ISIC_0000001"]
    assert report["notes"]["segmentation mask or superpixels: no picture"]["count"] == 4


def test_dicom_files_are_pictures_with_any_name(tmp_path):
    """As in serving. A DICOM file of another kind, here without a picture, is reported and left out."""
    data = tmp_path / "data"
    for code, folder in (("MEL", "melanoma"), ("NV", "nevus")):
        for seed in range(4):
            path = data / folder / (f"{code}{seed}.dcm" if seed else f"{code}{seed}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dicom.forms(draw_lesion(seed, code, size=(96, 96)))["RGB"])
    (data / "nevus" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM")
    report = build_manifest([data], tmp_path / "m.csv")
    frame = read_manifest(tmp_path / "m.csv")
    assert Counter(frame["label"]) == {"MEL": 4, "NV": 4}
    assert "broken.dcm" in str(report)
    pixels = build_cache(frame, Preprocessing(32), tmp_path / "cache")
    assert pixels.std(axis=(1, 2, 3)).min() > 5


@pytest.mark.parametrize(
    ("name", "kind"), [("images.zip", "archive: 1"), ("images.tar", "archive: 1"), ("train-image.hdf5", "HDF5: 1")]
)
def test_a_folder_of_archives_or_hdf5_is_refused_with_their_names(tmp_path, name, kind):
    data = tmp_path / "data"
    write(data / "metadata.csv", CASES["isic2020"][0])
    if name.startswith("images"):
        shutil.make_archive(str(data / "images"), name[-3:], data, "metadata.csv")
    else:
        write(data / name, b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=kind) as refused:
        build_manifest([data], tmp_path / "m.csv")
    assert str(data / name) in str(refused.value)
    save(data / "nevus" / "a.jpg", 1)  # with a picture the folder is used, and the file reported
    report = build_manifest([data], tmp_path / "m.csv")
    assert any("not read" in note for note in report["notes"])
