"""Answers of a version to the frozen set, requested over REST and kept in a file, so that an interrupted run resumes.

Each file holds the answers of one bundle to one set, one JSON line for each picture. The answers come from TorchServe,
so they include the archive's code, its preprocessing, and its precision on this machine. A model that takes metadata
(handlers.metadata) receives the metadata of the set.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.files import atomic_file
from handlers.metadata import Metadata, Values
from handlers.taxonomy import CODES, MALIGNANT
from mlflow_tracking.digests import short
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError, with_retries

# Enough to keep a worker busy, but the champion's requests do not wait behind a long queue.
PARALLEL = 2
BATCH = 16  # pictures between two calls of `progress`


@dataclass(frozen=True)
class Answers:
    """Probabilities (N, 9) in taxonomy order, and latencies in milliseconds (N,)."""

    probabilities: NDArray[np.float64]
    milliseconds: NDArray[np.float64]

    @property
    def top(self) -> NDArray[np.int64]:
        """The most probable classes (N,), indices into CODES."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def malignant(self) -> NDArray[np.bool_]:
        """True where the most probable class is malignant (N,)."""
        return np.asarray(MALIGNANT[self.top])


def ask(
    torchserve: TorchServe,
    release: Release,
    images: Sequence[bytes],
    progress: Callable[[int], None] = lambda done: None,
    parallel: int = PARALLEL,
    metadata: Sequence[Values] | None = None,
) -> Answers:
    """Return one version's answers to some pictures, each sent with its metadata.

    `progress` is called with the number of answers so far and may raise to stop. Raises TorchServeUnavailable, and
    TorchServeError if a picture got no answer, or an answer of another model.
    """
    pairs = list(zip(images, metadata or [{}] * len(images), strict=True))
    return _answers(_rows(torchserve, release, pairs, progress, parallel))


def _rows(
    torchserve: TorchServe,
    release: Release,
    pairs: Sequence[tuple[bytes, Values]],
    progress: Callable[[int], None] = lambda done: None,
    parallel: int = PARALLEL,
) -> list[dict[str, Any]]:
    """Return the probabilities and latency of each (image, metadata) as a JSON-able row."""
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(parallel) as pool:
        for start in range(0, len(pairs), BATCH):
            rows += pool.map(lambda pair: _row(torchserve, release, *pair), pairs[start : start + BATCH])
            progress(len(rows))
    return rows


def ask_one(
    torchserve: TorchServe,
    release: Release,
    image: bytes,
    metadata: Values | None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], float]:
    """Return one version's whole answer to one picture, and the milliseconds of the successful request.

    Transient errors are retried. `progress` is called before each retry and may raise to stop. Raises as `ask`.
    """

    def timed() -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        answer = torchserve.predict(image, release.version, metadata=metadata, recorded=False)
        return answer, 1000 * (time.monotonic() - began)

    answer, milliseconds = with_retries(timed, progress)
    digest = answer["model"]["digest"]
    if digest != release.digest:
        raise TorchServeError(500, f"Version {release.version} was answered by another model, {digest}.")
    return answer, milliseconds


def metadata_of(torchserve: TorchServe, release: Release, evaluation: EvaluationSet) -> list[Values]:
    """Return the metadata to send with each picture of the set: values that the version takes. Raises as `ask`."""
    answer, _ = ask_one(torchserve, release, evaluation.images([0])[0], {})
    takes = Metadata.from_dict(answer["model"].get("takes", {}))
    values = [takes.understood(row) for row in evaluation.frame.to_dict("records")]
    return [{name: value for name, value in row.items() if value is not None} for row in values]


class AnswerBook:
    """The answers of versions to the frozen set, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def complete(
        self,
        torchserve: TorchServe,
        release: Release,
        evaluation: EvaluationSet,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Answers:
        """Return all answers, requesting those that are not in the book. `progress` and errors as for `ask`."""
        path, digests = self._path(release, evaluation), list(evaluation.frame["sha256"])
        rows = self._read(path)
        missing = [position for position, digest in enumerate(digests) if digest not in rows]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as clean:  # without a line that a crash cut off
                clean.writelines(_line(digest, row) for digest, row in rows.items())
            metadata = metadata_of(torchserve, release, evaluation)
        for start in range(0, len(missing), BATCH):
            positions = missing[start : start + BATCH]
            pairs = zip(evaluation.images(positions), (metadata[position] for position in positions), strict=True)
            answers = _rows(torchserve, release, list(pairs))
            new = dict(zip((digests[position] for position in positions), answers, strict=True))
            with path.open("ab") as file:
                file.writelines(_line(digest, row) for digest, row in new.items())
            rows |= new
            progress(len(digests) - len(missing) + start + len(positions))
        return _answers([rows[digest] for digest in digests])

    def forget(self, digest: str) -> None:
        """Delete a bundle's answers to all sets."""
        for path in self.folder.glob(f"answers-{short(digest)}-*.jsonl"):
            path.unlink(missing_ok=True)

    def _path(self, release: Release, evaluation: EvaluationSet) -> Path:
        return self.folder / f"answers-{short(release.digest)}-{short(evaluation.digest)}.jsonl"

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        rows = {}
        try:
            for line in path.read_bytes().splitlines():
                row = json.loads(line)
                rows[row.pop("sha256")] = row
        except (FileNotFoundError, ValueError):
            pass  # no file yet, or the last line was cut off
        return rows


def _row(torchserve: TorchServe, release: Release, image: bytes, metadata: Values) -> dict[str, Any]:
    answer, milliseconds = ask_one(torchserve, release, image, metadata)
    return {"p": [answer["probabilities"][code] for code in CODES], "ms": round(milliseconds, 2)}


def _answers(rows: list[dict[str, Any]]) -> Answers:
    return Answers(np.array([row["p"] for row in rows], np.float64), np.array([row["ms"] for row in rows], np.float64))


def _line(digest: str, row: dict[str, Any]) -> bytes:
    return json.dumps({"sha256": digest, **row}).encode() + b"\n"
