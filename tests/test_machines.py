"""Machines that differ from the developers': line ends of Windows, spaces, other locales, file systems without sockets."""

import subprocess
from pathlib import Path

import pytest

from handlers.bundle import Bundle
from mlflow_tracking.settings import ROOT


@pytest.fixture(scope="module")
def windows_clone(tmp_path_factory) -> Path:
    """A clone as Git for Windows makes it by default, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a clone") / "skin lesion"
    command = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--shared", ROOT, folder]
    subprocess.run(command, check=True)
    return folder


def test_a_clone_with_windows_line_ends_has_those_of_linux(windows_clone):
    listed = ["git", "-c", "core.autocrlf=true", "ls-files", "--eol"]
    done = subprocess.run(listed, cwd=windows_clone, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(lines) > 100
    assert {worktree for _, worktree, _ in lines} <= {"w/lf", "w/none", "w/-text"}
    done = subprocess.run(["bash", "scripts/setup_env.sh", "--no"], cwd=windows_clone, capture_output=True, text=True)
    assert "The option --no does not exist" in done.stderr


def test_the_shipped_bundle_of_such_a_clone_is_intact(windows_clone):
    assert Bundle.load(windows_clone / "model_store/skin_vit").digest == Bundle.load(ROOT / "model_store/skin_vit").digest
