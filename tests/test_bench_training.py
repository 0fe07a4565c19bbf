"""bench_training.py feeds the same training step from memory, from the cache and from files, and compares them."""

import subprocess
import sys

import pytest

from tests.tiny_lesions import tiny_manifest
from training.config import ROOT


@pytest.mark.timeout(180)
def test_it_compares_the_three_and_refuses_in_a_sentence(tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    command = [sys.executable, ROOT / "scripts" / "bench_training.py", "--data", manifest, "--steps", "1"]
    settings = ["--rounds", "2", "--workers", "0", "architecture=test_vit", "image_size=32", "batch_size=8"]
    settings += ["cache_size=32", "stem=patch", "precision=fp32"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("random tensors", "cache", "ImageFolder"):
        assert name in done.stdout
    assert "1.000" in done.stdout
    refused = subprocess.run([*command, "imagesize=32"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "the nearest is 'image_size'" in refused.stderr
    few = subprocess.run([*command, *settings, "batch_size=64"], capture_output=True, text=True, timeout=60)
    assert few.returncode == 1
    assert "48 training images, fewer than a batch of 64" in few.stderr
