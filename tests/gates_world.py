"""A candidate that passes all gates until a test changes something, and a TorchServe that recognises coloured patches.

tests/fixtures_gates.py has the fixtures.
"""

import hashlib
import io
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.bundle import CONFIG, Bundle, seal
from handlers.files import write_json
from handlers.receipt import DIGITS, Receipt, SeenImages
from handlers.taxonomy import CODES
from mlflow_tracking.promotion.gates.base import Candidate, Gate
from mlflow_tracking.promotion.gates.judge import Judge, Judgement
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.stack_settings import ROOT
from mlflow_tracking.torchserve_client import TorchServeError

SETTINGS = ROOT / "mlflow_tracking" / "gates.yaml"
SIGNATURE = ((("image", "binary"),), tuple((code, "double") for code in CODES))
COUNTS = {"MEL": 20, "NV": 90, "BCC": 14, "AK": 14, "BKL": 14, "DF": 14, "VASC": 14, "SCC": 14, "UNK": 20}
CHAMPION = Release("1", "sha256:" + "c" * 64)


def patch(code: str, number: int) -> bytes:
    """Return a picture whose hue stands for its class and whose shade makes it unique."""
    hue = round(CODES.index(code) * 255 / len(CODES))
    pixels = np.full((24, 24, 3), (hue, 150 + number % 80, 120 + number), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "HSV").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def class_of(image: bytes) -> str:
    """Return the class of a patch."""
    hue = np.asarray(Image.open(io.BytesIO(image)).convert("HSV"))[:, :, 0].mean()
    return CODES[round(hue * len(CODES) / 255) % len(CODES)]


def answer(**probabilities: float) -> dict[str, float]:
    """Return nine probabilities; the classes that are not given share the rest."""
    others = [code for code in CODES if code not in probabilities]
    rest = (1 - sum(probabilities.values())) / len(others)
    return {code: probabilities.get(code, rest) for code in CODES}


@dataclass
class Server:
    """TorchServe. `models` has, for each version, the answers to patches of a class that are not simply right."""

    bundle: Bundle
    models: dict[str, dict] = field(default_factory=dict)
    golden_shift: float = 0.0
    seconds: float = 0.0
    disturbed: bool = False  # flips its answers to changed pictures
    originals: frozenset[bytes] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    requests: int = 0
    fail: list[int] = field(default_factory=list)  # statuses of the next answers
    deaf: bool = False  # ignores metadata
    takes: dict[str, list] = field(default_factory=dict)
    patches: list[tuple[bytes, dict]] = field(default_factory=list)  # received, each with its metadata

    def predict(self, image: bytes, version: str, metadata: dict | None = None, recorded: bool = True) -> dict:
        self.requests += 1
        if self.fail:
            status = self.fail.pop(0)
            raise TorchServeError(status, "busy", transient=status >= 500)
        time.sleep(self.seconds)
        model = {"digest": self.digests[version], "precision": "f32"}
        for case in self.bundle.golden():
            if case.image == image and case.metadata == ({} if self.deaf else metadata or {}):
                top = max(case.probabilities, key=case.probabilities.__getitem__)
                shifted = case.probabilities | {top: case.probabilities[top] + self.golden_shift}
                return {"model": model, "probabilities": shifted}
        assert set(metadata or {}) <= set(self.takes), "TorchServe refuses unknown metadata"
        self.patches.append((image, dict(metadata or {})))
        model["takes"] = self.takes
        code = class_of(image)
        if self.disturbed and version == "2" and hashlib.sha256(image).digest() not in self.originals:
            code = "NV" if code in ("MEL", "BCC", "SCC") else "MEL"
        return {"model": model, "probabilities": self.models[version].get(code, answer(**{code: 0.97}))}


def receipt(*digests: str) -> Receipt:
    images = SeenImages(tuple(digest[:DIGITS] for digest in digests), ("0123456789abcdef",), (), ("elsewhere",))
    return Receipt("sha256:data", {"train": images})


def resealed(bundle: Bundle, folder: Path, **files: object) -> Bundle:
    """Copy the bundle with some files replaced and correct hashes."""
    out = Path(shutil.copytree(bundle.path, folder / "bundle"))
    (out / CONFIG).unlink()
    for name, content in files.items():
        if isinstance(content, bytes):
            (out / f"{name}.safetensors").write_bytes(content)
        else:
            write_json(out / f"{name}.json", content)
    return seal(out, bundle.config)


@dataclass
class Case:
    """A candidate, its server, and the gates."""

    candidate: Candidate
    server: Server
    gates: dict[str, Gate]
    folder: Path

    def limit(self, gate: str, **limits: object) -> Gate:
        """Change a gate's limits."""
        self.gates[gate] = self.gates[gate].model_copy(update=limits)
        return self.gates[gate]

    def judge(self) -> Judge:
        return Judge(tuple(self.gates.values()), self.folder / "judgements")

    def judgement(self) -> Judgement:
        return self.judge().judge(self.candidate)

    def use(self, bundle: Bundle) -> None:
        """Replace the candidate's bundle."""
        self.server.bundle, self.server.digests["2"] = bundle, bundle.digest
        self.candidate.bundle, self.candidate.registered_digest = bundle, bundle.digest
        self.candidate.release = Release("2", bundle.digest)
