"""Fixtures for the tests of manifests."""

import json

import pytest

from tests.datasets import class_folders, ham10000, save
from training.data.manifest import read_manifest
from training.data.preparation import build_manifest


@pytest.fixture
def build(tmp_path):
    """Return a function: folders -> the manifest by image id. Its attribute `report` is the last report."""

    def run(*directories, **options):
        out = tmp_path / "out" / "manifest.csv"
        run.report = build_manifest(directories, out, **options)
        assert run.report == json.loads(out.with_name("manifest.report.json").read_text())
        return read_manifest(out).set_index("image_id")

    return run


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
