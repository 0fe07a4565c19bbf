"""Scoring an archive in pieces: the folder of a run, and the worker that scores one piece.

    input.parquet  the pictures in a fixed order
    model/         the bundle with its serving graph
    run.json       the run; written last, so that input.parquet and model/ are whole if it exists
    scores/        one Parquet file for each piece, a fixed range of the input's rows
    summary.md     with classes.png and confidence.png; written when all pieces are

Each file appears whole or not at all, so a run that was killed goes on with the pieces that are missing.
"""

import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from handlers.bundle import Bundle
from handlers.errors import ImageError, UserError
from handlers.files import atomic_file, write_json
from handlers.graph_export import complete, complete_once
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.request_parsing import parse_request
from handlers.runtimes import core
from handlers.taxonomy import CODES
from scripts.archive_pictures import PictureEntry, list_pictures, read_picture

GROUP = 4096  # rows in a row group of input.parquet
# Rows of a piece, and from how many rows on pieces are large. A killed worker loses at most one piece.
SMALL_PIECE, LARGE_PIECE, LARGE_ARCHIVE = 256, GROUP, 1_000_000
BATCH = 8  # pictures in a call of the graph, as in TorchServe
# Deaths of workers that one piece survives. A picture that ends its worker would be tried for ever otherwise.
ATTEMPTS = 5
READERS = 8  # files read at a time, and ahead of the predictor
INPUT = pa.schema([(name, pa.string()) for name in PictureEntry._fields])
SCORES = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("model", pa.string()),
        ("sha256", pa.string()),
        *((code, pa.float64()) for code in CODES),
        ("prediction", pa.string()),
        ("malignant", pa.float64()),
        ("malignant_flagged", pa.bool_()),
        ("melanoma", pa.float64()),
        ("melanoma_flagged", pa.bool_()),
        ("likely_set", pa.list_(pa.string())),
        ("entropy", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("error_code", pa.string()),
        ("error", pa.string()),
    ]
)


class ArchiveScoringError(UserError):
    """A run that cannot be started or continued."""


