"""archive_plan.py measures a sample and computes what a large archive needs."""

import pytest

from handlers.errors import UserError
from scripts.studies import archive_plan
from scripts.studies.archive_plan import ArchivePlan, MeasuredSample, measure, plan
from tests.models import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path


def test_the_plan_is_proportional():
    sample = MeasuredSample(rate=50, picture_bytes=200_000, score_bytes=150)
    assert plan(sample, 180_000) == ArchivePlan(core_hours=1, picture_bytes=36e9, score_bytes=27e6)


def test_a_sample_is_measured_by_the_workers_of_score(tmp_path, sample_images, bundle):
    archive = tmp_path / "archive"
    archive.mkdir()
    for number, data in enumerate(sample_images):
        (archive / f"{number}.jpg").write_bytes(data)
    (archive / "notes.jpg").write_text("no image")
    sample = measure(str(archive), bundle, workers=2, seconds=0.1, cache=tmp_path / "cache")
    assert sample.rate > 1
    assert sample.picture_bytes == sum(map(len, sample_images)) / len(sample_images), "refused files are left out"
    assert sample.score_bytes > 64, "a hash alone has as many letters"


def test_a_sample_without_a_picture_is_refused(tmp_path, bundle):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "0.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"None of the first 1 pictures of .* can be scored"):
        measure(str(tmp_path / "archive"), bundle, workers=1, seconds=0.1, cache=tmp_path / "cache")


def test_the_command_prints_both_sizes(monkeypatch):
    monkeypatch.setattr(archive_plan, "measure", lambda *_: MeasuredSample(50, 200_000, 150))
    printed = []
    monkeypatch.setattr(archive_plan.console, "print", printed.append)
    archive_plan.main("data/sample", workers=2)
    assert "50.0 pictures/s on each of 2 cores" in printed[0]
    assert [list(column.cells) for column in printed[1].columns] == [
        ["1,000,000", "100,000,000"], ["5.6", "555.6"], ["0.3", "34.7"], ["0.0", "2.2"],
        ["200.0", "20,000.0"], ["0.1", "15.0"],
    ]  # fmt: skip
