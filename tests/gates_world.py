"""A candidate for the gates that is good until something is done to it, and a TorchServe that sees what a patch shows.

The fixtures of it are in tests/fixtures_gates.py.
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
from mlflow_tracking.promotion.torchserve_client import TorchServeError
from mlflow_tracking.settings import ROOT

SETTINGS = ROOT / "mlflow_tracking" / "gates.yaml"
SIGNATURE = ((("image", "binary"),), tuple((code, "double") for code in CODES))
COUNTS = {"MEL": 40, "NV": 90, "BCC": 30, "AK": 30, "BKL": 30, "DF": 30, "VASC": 30, "SCC": 30, "UNK": 24}
CHAMPION = Release("1", "sha256:" + "c" * 64)


def patch(code: str, number: int) -> bytes:
    """A picture of one hue, its class; light and shade differ, so that no two are the same."""
    hue = round(CODES.index(code) * 255 / len(CODES))
    pixels = np.full((24, 24, 3), (hue, 150 + number % 80, 120 + number), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "HSV").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def seen(image: bytes) -> str:
    """The class that a patch shows."""
    hue = np.asarray(Image.open(io.BytesIO(image)).convert("HSV"))[:, :, 0].mean()
    return CODES[round(hue * len(CODES) / 255) % len(CODES)]


def answer(**probabilities: float) -> dict[str, float]:
    """Nine probabilities: those given, the rest shared by the others."""
    others = [code for code in CODES if code not in probabilities]
    rest = (1 - sum(probabilities.values())) / len(others)
    return {code: probabilities.get(code, rest) for code in CODES}


@dataclass
class Server:
    """TorchServe with one version for each entry of `models`: what it answers to a patch of a class."""

    bundle: Bundle
    models: dict[str, dict] = field(default_factory=dict)
    golden_shift: float = 0.0
    seconds: float = 0.0
    disturbed: bool = False  # by any picture that it has not seen as it is
    originals: frozenset[bytes] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    fail: list[int] = field(default_factory=list)  # statuses of the next answers
    deaf: bool = False  # to metadata
    takes: dict[str, list] = field(default_factory=dict)
    told: list[tuple[bytes, dict]] = field(default_factory=list)  # pictures of patches and what came with them

    def predict(self, image: bytes, version: str, metadata: dict | None = None) -> dict:
        self.asked += 1
        if self.fail:
            status = self.fail.pop(0)
            raise TorchServeError(status, "busy", transient=status >= 500)
        time.sleep(self.seconds)
        model = {"digest": self.digests[version], "precision": "f32"}
        for case in self.bundle.golden():
            if (case.image, case.metadata) == (image, {} if self.deaf else metadata or {}):
                top = max(case.probabilities, key=case.probabilities.__getitem__)
                shifted = case.probabilities | {top: case.probabilities[top] + self.golden_shift}
                return {"model": model, "probabilities": shifted}
        assert set(metadata or {}) <= set(self.takes), "TorchServe refuses what the model does not take"
        self.told.append((image, dict(metadata or {})))
        model["takes"] = self.takes
        code = seen(image)
        if self.disturbed and version == "2" and hashlib.sha256(image).digest() not in self.originals:
            code = "NV" if code in ("MEL", "BCC", "SCC") else "MEL"
        return {"model": model, "probabilities": self.models[version].get(code, answer(**{code: 0.97}))}


def receipt(*digests: str) -> Receipt:
    images = SeenImages(tuple(digest[:DIGITS] for digest in digests), ("0123456789abcdef",), (), ("elsewhere",))
    return Receipt("sha256:data", {"train": images})


def resealed(bundle: Bundle, folder: Path, **files: object) -> Bundle:
    """A copy of the bundle with some files exchanged, its hashes right."""
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
    """A candidate that is good, until something is done to it."""

    candidate: Candidate
    server: Server
    gates: dict[str, Gate]
    folder: Path

    def judge(self) -> Judge:
        return Judge(tuple(self.gates.values()), self.folder / "judgements")

    def judgement(self) -> Judgement:
        return self.judge().judge(self.candidate)

    def use(self, bundle: Bundle) -> None:
        """Take another bundle for the candidate's."""
        self.server.bundle, self.server.digests["2"] = bundle, bundle.digest
        self.candidate.bundle, self.candidate.registered_digest = bundle, bundle.digest
        self.candidate.release = Release("2", bundle.digest)
