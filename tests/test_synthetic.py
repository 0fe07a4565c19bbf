"""Drawn lesions: the pictures that tests, golden files and the README use in place of patients' photographs.

The same arguments give the same picture, byte for byte. Each class has a look that a small model can learn. A data set
is drawn in the layout of three public ones, with several pictures of one lesion, and with the same lesions under the
same image ids in every layout.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from training.data.synthetic import NAMES, draw_dataset, draw_lesion

SMALL = (96, 72)


def pixels(*args: object, **options: object) -> np.ndarray:
    return np.asarray(draw_lesion(*args, **options), np.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [*NAMES, "UNK"])
def test_same_arguments_same_picture(code):
    first = draw_lesion(7, code, SMALL)
    assert first.size == SMALL
    assert first.mode == "RGB"
    assert first.tobytes() == draw_lesion(7, code, SMALL).tobytes()
    assert first.tobytes() != draw_lesion(8, code, SMALL).tobytes()


@pytest.mark.parametrize("size", [(24, 24), (180, 180), (90, 160)])
def test_any_size(size):
    assert draw_lesion(1, "SCC", size).size == size


def test_another_view_is_the_same_lesion_but_another_picture():
    seen, again, other = pixels(3, "MEL", SMALL), pixels(3, "MEL", SMALL, view=1), pixels(4, "MEL", SMALL)
    assert 2 < np.abs(seen - again).mean() < np.abs(seen - other).mean()


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="cannot draw class 'XYZ': choose one of MEL, NV"):
        draw_lesion(0, "XYZ")


def test_a_small_model_can_tell_the_classes_apart():
    """Colour quantiles and a linear model: far from a network, and far above the 1 in 8 of guessing."""

    def features(seed: int, code: str) -> np.ndarray:
        middle = pixels(seed, code, SMALL)[16:-16, 24:-24].reshape(-1, 3)
        ratios = np.column_stack([middle[:, 0] / middle[:, 1], middle[:, 1] / middle[:, 2]])  # less of the skin's tone
        return np.quantile(np.hstack([middle / 255, ratios]), [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98], axis=0).ravel()

    x = np.array([[features(seed, code) for code in NAMES] for seed in range(36)])
    y = np.tile(np.arange(len(NAMES)), (36, 1))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    model.fit(x[:24].reshape(-1, x.shape[-1]), y[:24].ravel())
    assert model.score(x[24:].reshape(-1, x.shape[-1]), y[24:].ravel()) > 0.6


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("drawn")
    for layout in ("class_folders", "ham10000", "isic2019"):
        assert len(draw_dataset(out / layout, 7, seed=3, layout=layout, size=(40, 30))) == 7 * 8
    return {path.name: path for path in out.iterdir()}


def test_ham10000_layout(datasets):
    table = rows(datasets["ham10000"] / "HAM10000_metadata.csv")
    assert {f"{row['image_id']}.jpg" for row in table} == {p.name for p in (datasets["ham10000"] / "images").iterdir()}
    assert {row["dx"] for row in table} == {"akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"}
    lesions = [row["lesion_id"] for row in table]
    assert len(table) == 56
    assert len(set(lesions)) < 56, "no lesion has two pictures"
    assert len({(row["lesion_id"], row["dx"], row["age"], row["localization"]) for row in table}) == len(set(lesions))


def test_isic2019_layout(datasets):
    truth = rows(datasets["isic2019"] / "ISIC_2019_Training_GroundTruth.csv")
    metadata = rows(datasets["isic2019"] / "ISIC_2019_Training_Metadata.csv")
    files = {path.stem for path in (datasets["isic2019"] / "ISIC_2019_Training_Input").iterdir()}
    assert files == {row["image"] for row in truth} == {row["image"] for row in metadata}
    assert list(truth[0]) == ["image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    assert all(sum(float(row[code]) for code in [*NAMES, "UNK"]) == 1 for row in truth)


def test_class_folders_keep_a_lesion_on_one_side(datasets):
    ham = {row["image_id"]: row["lesion_id"] for row in rows(datasets["ham10000"] / "HAM10000_metadata.csv")}
    sides = {
        side: {ham[path.stem] for path in (datasets["class_folders"] / side).rglob("*.jpg")}
        for side in ("Train", "Test")
    }
    assert sides["Train"]
    assert sides["Test"]
    assert not sides["Train"] & sides["Test"]


def test_layouts_hold_the_same_pictures_under_the_same_ids(datasets):
    found = {name: {p.name: p.read_bytes() for p in folder.rglob("*.jpg")} for name, folder in datasets.items()}
    assert found["ham10000"] == found["isic2019"] == found["class_folders"]
    assert len(set(found["ham10000"].values())) == 56, "two pictures are the same"
    with Image.open(next(datasets["ham10000"].rglob("*.jpg"))) as image:
        assert image.size == (40, 30)