@dataclass(frozen=True)
class ScoringRun:
    """A run: `rows` pictures of `source`, scored in `precision`.

    `bundle` is the digest of the bundle as it was passed, `model` the digest of the one with its graph.
    """

    folder: Path
    source: str
    rows: int
    bundle: str
    model: str
    precision: str

    @classmethod
    def read(cls, folder: Path) -> "ScoringRun":
        """Read the run in a folder."""
        return cls(folder=folder, **json.loads((folder / "run.json").read_bytes()))

    @property
    def piece_rows(self) -> int:
        """The number of rows of each piece but the last."""
        return SMALL_PIECE if self.rows < LARGE_ARCHIVE else LARGE_PIECE

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return -(-self.rows // self.piece_rows)

    def file(self, piece: int) -> Path:
        """Return the path of a piece's scores."""
        return self.folder / "scores" / f"part-{piece:08}.parquet"

    def missing(self) -> list[int]:
        """Return the pieces that are not scored yet."""
        present = {path.name for path in (self.folder / "scores").iterdir()}
        return [piece for piece in range(self.pieces) if self.file(piece).name not in present]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder of a run, hold it alone, and remove unfinished files of a killed run.

    Raises:
        ArchiveScoringError: the folder cannot be written, or another process holds it.
    """
    try:
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a")
    except OSError as error:
        raise ArchiveScoringError(f"{folder} cannot be written: {error.strerror}. Choose another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArchiveScoringError(f"Another process scores into {folder}. Wait for it, or stop it.") from None
        for unfinished in [*(folder / "scores").glob(".*"), *folder.glob(".input.parquet.*"), *folder.glob(".run.*")]:
            unfinished.unlink()
        for unfinished in folder.glob(".model.*"):
            shutil.rmtree(unfinished)
        yield


def prepare(folder: Path, source: str, bundle_folder: Path, precision: str, cache: Path) -> ScoringRun:
    """Return the run in a folder, which is made if there is none yet; `cache` holds completed bundles.

    Raises:
        ArchiveScoringError: the folder holds another run, or the source has no pictures.
        BundleError, SourceFault
    """
    bundle = Bundle.load(bundle_folder)
    if (folder / "run.json").exists():
        return _continued(ScoringRun.read(folder), source, bundle, precision)
    if any((folder / "scores").iterdir()):
        raise ArchiveScoringError(f"{folder} has scores, but no run.json. Choose another --out.")
    rows = write_input(list_pictures(source), folder / "input.parquet")
    if not rows:
        raise ArchiveScoringError(f"{source} has no pictures. Check that it is the right place.")
    graph = complete(complete_once(bundle, cache), folder / "model")
    settled = Predictor(graph, precision=precision, threads=1).runtime.precision
    run = ScoringRun(folder, source, rows, bundle.digest, graph.digest, settled)
    write_json(folder / "run.json", {name: value for name, value in asdict(run).items() if name != "folder"})
    return run


def _continued(run: ScoringRun, source: str, bundle: Bundle, precision: str) -> ScoringRun:
    settled = run.precision if precision == "auto" else precision
    for name, value in {"source": source, "bundle": bundle.digest, "precision": settled}.items():
        if getattr(run, name) != value:
            raise ArchiveScoringError(
                f"{run.folder} holds a run with the {name} {getattr(run, name)!r}, and this one has {value!r}. Choose "
                "another --out."
            )
    return run


def write_input(pictures: Iterable[PictureEntry], path: Path) -> int:
    """Write the list of pictures, a row group at a time. Returns the number of rows."""
    rows, remaining = 0, iter(pictures)
    with atomic_file(path) as file, parquet.ParquetWriter(file, INPUT, compression="zstd") as writer:
        while group := list(itertools.islice(remaining, GROUP)):
            columns = [pa.array(column, pa.string()) for column in zip(*group, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=INPUT))
            rows += len(group)
    return rows


class PieceScorer:
    """A worker: scores pieces of a run with one thread, and reads files ahead of the predictor."""

    def __init__(self, folder: Path) -> None:
        self.run = ScoringRun.read(folder)
        # OpenVINO would bind the one thread of every worker to the same core.
        core().set_property("CPU", {"ENABLE_CPU_PINNING": False})
        self.predictor = Predictor(Bundle.load(folder / "model"), precision=self.run.precision, threads=1)
        self._input = parquet.ParquetFile(folder / "input.parquet")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="readers")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Score the pieces of a batch from Ray Data. Returns their numbers of rows and of refused pictures."""
        counts = [self.score(int(piece)) for piece in batch["item"]]
        return {"rows": [rows for rows, _ in counts], "refused": [refused for _, refused in counts]}

    def score(self, piece: int) -> tuple[int, int]:
        """Score a piece and write its file. Returns the number of rows and of refused pictures.

        Raises:
            ArchiveScoringError: the piece has ended its worker too often.
            SourceFault
        """
        first = piece * self.run.piece_rows
        attempts = self._attempt(piece, first)
        pictures = self._pictures(first)
        rows = [
            {"row": first + number, "path": entry.path, "model": self.run.model} | scores(data, answer)
            for number, (entry, data, answer) in enumerate(self._answers(pictures))
        ]
        with atomic_file(self.run.file(piece)) as file:
            parquet.write_table(pa.Table.from_pylist(rows, schema=SCORES), file, compression="zstd")
        attempts.unlink(missing_ok=True)
        return len(rows), sum("error" in row for row in rows)

    def _attempt(self, piece: int, first: int) -> Path:
        """Count an attempt at a piece in a file of that many bytes. Raises ArchiveScoringError after ATTEMPTS."""
        path = self.run.folder / "attempts" / str(piece)
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            if file.tell() >= ATTEMPTS:
                raise ArchiveScoringError(
                    f"The rows from {first:,} of {self.run.folder} ended their worker {ATTEMPTS} "
                    f"times, so a picture there may be harmful. Move it away, delete {path}, and run the command again."
                )
            file.write(b".")
        return path

    def _pictures(self, first: int) -> list[PictureEntry]:
        group = self._input.read_row_group(first // GROUP).slice(first % GROUP, self.run.piece_rows)
        return [PictureEntry(**entry) for entry in group.to_pylist()]

    def _answers(self, pictures: list[PictureEntry]) -> Iterator[tuple[PictureEntry, bytes, Prediction | ImageError]]:
        """Yield each picture with its bytes and its answer; the next batch is read while one is predicted."""
        batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        reading = [self._readers.submit(_read, entry.path) for entry in batches[0]]
        for number, batch in enumerate(batches):
            contents = [future.result() for future in reading]
            following = batches[number + 1] if number + 1 < len(batches) else []
            reading = [self._readers.submit(_read, entry.path) for entry in following]
            requests = [
                data if isinstance(data, ImageError) else _request(entry, data)
                for entry, data in zip(batch, contents, strict=True)
            ]
            answers = iter(self.predictor.answer([request for request in requests if isinstance(request, Request)]))
            for entry, data, request in zip(batch, contents, requests, strict=True):
                kept = b"" if isinstance(data, ImageError) else data
                yield entry, kept, request if isinstance(request, ImageError) else next(answers)


def _read(path: str) -> bytes | ImageError:
    try:
        return read_picture(path)
    except ImageError as error:
        return error


def _request(entry: PictureEntry, data: bytes) -> Request | ImageError:
    """Return the request that the same form would be at TorchServe, with the same limits."""
    try:
        return parse_request({"data": data, "gradcam": "none", **entry.metadata}, explain=False)
    except ImageError as error:
        return error


def scores(data: bytes, answer: Prediction | ImageError) -> dict[str, Any]:
    """Return the columns of SCORES that an answer fills. A refused picture has an error, and a hash if it was read."""
    if isinstance(answer, ImageError):
        digest = hashlib.sha256(data).hexdigest() if data else None
        return {"sha256": digest, "error_code": answer.code, "error": str(answer)}
    suspicions = {
        key: value
        for name, suspicion in (("malignant", answer.malignant), ("melanoma", answer.melanoma))
        if suspicion is not None
        for key, value in ((name, suspicion.share), (f"{name}_flagged", suspicion.flagged))
    }
    return {
        **answer.probabilities,
        **suspicions,
        "sha256": answer.image.sha256,
        "prediction": answer.code,
        "likely_set": answer.conformal_set,
        "entropy": answer.entropy,
        "width": answer.image.width,
        "height": answer.image.height,
    }
