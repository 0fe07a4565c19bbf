"""The frozen evaluation set: the same pictures give the same set, and no other pictures pass for it.

- its digest depends on the pictures, labels and lesions, not on where the files lie or in which order they come;
- a picture, label or lesion that was changed is noticed, when the set is made, loaded or read;
- a smaller set takes whole lesions, keeps every class, and keeps rare ones whole as far as it can.
"""

import hashlib
import shutil
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlflow_tracking.promotion.evaluation_set import (
    COLUMNS,
    IMAGES,
    ROWS,
    CurrentSet,
    EvaluationSet,
    EvaluationSetError,
    extended,
    freeze,
)
from mlflow_tracking.promotion.execute import Executor
from mlflow_tracking.promotion.plan import Release, StepFailed
from mlflow_tracking.registry import RegisteredVersion


def frozen_in(folder: Path, rows: pd.DataFrame, images: int | None = None) -> EvaluationSet:
    """Freeze the rows into a new folder."""
    folder.mkdir()
    return freeze(rows, folder, images)


@pytest.fixture
def rows(tmp_path) -> pd.DataFrame:
    """A manifest's rows of 300 files: MEL 60 (two of each lesion), NV 220, DF 20."""
    labels = ["MEL"] * 60 + ["NV"] * 220 + ["DF"] * 20
    folder = tmp_path / "images"
    folder.mkdir()
    made = []
    for number, label in enumerate(labels):
        path = folder / f"{number}.JPG"
        path.write_bytes(f"picture {number}".encode())
        lesion = f"L{number // 2 if label == 'MEL' else 1000 + number}"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        age = None if number % 5 == 0 else float(number % 90)
        told = (age, ("", "male", "female")[number % 3], "head/neck" if number % 2 else "")
        made.append((str(path), f"image{number}", label, lesion, "ham10000", digest, f"{number:016x}", *told, ""))
    return pd.DataFrame(made, columns=["path", *COLUMNS[1:]])


@pytest.mark.parametrize("first", [0, 200])
def test_an_extended_set_is_the_set_of_all_its_pictures(rows, tmp_path, first):
    current = frozen_in(tmp_path / "first", rows[:first]) if first else None
    (tmp_path / "both").mkdir()
    both = extended(current, rows[first:], tmp_path / "both")
    assert both.digest == frozen_in(tmp_path / "all", rows).digest
    both.verify()


def test_frozen_and_loaded_it_is_the_same(rows, tmp_path):
    frozen = frozen_in(tmp_path / "set", rows)
    assert len(frozen) == 300
    assert frozen.digest == "sha256:" + hashlib.sha256((tmp_path / "set" / ROWS).read_bytes()).hexdigest()
    assert sorted(
        zip(frozen.frame["image_id"], frozen.frame["label"], frozen.frame["lesion_id"], strict=True)
    ) == sorted(zip(rows["image_id"], rows["label"], rows["lesion_id"], strict=True))
    [image] = frozen.images([7])
    assert hashlib.sha256(image).hexdigest() == frozen.frame["sha256"][7]
    assert Counter(frozen.labels.tolist()) == {0: 60, 1: 220, 5: 20}
    assert frozen.lesions.max() + 1 == 270
    assert not list((tmp_path / "set").glob(".*")), "nothing temporary stays"
    patients = frozen.frame.set_index("image_id")[["age", "sex", "site"]]
    assert patients.loc["image5"].tolist() == ["", "female", "head/neck"]
    assert patients.loc["image12"].tolist() == ["12", "", ""]
    assert len(set(frozen.labels[:60].tolist())) == 3, "in random order: any first part holds all classes"
    assert np.all(np.diff([int(digest[:8], 16) for digest in frozen.frame["sha256"]]) >= 0)


def test_neither_order_nor_place_matters(rows, tmp_path):
    copy = shutil.copytree(tmp_path / "images", tmp_path / "elsewhere")
    moved = rows.assign(path=[str(copy / f"{number}.JPG") for number in range(len(rows))]).sample(
        frac=1, random_state=3
    )
    first, second = frozen_in(tmp_path / "a", rows), frozen_in(tmp_path / "b", moved)
    assert first.digest == second.digest
    assert (tmp_path / "a" / IMAGES).read_bytes() == (tmp_path / "b" / IMAGES).read_bytes()
    for column in ("label", "lesion_id"):
        other = rows.copy()
        other.loc[3, column] = "BCC"
        assert frozen_in(tmp_path / column, other).digest != first.digest


