"""Spellings and faults of data: an odd row, file or name is left out alone, and the report names it.

`build_manifest` stops only without any usable image, with one sentence.
"""

import os

import pytest

from handlers.errors import UserError
from handlers.identifiers import isic_id
from tests.datasets import class_folders, count, ham10000, isic2019_truth, picture, save, write
from training.data import vocabulary
from training.data.manifest import ManifestError

pytest_plugins = ["tests.fixtures_data"]


# Spellings


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("MEL", "MEL"), ("Melanomas", "MEL"), ("nv", "NV"), ("Melanocytic nevi", "NV"), ("naevus", "NV"),
        ("Basal_Cell-Carcinoma", "BCC"), ("akiec", "AK"), ("Actinic Keratoses", "AK"), ("Bowen's disease", "SCC"),
        ("benign keratosis-like lesions", "BKL"), ("SK", "BKL"), ("Dermatofibroma", "DF"), ("vascular lesions", "VASC"),
        ("squamous cell carcinoma", "SCC"), ("none of the above", "UNK"), ("UNK", "UNK"),
        # In the ISIC archive these are moles without a written diagnosis, not UNK.
        ("unknown", None), ("other", None), ("wart", None), ("benign", None), ("", None),
    ],
)  # fmt: skip
def test_class_code(text, code):
    assert vocabulary.class_code(text) == code


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("ISIC_0012345", "ISIC_0012345"), ("isic_0012345", "ISIC_0012345"), ("ISIC_0012345(1)", "ISIC_0012345"),
        ("ISIC_0012345_downsampled", "ISIC_0012345"), ("ISIC_0012345_downsampled (2)", "ISIC_0012345"),
        ("ISIC_0012345 copy", "ISIC_0012345"),
        ("ISIC_0012345_segmentation", None), ("ISIC_001234", None), ("ISIC_00123456", None), ("my ISIC_0012345", None),
    ],
)  # fmt: skip
def test_isic_id(name, identifier):
    assert isic_id(name) == identifier


# Faults that are reported


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(lambda text: "\ufeff" + text, id="byte order mark"),
        pytest.param(lambda text: text.replace(",", ";"), id="semicolons"),
        pytest.param(lambda text: text.replace(",", "\t"), id="tabs"),
        pytest.param(lambda text: text.replace("image_id", "Image Name").replace("dx", "Diagnosis"), id="renamed"),
        pytest.param(
            lambda text: text.replace(",age", ",Age_Approx").replace("localization", "SITE"), id="renamed too"
        ),
        pytest.param(
            lambda text: "".join(f"{n},{line}\n" for n, line in enumerate(text.split("\n"))), id="index added"
        ),
        pytest.param(
            lambda text: text.replace("\n", ",0.5,1\n").replace("localization,0.5,1", "localization,score_weight,MEL"),
            id="columns added",
        ),
        pytest.param(lambda text: text.replace(",", " , "), id="spaces"),
        pytest.param(lambda text: text.replace("ISIC_0000001", "images/isic_0000001.JPG"), id="paths"),
        pytest.param(lambda text: text + "\n\n", id="blank lines"),
        pytest.param(lambda text: "\n".join([text.split("\n")[0], *reversed(text.split("\n")[1:])]), id="order"),
        pytest.param(lambda text: text.replace("scalp", "sc\xe4lp").encode("latin-1"), id="not UTF-8"),
    ],
)
def test_a_table_in_another_spelling_is_read_alike(tmp_path, build, change):
    data = ham10000(
        tmp_path / "ham",
        ["HAM_1,ISIC_0000001,bkl,histo,80.0,male,back", "HAM_1,ISIC_0000002,bkl,histo,80.0,male,back",
         "HAM_2,ISIC_0000003,nv,histo,35.0,female,scalp"],
    )  # fmt: skip
    path = data / "HAM10000_metadata.csv"
    write(path, path.read_text() + "\n")
    columns = ["label", "lesion_id", "source", "age", "sex", "sha256"]
    before = build(data)[columns]
    write(path, change(path.read_text()))
    after = build(data)
    assert after[columns].equals(before)
    assert after.loc["ISIC_0000001", "site"] == "posterior torso"


def test_truth_with_added_and_renamed_columns(tmp_path, build):
    data = class_folders(tmp_path / "x", {"images/ISIC_0000001.jpg": 1, "images/ISIC_0000002.jpg": 2})
    write(
        data / "truth.csv",
        "isic_id,Melanoma,Nevus,BCC,AK,BKL,DF,VASC,SCC,UNK,score_weight,validation_weight\n"
        "ISIC_0000001,1,0,0,0,0,0,0,0,0,0.3,0\nISIC_0000002,0,1,0,0,0,0,0,0,0,0.7,1\n",
    )
    assert list(build(data)["label"]) == ["MEL", "NV"]


