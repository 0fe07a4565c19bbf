"""Benchmark of the monitor: predictions taken in each second, and the time of its answers then."""

import hashlib
import json
import tempfile
import time
import zipfile
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import sqlalchemy as sa
import typer
from fastapi.testclient import TestClient
from rich.table import Table

from handlers.errors import UserError
from handlers.reference import DRIFT_STATISTICS, INPUT_STATISTICS, LEVELS, REFERENCE, Reference
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import console, progress_bar, run
from mlflow_tracking.stack_settings import Settings
from monitoring.monitor import Monitor
from monitoring.monitor_service import create_app
from monitoring.prediction_store import PredictionStore
from monitoring.references import BUNDLE
from monitoring.tables import predictions as table

PIECE = 50_000  # lines that are written before the monitor reads them
DAYS = 30  # that the predictions are spread over
QUESTIONS = ("/summary?hours=24", f"/summary?hours={24 * DAYS}", "/predictions?limit=50", "/versions", "/metrics")
CONFIG = b"{}"  # of the bundle whose reference is there
DIGEST = f"sha256:{hashlib.sha256(CONFIG).hexdigest()}"
EXAMPLES = [
    "python scripts/studies/bench_monitor.py --predictions 1000000",
    "python scripts/studies/bench_monitor.py --predictions 200000 --rows 10000000",
]


def lines(first: int, count: int, total: int, rng: np.random.Generator) -> bytes:
    """Return lines as the handler writes them; the last of all `total` lines is of this moment."""
    rows = []
    now = time.time()
    shares = rng.dirichlet(np.full(len(CODES), 0.3), count).round(6)
    for number, probabilities in enumerate(shares.tolist(), start=first):
        seconds = now - (total - number) * DAYS * 86400 / total
        rows.append(
            {
                "time": datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds"),
                "request_id": rng.bytes(16).hex(),
                "image_sha256": rng.bytes(32).hex(),
                "metadata_sent": {},
                "model": "skin_vit",
                "version": str(1 + 3 * number // total),
                "digest": DIGEST,
                "probabilities": dict(zip(CODES, probabilities, strict=True)),
                "entropy": 1.0,
                "set": ["NV", "MEL"],
                "flagged": number % 3 == 0,
                "width": 600,
                "height": 450,
                "statistics": dict.fromkeys(INPUT_STATISTICS[1:], 1.0),
                "milliseconds": float(rng.uniform(10, 60)),
            }
        )
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


def write_archive(store: Path, rng: np.random.Generator) -> None:
    """Write an archive with a reference, so that drift is computed."""
    quantiles = np.sort(rng.normal(size=(len(DRIFT_STATISTICS), len(LEVELS))), axis=1).tolist()
    reference = Reference(2000, 2000, {}, dict(zip(DRIFT_STATISTICS, quantiles, strict=True)))
    store.mkdir(parents=True)
    with zipfile.ZipFile(store / "skin_vit-1-0123456789ab.mar", "w") as archive:
        archive.writestr(f"{BUNDLE}/bundle.json", CONFIG)
        archive.writestr(f"{BUNDLE}/{REFERENCE}", json.dumps(reference.to_dict()))


def fill(store: PredictionStore, rows: int) -> None:
    """Copy predictions, with other ids and hashes, until the table has so many rows.

    Roll-ups stay as they are; their size does not depend on the number of predictions.
    """
    names = [column.name for column in table.columns]
    own = {"request_id": "printf('%032x', {first} + rowid)", "image_sha256": "lower(hex(randomblob(32)))"}
    values = ", ".join(own.get(name, f'"{name}"') for name in names)
    with store.connect(writes=True) as connection:
        last: sa.ColumnElement[int] = sa.func.max(sa.literal_column("rowid"))
        count = int(connection.execute(sa.select(last).select_from(table)).scalar_one())
        for index in table.indexes:  # making them at the end takes a tenth of the time
            index.drop(connection)
    first = count
    with progress_bar("rows") as progress:
        while first < rows:
            with store.connect(writes=True) as connection:
                connection.exec_driver_sql(
                    f"INSERT INTO predictions SELECT {values.format(first=first)} FROM predictions "
                    f"WHERE rowid <= {min(count, rows - first)}"
                )
            first += count
            progress(min(first, rows), rows)
    with store.connect(writes=True) as connection:
        for index in table.indexes:
            index.create(connection)


def take(monitor: Monitor, log: Path, data: bytes) -> float:
    """Let the monitor take these lines, and return the seconds."""
    log.write_bytes(data)
    began = time.perf_counter()
    while monitor.step() == 0:
        pass
    if monitor.error:
        raise UserError(f"The log cannot be taken in. {monitor.error}")
    return time.perf_counter() - began


def main(
    predictions: Annotated[int, typer.Option(min=1000, help="Number of predictions.")] = 100_000,
    rows: Annotated[int, typer.Option(help="Then fill the table with copies to so many rows.", min=0)] = 0,
    folder: Annotated[Path | None, typer.Option(help="Keep the database here.", show_default="a temporary one")] = None,
) -> None:
    """Write a prediction log, take it into a new SQLite database, and time the monitor's answers.

    Only the monitor's work is timed, on one core; the machine should be idle. Each row takes about 900 bytes of disk.
    """
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        measure(predictions, rows, Path(place))


def measure(predictions: int, rows: int, folder: Path) -> None:
    """Take the predictions, fill the table, and print rates and times."""
    rng, seconds, done = np.random.default_rng(0), 0.0, 0
    state = {"stack_state": folder, "model_store": folder / "store", "monitor_database": "", "prediction_log": None}
    settings = Settings.load().model_copy(update=state)
    write_archive(settings.store, rng)
    monitor, log = Monitor(settings), folder / "logs" / "predictions.jsonl"
    log.parent.mkdir()
    with progress_bar("predictions") as progress:
        while done < predictions:
            count = min(PIECE, predictions - done)
            seconds += take(monitor, log, lines(done, count, predictions, rng))
            done += count
            progress(done, predictions)
    size = (folder / "monitor.db").stat().st_size
    console.print(
        f"{predictions:,} predictions taken in at {predictions / seconds:,.0f} a second; "
        f"{size / predictions:.0f} bytes of database each."
    )
    if rows:
        fill(monitor.store, rows)
        seconds = take(monitor, log, lines(predictions - PIECE, PIECE, predictions, rng))
        size = (folder / "monitor.db").stat().st_size
        console.print(f"With {rows:,} rows ({size / 1e9:.1f} GB): {PIECE / seconds:,.0f} a second.")
    times = Table("question", "milliseconds")
    with TestClient(create_app(monitor)) as client:
        for question in QUESTIONS:
            client.get(question)
            began = time.perf_counter()
            client.get(question).raise_for_status()
            times.add_row(question, f"{1000 * (time.perf_counter() - began):.0f}")
    console.print(times)


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