def test_a_smaller_set_takes_whole_lesions_of_every_class(rows, tmp_path):
    frozen = frozen_in(tmp_path / "set", rows, images=100)
    counts = Counter(frozen.frame["label"])
    assert counts["DF"] == 20, "a rare class stays whole"
    assert counts["MEL"] == 20
    assert 70 <= counts["NV"] <= 76
    melanomas = frozen.frame[frozen.frame["label"] == "MEL"]
    assert set(Counter(melanomas["lesion_id"]).values()) == {2}, "no lesion is divided"


def test_what_was_changed_is_not_frozen(rows, tmp_path):
    (tmp_path / "images" / "3.JPG").write_bytes(b"another picture")
    with pytest.raises(EvaluationSetError, match="has changed since the manifest was made"):
        freeze(rows, tmp_path)
    (tmp_path / "images" / "3.JPG").unlink()
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        freeze(rows, tmp_path)
    assert not (tmp_path / IMAGES).exists(), "nothing is half-written"
    with pytest.raises(EvaluationSetError, match="no picture to freeze"):
        freeze(rows[:0], tmp_path)


def test_what_was_changed_later_is_noticed(rows, tmp_path):
    frozen = freeze(rows[:30], tmp_path)
    files = list(frozen.frame["file"])
    with zipfile.ZipFile(tmp_path / IMAGES, "w") as archive:
        for name in files:
            archive.writestr(name, b"forged")
    for reads in (lambda: EvaluationSet.load(tmp_path).images([0]), lambda: EvaluationSet.load(tmp_path).verify()):
        with pytest.raises(EvaluationSetError, match="was changed"):
            reads()
    with zipfile.ZipFile(tmp_path / IMAGES, "w") as archive:
        archive.writestr(files[0], b"alone")
    with pytest.raises(EvaluationSetError, match=" lacks "):
        EvaluationSet.load(tmp_path)
    (tmp_path / IMAGES).write_bytes(b"no archive")
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        EvaluationSet.load(tmp_path)
    freeze(rows[:30], tmp_path)
    (tmp_path / ROWS).write_text((tmp_path / ROWS).read_text().replace("MEL", "NV"))
    assert EvaluationSet.load(tmp_path).digest != frozen.digest


def flip(path: Path) -> None:
    """Change one byte of the first picture in an archive, as a bad disk may."""
    data = bytearray(path.read_bytes())
    data[data.index(b"picture")] ^= 1
    path.write_bytes(data)


def test_a_damaged_picture_cannot_be_read(rows, tmp_path):
    frozen = freeze(rows[:30], tmp_path)
    frozen.verify()
    flip(tmp_path / IMAGES)
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        frozen.verify()
    (tmp_path / IMAGES).unlink()
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        frozen.images([0])


@dataclass
class OneSet:
    """A registry that has this set and nothing else."""

    folder: Path
    digest: str
    fetched: int = 0

    def evaluation_set(self):
        return RegisteredVersion("1", self.digest)

    def download(self, uri, folder):
        self.fetched += 1
        return Path(shutil.copytree(self.folder, folder))


def test_a_damaged_copy_is_fetched_again(rows, tmp_path, monkeypatch):
    registry = OneSet(tmp_path / "frozen", frozen_in(tmp_path / "frozen", rows[:30]).digest)

    current = CurrentSet(registry, tmp_path / "cache")
    found = current.get()
    found.verify()
    flip(found.folder / IMAGES)
    CurrentSet(registry, tmp_path / "cache").get().verify()
    assert registry.fetched == 2

    check = Executor(tmp_path / "store", registry, None, (), tmp_path / "cache").check
    monkeypatch.setattr(check, "evaluation", current)
    monkeypatch.setattr(check, "_judgement", lambda *_: current.get().verify())
    flip(found.folder / IMAGES)
    with pytest.raises(StepFailed, match="cannot be read"):
        check.run(Release("1", "sha256:1"), lambda remark: None, None)
    current.get().verify()
    assert registry.fetched == 3

    flip(registry.folder / IMAGES)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        CurrentSet(registry, tmp_path / "cache").get()
    assert list((tmp_path / "cache").iterdir()) == [], "a damaged one is not kept"
