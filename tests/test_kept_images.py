"""Kept pictures: only where the operator says so, without metadata, deleted after their days or at once."""

import hashlib
import io
import os
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from handlers.kept_image_writer import LONGEST_SIDE, ImageKeeper
from handlers.kept_images import delete_older, kept, kept_path
from handlers.skin_lesion_handler import SkinLesionHandler
from monitoring.outcomes import PictureOutcome, record
from scripts import forget
from tests.commands import invoke
from tests.hostile import photograph
from tests.hostile.images import SECRET, encode, exif, small
from tests.models import tiny_bundle
from tests.monitored_log import NOW, prediction
from tests.review_world import ReviewedMonitor, sha
from tests.test_handler import FakeContext
from tests.test_privacy import traces

DAY = 86400


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", SECRET)
    return info


@pytest.mark.parametrize(
    "options",
    [{"format": "JPEG", "exif": exif(6), "comment": SECRET.encode()}, {"format": "TIFF", "exif": exif(1)},
     {"format": "PNG", "pnginfo": texts()}],
)  # fmt: skip
def test_a_kept_picture_has_the_pixels_and_no_metadata(tmp_path, options):
    data = encode(small(photograph(0)), options.pop("format"), **options)
    keeper = ImageKeeper(tmp_path / "kept")
    keeper.keep("a" * 64, data)
    keeper.join()
    path = kept_path(tmp_path / "kept", "a" * 64)
    copy = path.read_bytes()
    assert not {SECRET, "Mustermann", "GPS", "Exif"} & set(traces(copy, data))
    with Image.open(io.BytesIO(copy)) as picture:
        assert not picture.getexif()
        assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_large_picture_is_made_smaller_and_one_sent_again_keeps_longer(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((2400, 1800)).save(buffer, "PNG")
    keeper = ImageKeeper(tmp_path)
    keeper.keep("a" * 64, buffer.getvalue())
    keeper.join()
    with Image.open(kept_path(tmp_path, "a" * 64)) as picture:
        assert max(picture.size) == LONGEST_SIDE
    os.utime(kept_path(tmp_path, "a" * 64), (NOW - 9 * DAY,) * 2)
    keeper.keep("a" * 64, buffer.getvalue())
    keeper.join()
    assert kept(tmp_path)["a" * 64] == pytest.approx(time.time(), abs=60)


def test_a_picture_that_cannot_be_kept_disturbs_nothing(tmp_path, caplog, drawn_image):
    (tmp_path / "file").write_text("no folder")
    keeper = ImageKeeper(tmp_path / "file")
    keeper.keep("a" * 64, drawn_image())
    keeper.keep("a" * 64, b"no picture")
    keeper.join()
    assert "could not be kept" in caplog.text


def test_more_pictures_than_can_wait_are_dropped_and_said(tmp_path, caplog, monkeypatch, drawn_image):
    keeper = ImageKeeper(tmp_path)
    monkeypatch.setattr(keeper, "_write", lambda *_: time.sleep(0.02))
    for number in range(90):
        keeper.keep(f"{number:064x}", b"x" * (2 << 20))
    keeper.join()
    assert 0 < keeper.dropped < 90
    assert "were not kept" in caplog.text


def test_the_handler_keeps_answered_pictures_only_where_the_operator_says_so(tmp_path, monkeypatch, sample_images):
    tiny_bundle(tmp_path / "bundle")
    rows = [{"body": bytearray(sample_images[0])}, {"body": bytearray(b"bad")}, {"body": bytearray(sample_images[1])}]

    class SecondUnrecorded(FakeContext):
        def get_request_header(self, index, key):
            return "no" if (index, key) == (2, "X-Record") else None

    def handle() -> SkinLesionHandler:
        handler = SkinLesionHandler()
        handler.initialize(SecondUnrecorded(tmp_path))
        handler.handle(rows, SecondUnrecorded(tmp_path))
        return handler

    monkeypatch.delenv("KEPT_IMAGES", raising=False)
    assert handle().keeper is None
    monkeypatch.setenv("KEPT_IMAGES", str(tmp_path / "kept"))
    handle().keeper.join()
    assert set(kept(tmp_path / "kept")) == {hashlib.sha256(sample_images[0]).hexdigest()}


def test_the_monitor_deletes_pictures_after_their_days(tmp_path):
    world = ReviewedMonitor(tmp_path)
    world.answer(["old", "new"])
    folder = world.settings.kept_images_folder
    (folder / f".{sha('x')}.jpg.12345678.tmp").write_bytes(b"half")
    for path in (kept_path(folder, sha("old")), folder / f".{sha('x')}.jpg.12345678.tmp"):
        os.utime(path, (NOW - 31 * DAY,) * 2)
    ReviewedMonitor(tmp_path)
    assert [path.name for path in folder.iterdir()] == [f"{sha('new')}.jpg"]
    assert delete_older(tmp_path / "nowhere", NOW) == 0


def test_pictures_go_when_the_operator_keeps_none_any_more_even_without_a_database(tmp_path):
    world = ReviewedMonitor(tmp_path)
    world.answer(["new"])
    world.settings.keep_images_days = 0
    world.settings.monitor_database = f"sqlite:///{tmp_path / 'away' / 'monitor.db'}"
    type(world.monitor)(world.settings).step()
    assert not kept(world.settings.kept_images_folder)


@pytest.fixture
def world(tmp_path, monkeypatch) -> ReviewedMonitor:
    world = ReviewedMonitor(tmp_path)
    monkeypatch.setenv("STACK_STATE", str(tmp_path))
    monkeypatch.setenv("MODEL_STORE", str(tmp_path / "store"))
    for name in ("MONITOR_DATABASE", "PREDICTION_LOG", "KEPT_IMAGES"):
        monkeypatch.delenv(name, raising=False)
    return world


def test_a_picture_is_forgotten_at_once(world):
    world.answer(["a", "b"])
    world.read("a", "ada", "NV")
    record(world.store, [PictureOutcome(sha("a"), "NV")], "lab")
    code, output = invoke(forget.main, sha("a").upper())
    assert code == 0, output
    assert output == "The kept picture is deleted. Deleted 1 predictions, 1 readings, 1 outcomes."
    assert set(kept(world.settings.kept_images_folder)) == {sha("b")}
    code, output = invoke(forget.main, sha("a"))
    assert code == 1
    assert output.startswith("No picture was kept.")
    assert f"Nothing is stored of {sha('a')}." in output
    assert world.store.forget(sha("b")) == {"predictions": 1, "readings": 0, "outcomes": 0}


def test_an_unread_log_and_a_wrong_name_have_exit_codes_of_their_own(world):
    world.answer(["a"])
    world.log.write(prediction("later", image_sha256=sha("a")))
    code, output = invoke(forget.main, sha("a"))
    assert code == 3
    assert "has not read" in output
    assert invoke(forget.main, "x")[0] == 2