def test_rows_without_images_and_images_without_rows(tmp_path, build):
    data = ham10000(tmp_path / "ham", ["HAM_1,ISIC_0000001,nv,,,,", "HAM_2,ISIC_0000002,nv,,,,"])
    (data / "images" / "ISIC_0000002.jpg").unlink()
    save(data / "images" / "ISIC_0000003.jpg", 3)
    assert list(build(data).index) == ["ISIC_0000001"]
    assert count(build.report["notes"], "row without an image") == 1
    assert count(build.report["dropped"], "without a diagnosis") == 1


def test_unknown_diagnoses_and_class_folders(tmp_path, build):
    data = ham10000(tmp_path / "ham", ["HAM_1,ISIC_0000001,nv,,,,", "HAM_2,ISIC_0000002,wart,,,,"])
    nine = class_folders(tmp_path / "nine", {"Train/nevus/1.jpg": 11, "Train/eczema/2.jpg": 12, "readme/3.jpg": 13})
    assert list(build(data, nine)["label"]) == ["NV", "NV"]
    assert count(build.report["notes"], "unknown diagnosis 'wart'") == 1
    assert count(build.report["dropped"], "diagnosis or class folder is unknown") == 2
    assert count(build.report["dropped"], "without a diagnosis") == 1


def test_a_folder_does_not_overrule_an_unknown_diagnosis(tmp_path, build):
    data = class_folders(tmp_path / "mine", {"nevus/1.jpg": 1, "nevus/2.jpg": 2, "nevus/3.jpg": 3, "nevus/4.jpg": 4})
    write(data / "labels.csv", "image,label\n1.jpg,wart\n2.jpg,\n3.jpg,unknown\n")
    assert list(build(data).index) == ["2", "3", "4"], "a blank says nothing"
    assert count(build.report["dropped"], "diagnosis or class folder is unknown") == 1


def test_a_row_may_name_its_folder(tmp_path, build):
    """patient1/1.jpg is missing: its row is not about another patient's 1.jpg."""
    data = tmp_path / "clinic"
    save(data / "patient2" / "1.jpg", 2)
    save(data / "patient3" / "1.jpg", 3)
    write(data / "labels.csv", "image,label\npatient1/1.jpg,MEL\npatient2/1.jpg,NV\npatient3/1.jpg,DF\n")
    frame = build(data)
    assert sorted(frame["label"]) == ["DF", "NV"]
    assert count(build.report["notes"], "row without an image") == 1
    # What all rows begin with may be a folder of another machine.
    write(data / "labels.csv", "image,label\nD:\\study\\patient2\\1.jpg,NV\nD:\\study\\patient3\\1.jpg,DF\n")
    assert sorted(build(data)["label"]) == ["DF", "NV"]


