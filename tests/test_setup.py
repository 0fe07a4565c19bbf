"""scripts/setup_env.sh names each missing requirement in one sentence, before it downloads anything.

The quick tests give the script a PATH with stand-ins that fail. The slow test creates an environment in a fresh copy of
the repository, interrupts the installation, and runs it again.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compose import copy_of_the_repository
from tests.conftest import ROOT

TOOLS = ["bash", "env", "cat", "chmod", "cksum", "cp", "awk", "dirname", "mkdir", "rm", "grep", "head"]


@pytest.fixture
def clone(tmp_path):
    """The files that the set-up needs, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    for name in ("scripts/setup_env.sh", "requirements/all.txt", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(clone: Path, *args: str, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up where only TOOLS and `programs` (name: text of a shell script) can be found."""
    commands = clone.parent / "bin"
    commands.mkdir()
    for name in TOOLS:
        (commands / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        path = commands / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": str(commands), "HOME": str(clone.parent)}
    return subprocess.run(
        [clone / "scripts/setup_env.sh", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1 and one line that says what to do."""
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


PYTHON = f'exec "{sys.executable}" "$@"'
DISK = 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "/dev/x 1 1 {} 1% /"'
PLENTY = DISK.format(99 << 20)


def test_no_suitable_python(clone):
    done = setup(clone, python3='case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    assert_sentence(done, "Python 3.9.2", "python3.11-venv", "PYTHON=")


def test_no_venv_module(clone):
    done = setup(clone, python3_11=f'case "$*" in *ensurepip*) exit 1;; esac; {PYTHON}', df=PLENTY)
    assert_sentence(done, "install python3.11-venv")
    assert not (clone / ".venv").exists()


def test_full_disk(clone):
    assert_sentence(setup(clone, python3_11=PYTHON, df=DISK.format(3 << 20)), "has 3 GB free", "needs 8 GB")
    assert not (clone / ".venv").exists()


def test_no_chromium_and_no_right_to_install_it(clone):
    assert_sentence(setup(clone, "--browser", id="echo 1000"), "sudo apt install chromium", "CHROMIUM=")


def test_a_finished_environment_is_left_alone(clone):
    """What decides is the content of the files that it was made from; with all tools gone it could not do anything."""
    wanted = subprocess.run(
        "cat requirements/all.txt pyproject.toml scripts/setup_env.sh | cksum",
        shell=True, cwd=clone, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to("/bin/false")
    (clone / ".venv/.complete").write_text(wanted)
    (clone / ".venv/.place").write_text(f"{clone.resolve()}\n")
    assert setup(clone).returncode == 0
    (clone / "pyproject.toml").write_text("changed")
    shutil.rmtree(clone.parent / "bin")
    assert_sentence(setup(clone), "Python 3.11 or 3.12 is required")


@pytest.mark.parametrize("writable", [True, False])
def test_a_home_that_cannot_be_written_has_no_cache(clone, writable):
    home = clone.parent if writable else Path("/dev/null")
    uv = f'#!/bin/sh\n[ "$1" = cache ] && echo {home}/uv && exit\necho "$UV_NO_CACHE" > "{clone}/no_cache"\n'
    (clone / "uv").write_text(uv)
    (clone / "uv").chmod(0o755)
    python = """case "$*" in
        "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp uv .venv/bin/uv;;
        -c*print*) echo 3.11;;
    esac"""
    assert setup(clone, python3_11=python, df=PLENTY).returncode == 0
    assert (clone / "no_cache").read_text() == ("\n" if writable else "1\n")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_interrupted_set_up_is_repaired(tmp_path):
    copy_of_the_repository(tmp_path / "clone")
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    packages = tmp_path / "clone/.venv/lib"
    first = subprocess.Popen(["make", "env"], cwd=tmp_path / "clone", env=environment, start_new_session=True)
    while first.poll() is None and not list(packages.glob("*/site-packages/torch/*")):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() != 0, "it was done before it could be interrupted"
    assert not (tmp_path / "clone/.venv/.complete").exists()
    subprocess.run(["make", "env"], cwd=tmp_path / "clone", env=environment, check=True)
    code = "import torch, mlflow, streamlit, openvino, ts, handlers; print(handlers.__file__)"
    done = subprocess.run(
        [tmp_path / "clone/.venv/bin/python", "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "clone/handlers/__init__.py")
