"""bench_training.py feeds the same training step from memory, from the image cache and from files."""

import pytest

from handlers.errors import UserError
from scripts.studies import bench_training
from tests.commands import invoke
from tests.tiny_lesions import tiny_manifest

SETTINGS = ["architecture=test_vit", "image_size=32", "cache_size=32", "stem=patch", "precision=fp32"]


def test_it_compares_three_sources(tmp_path):
    options = ["--data", tiny_manifest(tmp_path), "--steps", "1", "--rounds", "2", "--workers", "0"]
    code, output = invoke(bench_training.main, *options, *SETTINGS, "batch_size=8")
    assert code == 0, output
    assert all(word in output for word in ("random tensors", "cache", "ImageFolder", "1.000"))


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("imagesize=32", 2, "'image_size'"),
        ("batch_size=64", 1, "has 48 training images. Set batch_size=48 or less"),
    ],
)
def test_wrong_settings_are_reported(tmp_path, setting, code, message):
    with pytest.raises(UserError, match=message) as error:
        bench_training.main(tiny_manifest(tmp_path), [*SETTINGS, setting], steps=1, rounds=1, workers=0)
    assert error.value.exit_code == code