def test_images_that_do_not_decode(tmp_path, build):
    data = class_folders(tmp_path / "nine", {f"nevus/{number}.jpg": number for number in range(4)})
    whole = (data / "nevus" / "1.jpg").read_bytes()
    write(data / "nevus" / "1.jpg", whole[: len(whole) // 2])
    write(data / "nevus" / "2.jpg", b"not an image")
    write(data / "nevus" / "3.jpg", b"")
    picture(5, (8, 8)).save(data / "nevus" / "4.jpg")
    (data / "nevus" / "5.jpg").symlink_to("nowhere.jpg")
    assert list(build(data).index) == ["0"]
    assert count(build.report["dropped"], "image cannot be used") == 5


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tif", "JPEG"])
def test_image_formats(tmp_path, build, ending):
    data = class_folders(tmp_path / "nine", {f"nevus/1.{ending}": 1})
    assert list(build(data)["label"]) == ["NV"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,MEL,NV,BCC,AK\nISIC_0000001,0.6,0.2,0.1,0.1\n", "scores"),
        ("", "no columns"),
        ("a,b\n1,2\n", "no columns"),
        ("image,file_size\nx,1\n", "no columns"),
        (b"\x81\x8d\x00\xff", "no columns"),
        ("image,label\n".encode("utf-16"), "no columns"),
        ("image,image_id,label,lesion_id,source,split,sha256,phash\na,a,MEL,l,folder,train,0,0\n", "manifest"),
    ],
    ids=["scores", "nothing", "other columns", "no diagnosis", "binary", "UTF-16", "earlier manifest"],
)
def test_other_csv_files_are_ignored_with_a_reason(tmp_path, build, text, reason):
    data = class_folders(tmp_path / "nine", {"nevus/ISIC_0000001.jpg": 1})
    path = write(data / "other.csv", text)
    assert list(build(data)["label"]) == ["NV"]
    assert reason in build.report["ignored_tables"][str(path)]


def test_a_table_that_cannot_be_read(tmp_path, build):
    data = class_folders(tmp_path / "nine", {"nevus/ISIC_0000001.jpg": 1})
    (data / "gone.csv").symlink_to("nowhere.csv")
    assert list(build(data)["label"]) == ["NV"]
    assert "cannot be read" in build.report["ignored_tables"][str(data / "gone.csv")]


def test_odd_rows_are_left_out_alone(tmp_path, build):
    data = class_folders(
        tmp_path / "mine", {f"{number}.jpg": number for number in range(6)} | {"a/7.jpg": 7, "b/7.jpg": 8}
    )
    write(
        data / "labels.csv",
        "image,label\n0.jpg,NV\n1.jpg,NV,too,many\n,MEL\n2.jpg\n3.jpg,MEL\n3.jpg,NV\n4.jpg,BCC\n4.jpg,bcc\n7.jpg,DF\n"
        "a/7.jpg,VASC\n",
    )
    frame = build(data)
    assert dict(zip(frame["image"].str.split("mine/").str[1], frame["label"], strict=True)) == {
        "0.jpg": "NV", "4.jpg": "BCC", "a/7.jpg": "VASC"
    }  # fmt: skip
    notes, dropped = build.report["notes"], build.report["dropped"]
    assert count(notes, "more fields than the header") == 1
    assert count(notes, "names no image") == 1
    assert count(notes, "two diagnoses") == 1
    assert count(notes, "fits several images") == 1
    assert count(dropped, "contradictory diagnoses from labels") == 1
    assert count(dropped, "without a diagnosis") == 4  # 1, 2, 5 and b/7


def test_truth_rows_that_name_no_single_class(tmp_path, build):
    data = class_folders(tmp_path / "x", {f"i/ISIC_000000{number}.jpg": number for number in range(5)})
    write(
        data / "truth.csv",
        "image,MEL,NV,BCC\nISIC_0000000,1,0,0\nISIC_0000001,0,1,0\nISIC_0000002,1,1,0\nISIC_0000003,,,\n"
        "ISIC_0000004,0,0,1\n",
    )
    assert list(build(data)["label"]) == ["MEL", "NV", "BCC"]
    assert count(build.report["notes"], "does not name exactly one class") == 2


def test_files_of_archives_and_file_systems_are_ignored(tmp_path, build):
    data = class_folders(tmp_path / "nine", {"Train/nevus/1.jpg": 1})
    for junk in ("Train/nevus/._1.jpg", "Train/nevus/.DS_Store", "__MACOSX/Train/nevus/1.jpg", "Train/nevus/Thumbs.db"):
        write(data / junk, b"junk")
    (data / "Train" / "again").symlink_to(data)  # leads back up
    assert list(build(data).index) == ["1"]
    assert not build.report["dropped"]


def test_links_are_followed(tmp_path, build):
    """Data sets are often links into one pool: each place a link stands in is heard."""
    pool = [save(tmp_path / "pool" / f"{number}.jpg", number) for number in range(3)]
    data = tmp_path / "nine"
    for folder, number in (("nevus", 0), ("melanoma", 1), ("nevus", 2), ("melanoma", 2)):
        (data / folder).mkdir(parents=True, exist_ok=True)
        (data / folder / f"{number}.jpg").symlink_to(pool[number])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Test").symlink_to(data)
    frame = build(data)
    assert frame["label"].to_dict() == {"0": "NV", "1": "MEL"}
    assert "contradictory diagnoses from folders alone" in build.report["dropped"]
    assert set(build(tmp_path / "other")["split"]) == {"test"}


def test_file_name_that_is_not_text(tmp_path, build):
    data = class_folders(tmp_path / "nine", {"nevus/1.jpg": 1})
    try:
        for name in (b"\xff", "（1）".encode() + b"\xe9"):
            os.link(data / "nevus" / "1.jpg", os.fsencode(data / "nevus") + b"/" + name + b".jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert list(build(data).index) == ["1"]
    assert count(build.report["notes"], "not valid UTF-8") == 2


# Faults that stop it


def test_folders_may_overlap_in_any_order(tmp_path, build):
    data = class_folders(tmp_path / "data", {"nine/nevus/ISIC_0000001.jpg": 1, "nine/melanoma/ISIC_0000002.jpg": 2})
    csv = isic2019_truth(data / "csv" / "truth.csv", {"ISIC_0000001": "NV"}).parent
    for directories in ((data, csv), (csv, data), (data / "nine" / "nevus", data), (data, data, csv, csv)):
        assert list(build(*directories)["label"]) == ["NV", "MEL"]
        assert len(build.report["data"]) == len(set(directories))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda path: path / "missing", "There is no .*missing"),
        (lambda path: write(path / "file", ""), "is a file"),
        (lambda path: (path / "empty").mkdir() or path / "empty", "neither images nor a table"),
        (lambda path: isic2019_truth(path / "csv" / "t.csv", {"ISIC_0000001": "NV"}).parent, "but no image"),
        (lambda path: save(path / "photos" / "1.jpg", 1).parent, "but no diagnosis"),
        (
            lambda path: write(path / "x" / "nevus" / "1.jpg", b"?").parents[1],
            "No image is left. Left out: image cannot be used: 1",
        ),
    ],
    ids=["missing", "a file", "empty", "only tables", "only images", "only corrupt images"],
)
def test_nothing_usable(tmp_path, build, prepare, sentence):
    with pytest.raises(UserError, match=sentence):
        build(prepare(tmp_path))
    assert not (tmp_path / "out").exists()


def test_no_directory_at_all(build):
    with pytest.raises(ManifestError, match="No data folder"):
        build()
