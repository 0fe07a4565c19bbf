"""A manifest is written whole or not at all, and moves with its images. A damaged one is refused with its line.

scripts/prepare_data.py makes it; its faults are one sentence.
"""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts.prepare_data import prepare
from tests.commands import invoke
from tests.datasets import class_folders, picture, save, write
from training.data.data_sets import data_sets
from training.data.manifest import COLUMNS, ManifestError, read_manifest
from training.data.preparation import build_manifest

pytest_plugins = ["tests.fixtures_data"]
ROOT = Path(__file__).parent.parent


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
