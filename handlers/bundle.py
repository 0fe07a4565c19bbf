"""The bundle: a folder that holds everything needed to use a trained model.

    bundle.json           architecture, classes, preprocessing, calibration, evidence, and the SHA-256 of every other
                          file, so that the digest of this one file vouches for all
    model.safetensors     the weights in fp16 or fp32, and the space of known lesions (handlers/weights.py)
    golden.json, golden/  pictures with the answers that this model must give, wherever it runs
    reference.json        what is normal for its predictions (handlers/reference.py); not in every bundle
    receipt.json          hashes and lesion ids of the images it was made from (handlers/receipt.py)
    graph.xml, graph.bin  the serving graph (OpenVINO), derived from the weights; a slim bundle comes without

A bundle is verified where trust changes hands: `seal` hashes what was written, and `Bundle.load` checks a bundle that
comes from elsewhere. In between, pass the Bundle on. Needs neither torch nor OpenVINO.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from handlers.calibration import Calibration
from handlers.errors import UserError
from handlers.files import file_sha256, write_json
from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import CODES

SCHEMA = 1
CONFIG = "bundle.json"
WEIGHTS = "model.safetensors"
GRAPH = "graph.xml"
GRAPH_WEIGHTS = "graph.bin"
GOLDEN = "golden.json"
RECEIPT = "receipt.json"


class BundleError(UserError):
    """A bundle that is incomplete, damaged, or contradicts itself."""


@dataclass(frozen=True)
class GoldenCase:
    """A picture and the answer that the exported model gave for it in fp32.

    `colours` are the mean colours of its pixels as training saw them (handlers.preprocessing.fingerprint). `metadata`
    are the values that came with the picture.
    """

    name: str
    image: bytes
    probabilities: dict[str, float]
    grid: list[list[float]]
    colours: list[list[list[float]]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def difference(self, probabilities: Mapping[str, float]) -> float:
        """Return the largest absolute difference from these probabilities; NaN if any probability is NaN."""
        # numpy's max, as Python's max skips NaN
        return float(np.max([abs(probabilities[code] - expected) for code, expected in self.probabilities.items()]))

    def disagreement(self, probabilities: dict[str, float], grid: list[list[float]]) -> tuple[float, float]:
        """Return the largest probability difference to another answer, and 1 - correlation of the two maps.

        Two flat maps correlate perfectly.
        """
        difference = self.difference(probabilities)
        ours, theirs = np.ravel(self.grid), np.ravel(grid)
        if ours.shape != theirs.shape:
            return difference, 1.0
        if ours.std() < 1e-6 or theirs.std() < 1e-6:
            return difference, 0.0 if np.allclose(ours, theirs, atol=1e-2) else 1.0
        return difference, 1.0 - float(np.corrcoef(ours, theirs)[0, 1])


@dataclass(frozen=True)
class BundleConfig:
    """The content of bundle.json except the list of files.

    `classes` are the codes of the head's outputs in order. `options` go to build_backbone. `metadata` are the inputs
    besides the picture. `evidence` describes the training (run_id, dataset_fingerprint, code_revision, metrics, ...).
    `runtime` is "openvino" if the bundle has its graph, "torch" if the graph cannot be exported, and "" before export.
    """

    name: str
    architecture: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    calibration: Calibration
    evidence: dict[str, Any] = field(default_factory=dict)
    runtime: str = ""
    metadata: Metadata = field(default_factory=Metadata)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as kept in bundle.json."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BundleConfig":
        """Invert to_dict. Raises BundleError for another schema or unknown class codes."""
        if values.get("schema") != SCHEMA:
            raise BundleError(
                f"The bundle has schema {values.get('schema')!r}, but this version reads schema {SCHEMA}."
            )
        try:
            config = cls(
                name=values["name"],
                architecture=values["architecture"],
                options=values["options"],
                classes=tuple(values["classes"]),
                preprocessing=Preprocessing.from_dict(values["preprocessing"]),
                calibration=Calibration.from_dict(values["calibration"]),
                evidence=values["evidence"],
                runtime=values["runtime"],
                metadata=Metadata.from_dict(values.get("metadata", {})),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise BundleError(f"{CONFIG} has a missing or malformed entry: {error!r}.") from error
        if unknown := [code for code in config.classes if code not in CODES]:
            raise BundleError(f"{CONFIG} has classes that are not in the taxonomy: {', '.join(unknown)}.")
        return config


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `files` maps names to {"sha256", "bytes"}; `digest` is "sha256:" and bundle.json's hash."""

    path: Path
    config: BundleConfig
    files: dict[str, dict[str, Any]]
    digest: str

    @classmethod
    def load(cls, path: Path | str) -> "Bundle":
        """Read a bundle from elsewhere and check the hash of every file. Raises BundleError."""
        bundle = cls.read(path)
        for name, entry in bundle.files.items():
            try:
                sha256 = file_sha256(bundle.path / name)
            except OSError as error:
                raise BundleError(f"{bundle.path / name} cannot be read: {error.strerror}.") from error
            if sha256 != entry["sha256"]:
                raise BundleError(
                    f"{bundle.path / name} is damaged: its SHA-256 is not the one in {CONFIG}. Fetch the bundle again."
                )
        return bundle

    @classmethod
    def read(cls, path: Path | str) -> "Bundle":
        """Read a bundle that was verified where it came from: check its file list, no hashes. Raises BundleError."""
        path = Path(path)
        try:
            text = (path / CONFIG).read_bytes()
            values = json.loads(text)
        except OSError as error:
            raise BundleError(f"{path} is not a bundle: {CONFIG} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise BundleError(f"{path / CONFIG} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise BundleError(f"{path / CONFIG} is not a JSON object.")
        config, files = BundleConfig.from_dict(values), values.get("files")
        if not isinstance(files, dict) or not all(isinstance(e, dict) and "sha256" in e for e in files.values()):
            raise BundleError(f"{path / CONFIG} does not list the bundle's files with their SHA-256.")
        _check_required(files, path)
        for name in files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise BundleError(f"{path / CONFIG} lists a file outside the bundle: {name}.")
            if not (path / name).is_file():
                raise BundleError(f"The bundle {path} lacks {name}.")
        return cls(path, config, files, f"sha256:{hashlib.sha256(text).hexdigest()}")

    @classmethod
    def draft(cls, folder: Path, config: BundleConfig) -> "Bundle":
        """Return a bundle that is still being written: the eager model can run it; it has no files and no digest."""
        return cls(folder, config, {}, "")

    @property
    def has_graph(self) -> bool:
        """True if the bundle holds the serving graph."""
        return GRAPH in self.files

    def golden(self) -> list[GoldenCase]:
        """Return the golden cases in order."""
        return [
            GoldenCase(image=(self.path / case["name"]).read_bytes(), **case)
            for case in json.loads((self.path / GOLDEN).read_bytes())
        ]

    def copy_files(self, folder: Path, *leave_out: str) -> None:
        """Copy the files, except bundle.json and `leave_out`, into `folder`."""
        for name in self.files.keys() - set(leave_out):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, folder / name)


def seal(folder: Path, config: BundleConfig) -> Bundle:
    """Write bundle.json over the files in `folder`. Raises BundleError if a required file is missing."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != CONFIG
    }
    _check_required(files, folder)
    write_json(folder / CONFIG, {**config.to_dict(), "files": files})
    return Bundle(folder, config, files, f"sha256:{file_sha256(folder / CONFIG)}")


def _check_required(files: Mapping[str, Any], path: Path) -> None:
    if missing := [name for name in (WEIGHTS, GOLDEN, RECEIPT) if name not in files]:
        raise BundleError(f"The bundle {path} lacks {', '.join(missing)}. Export the model again.")
