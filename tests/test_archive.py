"""TorchServe archives.

- the same bundle, code and settings give the same bytes at any place and time;
- an archive contains the whole `handlers` package and runs it, without the repository;
- it contains what torch-model-archiver would put into it;
- a failed or interrupted build leaves the former archive and nothing else.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from handlers.bundle import GOLDEN, RECEIPT, WEIGHTS, Bundle, BundleConfig, seal
from handlers.calibration import Calibration
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.promotion import model_archive


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """A valid bundle without a working model."""
    folder = tmp_path / "source" / "bundle"
    (folder / "golden").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 5000)  # more than one chunk of copying
    (folder / GOLDEN).write_text("[]")
    (folder / RECEIPT).write_text("{}")
    (folder / "golden" / "MEL.jpg").write_bytes(b"picture")
    return seal(
        folder, BundleConfig("skin_vit", "vit", {}, KNOWN_CODES, Preprocessing(64), Calibration(), runtime="torch")
    )


@pytest.fixture
def built(tmp_path, bundle) -> model_archive.Archive:
    return model_archive.build(bundle.path, tmp_path / "one.mar", version="3")


def test_the_same_input_gives_the_same_bytes(tmp_path, bundle, built):
    elsewhere = tmp_path / "elsewhere" / "a_bundle"
    shutil.copytree(bundle.path, elsewhere)
    code = tmp_path / "elsewhere" / "handlers"
    shutil.copytree(model_archive.HANDLERS, code)
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    (code / "__pycache__").mkdir(exist_ok=True)
    (code / "__pycache__" / "left.pyc").write_bytes(b"from another Python")
    (code / ".DS_Store").write_bytes(b"")
    again = model_archive.build(elsewhere, tmp_path / "two.mar", version="3", handlers_folder=code)
    assert again.path.read_bytes() == built.path.read_bytes()
    assert again.sha256 == built.sha256
    other = model_archive.build(bundle.path, tmp_path / "three.mar", version="4")
    assert other.sha256 != built.sha256


def test_it_runs_its_own_code(tmp_path, built):
    with zipfile.ZipFile(built.path) as file:
        file.extractall(tmp_path / "model")
    code = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
import handlers, handlers.predictor, skin_lesion_handler
classes = inspect.getmembers(skin_lesion_handler, inspect.isclass)
own = [member for _, member in classes if member.__module__ == "skin_lesion_handler"]
print(handlers.__file__, handlers.predictor.__file__, len(own), sep="\\n")
"""
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    package, predictor, classes = done.stdout.splitlines()
    assert Path(package).is_relative_to(tmp_path / "model")
    assert Path(predictor).is_relative_to(tmp_path / "model")
    assert classes == "1", "TorchServe takes the one class of the module"


def test_its_bundle_verifies(tmp_path, bundle, built):
    assert Bundle.load(model_archive.extract_bundle(built.path, tmp_path / "out")).digest == bundle.digest


def contents(path: Path) -> tuple[dict, dict[str, bytes]]:
    with zipfile.ZipFile(path) as file:
        files = {name: file.read(name) for name in file.namelist() if not name.endswith("/")}
    return json.loads(files.pop("MAR-INF/MANIFEST.json")), files


def test_it_holds_what_torch_model_archiver_would_put_into_it(tmp_path, bundle, built):
    stage, out = tmp_path / "stage", tmp_path / "out"
    out.mkdir()
    shutil.copytree(model_archive.HANDLERS, stage / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(bundle.path, stage / "bundle")
    command = [
        str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", "skin_vit", "--version", "3",
        "--handler", str(model_archive.HANDLERS / model_archive.HANDLER), "--extra-files", str(stage),
        "--config-file", str(model_archive.MODEL_CONFIG), "--export-path", str(out),
    ]  # fmt: skip
    # It empties and uses TMPDIR/skin_vit.
    subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, check=True, capture_output=True)
    their_manifest, their_files = contents(out / "skin_vit.mar")
    our_manifest, our_files = contents(built.path)
    assert our_files == their_files
    assert our_manifest["model"] == their_manifest["model"]
    assert our_manifest["runtime"] == their_manifest["runtime"]
    assert our_manifest.keys() == their_manifest.keys()


def test_settings_for_torchserve_are_read_from_the_config(built):
    assert built.settings["minWorkers"] == 1
    assert built.settings.keys() == set(model_archive.START_SETTINGS)


def test_a_failed_build_leaves_the_former_archive(tmp_path, bundle, built, monkeypatch):
    before = built.path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        model_archive.build(bundle.path, built.path, version="9")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        model_archive.build(bundle.path, built.path, version="9", handlers_folder=tmp_path / "nowhere")
    assert built.path.read_bytes() == before
    assert model_archive.clean(tmp_path) == [], "nothing was left"


def test_the_leftovers_of_a_killed_build_are_removed(tmp_path, bundle, built):
    code = f"""
import os, shutil
from pathlib import Path
from mlflow_tracking.promotion import model_archive
os.fsync = lambda _: os.kill(os.getpid(), 9)
model_archive.build(Path({str(bundle.path)!r}), Path({str(built.path)!r}), version="9")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = set(tmp_path.glob(".*"))
    assert left, "killed too early"
    assert contents(built.path)[0]["model"]["modelVersion"] == "3"
    assert set(model_archive.clean(tmp_path)) == left
    assert not set(tmp_path.glob(".*"))
    assert built.path.exists()
    (tmp_path / "judgements").mkdir()
    below = tmp_path / "judgements" / ".answers.jsonl.123.tmp"
    below.touch()
    assert model_archive.clean(tmp_path) == [below]
