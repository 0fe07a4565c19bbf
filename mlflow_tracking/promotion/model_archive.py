"""Build a TorchServe archive from a bundle and the code that runs it. The same input gives the same bytes.

A .mar file is a zip file. torch-model-archiver is not used because it writes the current time into its files and works
in one shared temporary folder. A test compares the contents of both.

    MAR-INF/MANIFEST.json    name, version, handler
    skin_lesion_handler.py   TorchServe imports the handler by its bare name, so it is also at the root
    handlers/                the whole package: an archive runs its own code
    bundle/                  the model
    model-config.yaml        workers, batching, precision
"""

import json
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

import handlers
from handlers.files import TEMPORARY, atomic_file, file_sha256
from mlflow_tracking.stack_settings import MODEL_NAME, ROOT

HANDLERS = Path(handlers.__file__).parent
HANDLER = "skin_lesion_handler.py"
MODEL_CONFIG = ROOT / "torchserve" / "model-config.yaml"
BUNDLE_FOLDER = "bundle"
# The settings that TorchServe needs again when it restores a version at its start.
START_SETTINGS = (
    "minWorkers",
    "maxWorkers",
    "batchSize",
    "maxBatchDelay",
    "responseTimeout",
    "startupTimeout",
    "maxRetryTimeoutInSec",
)
_ARCHIVE_NAME = re.compile(rf"{MODEL_NAME}-\d+-[0-9a-f]{{12}}\.mar")


@dataclass(frozen=True)
class Archive:
    """A finished archive: its file, the file's SHA-256, and TorchServe's settings from model-config.yaml."""

    path: Path
    sha256: str
    settings: dict[str, int]


def build(
    bundle: Path,
    out: Path,
    *,
    version: str,
    handlers_folder: Path = HANDLERS,
    model_config: Path = MODEL_CONFIG,
) -> Archive:
    """Write the archive of a bundle folder to `out`, atomically. OSError leaves `out` unchanged.

    Entries are sorted and have one fixed time. They are not compressed: weights hardly shrink, and the bytes would
    depend on the version of zlib.
    """
    settings = read_settings(model_config)
    sources = dict(_sources(bundle, handlers_folder, model_config))
    with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("MAR-INF/MANIFEST.json"), _manifest(version))
        for name in sorted(sources):
            # Whether the header is a zip64 one depends on the size that zipfile expects.
            info = _entry(name)
            info.file_size = sources[name].stat().st_size
            with sources[name].open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return Archive(out, file_sha256(out), settings)


def extract_bundle(archive: Path, folder: Path) -> Path:
    """Extract the bundle of an archive into `folder`; return its path. Raises OSError or zipfile.BadZipFile."""
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.startswith(f"{BUNDLE_FOLDER}/"):
                file.extract(name, folder)
    return folder / BUNDLE_FOLDER


def clean(store: Path) -> list[Path]:
    """Remove the temporary files of interrupted writes; return them. The caller holds the store's lock."""
    leftovers = [path for path in store.rglob(f".*{TEMPORARY}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def surplus(store: Path, needed: Collection[str | None], keep: int) -> list[Path]:
    """Return the archives that are not needed, except the `keep` youngest, the oldest first.

    Files with other names are left alone. An archive that the ledger lacks, after a crash, counts as not needed.
    """
    unneeded = [path for path in store.glob("*.mar") if _ARCHIVE_NAME.fullmatch(path.name) and path.name not in needed]
    unneeded.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    return unneeded[: max(0, len(unneeded) - keep)]


def read_settings(model_config: Path) -> dict[str, int]:
    """Return TorchServe's own settings in a model-config.yaml."""
    values = yaml.safe_load(model_config.read_text())
    return {name: int(values[name]) for name in START_SETTINGS if name in values}


def _sources(bundle: Path, handlers_folder: Path, model_config: Path) -> Iterator[tuple[str, Path]]:
    yield HANDLER, handlers_folder / HANDLER
    yield MODEL_CONFIG.name, model_config
    for folder, name in ((handlers_folder, "handlers"), (bundle, BUNDLE_FOLDER)):
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            if path.is_file() and not hidden:
                yield f"{name}/{inside.as_posix()}", path


def _manifest(version: str) -> str:
    values = {
        "runtime": "python",
        "model": {
            "modelName": MODEL_NAME,
            "modelVersion": version,
            "handler": HANDLER,
            "configFile": MODEL_CONFIG.name,
        },
        "archiverVersion": "0.12.0",
        "createdOn": "01/01/1980 00:00:00",  # TorchServe requires a time, and the same bytes require a fixed one
    }
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980, the earliest time of the format
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # otherwise the entry names the system that wrote it
    return entry
