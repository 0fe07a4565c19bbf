"""A bundle and the code that runs it -> one TorchServe archive; the same input gives the same bytes.

A .mar is a zip with MAR-INF/MANIFEST.json. It is written here and not by torch-model-archiver because that one stamps
its files with the time and works in one shared temporary folder; a test holds the two against each other.

    MAR-INF/MANIFEST.json    name, version, handler
    skin_lesion_handler.py   TorchServe imports the handler by its bare name, so it lies at the root as well
    handlers/                the whole package: an archive runs its own code, whatever the repository does later
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
from mlflow_tracking.settings import MODEL_NAME, ROOT

HANDLERS = Path(handlers.__file__).parent
HANDLER = "skin_lesion_handler.py"
MODEL_CONFIG = ROOT / "torchserve" / "model-config.yaml"
BUNDLE_FOLDER = "bundle"
# What TorchServe must be told again when it restores a version at its start.
START_SETTINGS = (
    "minWorkers",
    "maxWorkers",
    "batchSize",
    "maxBatchDelay",
    "responseTimeout",
    "startupTimeout",
    "maxRetryTimeoutInSec",
)
_OURS = re.compile(rf"{MODEL_NAME}-\d+-[0-9a-f]{{12}}\.mar")


@dataclass(frozen=True)
class Archive:
    """A finished archive: its file, the file's SHA-256, and TorchServe's settings out of model-config.yaml."""

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
    """Write the archive of a bundle folder to `out`: temporary file, fsync, rename.

    Entries are sorted, carry one fixed time and are not compressed (weights hardly are, and how deflate packs them
    depends on the version of zlib). OSError (disk full, source missing) leaves `out` as it was.
    """
    settings = read_settings(model_config)
    sources = dict(_sources(bundle, handlers_folder, model_config))
    with atomic_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("MAR-INF/MANIFEST.json"), _manifest(version))
        for name in sorted(sources):
            # zip64 in the header depends on what zipfile believes the size may be: tell it.
            info = _entry(name)
            info.file_size = sources[name].stat().st_size
            with sources[name].open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return Archive(out, file_sha256(out), settings)


def extract_bundle(archive: Path, folder: Path) -> Path:
    """Unpack the bundle of an archive into `folder` and return where it lies. Raises OSError or zipfile.BadZipFile."""
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.startswith(f"{BUNDLE_FOLDER}/"):
                file.extract(name, folder)
    return folder / BUNDLE_FOLDER


def clean(store: Path) -> list[Path]:
    """Remove what writing that was cut off has left, also below. Only for the holder of the store's lock."""
    left = [path for path in store.rglob(f".*{TEMPORARY}") if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def surplus(store: Path, needed: Collection[str], keep: int) -> list[Path]:
    """The archives of our naming in the store that nobody needs, but for the `keep` youngest of them, oldest first.

    A crash between writing an archive and its ledger entry leaves one that the ledger does not know; it counts too.
    """
    unneeded = [path for path in store.glob("*.mar") if _OURS.fullmatch(path.name) and path.name not in needed]
    unneeded.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    return unneeded[: max(0, len(unneeded) - keep)]


def read_settings(model_config: Path) -> dict[str, int]:
    """TorchServe's own numbers in model-config.yaml."""
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
        "createdOn": "01/01/1980 00:00:00",  # TorchServe wants one; a true one would differ each time
    }
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980, the first moment a zip can name
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # else the entry says on which system it was made
    return entry
