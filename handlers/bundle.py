"""The bundle: a folder that holds everything needed to use a trained model.

    bundle.json           what the model is: architecture, classes, preprocessing, calibration, evidence, and the
                          SHA-256 of every other file, so that the digest of this one file vouches for all
    model.safetensors     the weights (fp16 or fp32), and what the rejection knows of the features (handlers/runtimes.py)
    golden.json, golden/  pictures with the answers this model must give, wherever it runs
    receipt.json          what it was made from, in hashes and lesion ids, so that nobody tests it on the same images
    graph.xml, graph.bin  the serving graph (OpenVINO), derived from the weights; a slim bundle comes without

Imports neither torch nor OpenVINO, so that the registry's side can check a bundle cheaply.
"""

import hashlib
import json
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


class BundleError(UserError):
    """A bundle that is incomplete, damaged or not what it says it is."""


@dataclass(frozen=True)
class GoldenCase:
    """A picture and the answer the exported model gave for it in fp32.

    `colours` are the mean colours of its pixels as training saw them (handlers.preprocessing.fingerprint); None in a
    bundle from before these were kept. `metadata` are the values that it was asked with beside the picture.
    """

    name: str
    image: bytes
    probabilities: dict[str, float]
    grid: list[list[float]]
    colours: list[list[list[float]]] | None = None
    metadata: dict[str, Any] | None = None

    def difference(self, probabilities: Mapping[str, float]) -> float:
        """The largest difference of a probability from this answer's; not a number if one is none."""
        # numpy's largest, as Python's passes over what is no number
        return float(np.max([abs(probabilities[code] - expected) for code, expected in self.probabilities.items()]))

    def disagreement(self, probabilities: dict[str, float], grid: list[list[float]]) -> tuple[float, float]:
        """How far an answer is from this one: largest probability difference, and 1 - correlation of the maps.

        Two maps that are both flat correlate perfectly.
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
    """The content of bundle.json but for the file list.

    `classes` are the codes of the head's outputs in order; `options` go to build_backbone; `metadata` is what the model
    takes beside the picture, and is left out of bundle.json where that is nothing; `evidence` is what is known
    of the training (run_id, dataset_fingerprint, code_revision, metrics, ...); `runtime` says what serves the model:
    "openvino" once the graph is there, "torch" when it cannot be exported, "" while that is undecided.
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
        """JSON form, as kept in bundle.json."""
        values = {"schema": SCHEMA, **asdict(self), "classes": list(self.classes)}
        del values["metadata"]
        return values | ({"metadata": self.metadata.to_dict()} if self.metadata.fields else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BundleConfig":
        """The inverse of to_dict. Raises BundleError for another schema or unknown class codes."""
        if values.get("schema") != SCHEMA:
            raise BundleError(f"The bundle has schema {values.get('schema')!r}; this version reads schema {SCHEMA}.")
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
            raise BundleError(f"{CONFIG} lacks or garbles an entry: {error}") from error
        if unknown := [code for code in config.classes if code not in CODES]:
            raise BundleError(f"{CONFIG} names classes that the taxonomy does not know: {', '.join(unknown)}.")
        return config


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk. `digest` is "sha256:" and the hash of bundle.json."""

    path: Path
    config: BundleConfig
    files: dict[str, dict[str, Any]]
    digest: str

    @classmethod
    def load(cls, path: Path | str) -> "Bundle":
        """Read a bundle and check every file it lists. Raises BundleError."""
        path = Path(path)
        try:
            text = (path / CONFIG).read_bytes()
            values = json.loads(text)
        except OSError as error:
            raise BundleError(f"{path} is not a bundle: {CONFIG} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise BundleError(f"{path / CONFIG} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise BundleError(f"{path / CONFIG} is not a JSON object.")
        config = BundleConfig.from_dict(values)
        files = values.get("files")
        if not isinstance(files, dict) or not all(isinstance(e, dict) and "sha256" in e for e in files.values()):
            raise BundleError(f"{path / CONFIG} does not list the bundle's files with their SHA-256.")
        for name, entry in files.items():
            file = path / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise BundleError(f"{CONFIG} lists a file outside the bundle: {name}")
            if not file.is_file():
                raise BundleError(f"The bundle {path} lacks {name}.")
            try:
                sha256 = file_sha256(file)
            except OSError as error:
                raise BundleError(f"{file} cannot be read ({error.strerror}).") from error
            if sha256 != entry["sha256"]:
                raise BundleError(f"{file} was changed or damaged: its SHA-256 is not the one in {CONFIG}.")
        for name in (WEIGHTS, GOLDEN):
            if name not in files:
                raise BundleError(f"{CONFIG} in {path} does not list {name}.")
        return cls(path, config, files, "sha256:" + hashlib.sha256(text).hexdigest())

    @property
    def has_graph(self) -> bool:
        """Whether the serving graph is in the bundle."""
        return GRAPH in self.files

    def golden(self) -> list[GoldenCase]:
        """The golden cases, in order."""
        return [
            GoldenCase(
                case["name"],
                (self.path / case["name"]).read_bytes(),
                case["probabilities"],
                case["grid"],
                case.get("colours"),
                case.get("metadata"),
            )
            for case in json.loads((self.path / GOLDEN).read_bytes())
        ]


def seal(folder: Path, config: BundleConfig) -> Bundle:
    """Write bundle.json over the files that lie in `folder`, and load the result."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != CONFIG
    }
    write_json(folder / CONFIG, {**config.to_dict(), "files": files})
    return Bundle.load(folder)
