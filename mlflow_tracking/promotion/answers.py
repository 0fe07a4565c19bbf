"""What a version answers to the frozen set, asked over REST and kept as it comes: asking that was cut off goes on.

One file for a bundle and a set, one line of JSON for a picture. The answers are those of TorchServe itself, so they are
judged with everything that serving adds: the archive's code, its preprocessing, its precision on this machine. A model
that takes metadata (handlers.metadata) is told what the set knows.
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
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError, with_retries

# Enough to keep a worker busy, and not so many that the champion's requests wait behind a queue.
PARALLEL = 2
BATCH = 16  # pictures between two looks at whether the answers are still wanted


@dataclass(frozen=True)
class Answers:
    """Probabilities (N, 9) in taxonomy order, and the milliseconds that each answer took (N,)."""

    probabilities: NDArray[np.float64]
    milliseconds: NDArray[np.float64]

    @property
    def top(self) -> NDArray[np.int64]:
        """The most probable class of each, an index into CODES (N,)."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def malignant(self) -> NDArray[np.bool_]:
        """Whether the most probable class is malignant (N,)."""
        return np.asarray(MALIGNANT[self.top])


def ask(
    torchserve: TorchServe,
    release: Release,
    images: Sequence[bytes],
    progress: Callable[[int], None] = lambda done: None,
    parallel: int = PARALLEL,
    metadata: Sequence[Values] | None = None,
) -> Answers:
    """Ask one version about some pictures, telling it `metadata` of each. `progress` is called with the number
    answered, and may raise to stop.

    Raises:
        TorchServeError: a picture got no answer, or another model's.
        TorchServeUnavailable
    """
    pairs = list(zip(images, metadata or [{}] * len(images), strict=True))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(parallel) as pool:
        for start in range(0, len(pairs), BATCH):
            rows += pool.map(lambda pair: _row(torchserve, release, *pair), pairs[start : start + BATCH])
            progress(len(rows))
    return _answers(rows)


def ask_one(
    torchserve: TorchServe,
    release: Release,
    image: bytes,
    metadata: Values | None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], float]:
    """The whole answer of one version to one picture, and the milliseconds that it took, without those before it.

    A transient error is retried; `progress` is called before each retry and may raise to stop. Raises as `ask`.
    """

    def timed() -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        answer = torchserve.predict(image, release.version, metadata=metadata)
        return answer, 1000 * (time.monotonic() - began)

    answer, milliseconds = with_retries(timed, progress)
    if answer["model"]["digest"] != release.digest:
        raise TorchServeError(500, f"another model answered for version {release.version}: {answer['model']['digest']}")
    return answer, milliseconds


def metadata_of(torchserve: TorchServe, release: Release, evaluation: EvaluationSet) -> list[Values]:
    """For each picture of the set what a version can be told of it; one answer says what it takes. Raises as `ask`."""
    answer, _ = ask_one(torchserve, release, evaluation.images([0])[0], {})
    takes = Metadata.from_dict(answer["model"].get("takes", {}))
    known = [takes.understood(row) for row in evaluation.frame.to_dict("records")]
    return [{name: value for name, value in row.items() if value is not None} for row in known]


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
        """All answers; what is not there yet is asked. `progress` as for `ask`, which also tells what is raised."""
        path, digests = self._path(release, evaluation), list(evaluation.frame["sha256"])
        known = self._read(path)
        missing = [position for position, digest in enumerate(digests) if digest not in known]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as clean:  # without a line that a crash cut off
                clean.writelines(_line(digest, row) for digest, row in known.items())
            metadata = metadata_of(torchserve, release, evaluation)
        for start in range(0, len(missing), BATCH):
            positions = missing[start : start + BATCH]
            images, tell = evaluation.images(positions), [metadata[position] for position in positions]
            answers = ask(torchserve, release, images, metadata=tell)
            fresh = dict(zip((digests[position] for position in positions), _rows(answers), strict=True))
            with path.open("ab") as file:
                file.writelines(_line(digest, row) for digest, row in fresh.items())
            known |= fresh
            progress(len(digests) - len(missing) + start + len(positions))
        return _answers([known[digest] for digest in digests])

    def forget(self, digest: str) -> None:
        """Have a bundle asked anew, about every set."""
        for path in self.folder.glob(f"answers-{short(digest)}-*.jsonl"):
            path.unlink(missing_ok=True)

    def _path(self, release: Release, evaluation: EvaluationSet) -> Path:
        return self.folder / f"answers-{short(release.digest)}-{short(evaluation.digest)}.jsonl"

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        known = {}
        try:
            for line in path.read_bytes().splitlines():
                row = json.loads(line)
                known[row.pop("sha256")] = row
        except (FileNotFoundError, ValueError):
            pass  # none yet, or the last line was cut off
        return known


def _row(torchserve: TorchServe, release: Release, image: bytes, metadata: Values) -> dict[str, Any]:
    answer, milliseconds = ask_one(torchserve, release, image, metadata)
    return {"p": [answer["probabilities"][code] for code in CODES], "ms": round(milliseconds, 2)}


def _answers(rows: list[dict[str, Any]]) -> Answers:
    return Answers(np.array([row["p"] for row in rows], np.float64), np.array([row["ms"] for row in rows], np.float64))


def _rows(answers: Answers) -> list[dict[str, Any]]:
    pairs = zip(answers.probabilities.tolist(), answers.milliseconds.tolist(), strict=True)
    return [{"p": probabilities, "ms": milliseconds} for probabilities, milliseconds in pairs]


def _line(digest: str, row: dict[str, Any]) -> bytes:
    return json.dumps({"sha256": digest, **row}).encode() + b"\n"
