"""Score an archive of pictures with Ray Data: probabilities, flags and refusals as Parquet, and a summary."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from handlers.errors import UserError
from mlflow_tracking.command_line import console, progress_bar, run
from mlflow_tracking.stack_settings import SHIPPED, Settings
from scripts.archive_scoring import ArchiveScoringError, PieceScorer, ScoringRun, locked, prepare

OBJECT_STORE = 200 << 20  # bytes; only numbers of pieces go through it


def main(
    source: Annotated[
        str, typer.Argument(help="A folder, a manifest, a CSV or Parquet table of paths, or s3://BUCKET/PREFIX.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the results. With a cluster, all nodes must share it.")],
    bundle: Annotated[Path, typer.Option(help="A bundle folder.")] = SHIPPED,
    precision: Annotated[str, typer.Option(help="auto, bf16 or f32. auto chooses as TorchServe does.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread.", show_default="one for each core")
    ] = None,
) -> None:
    """Score every picture of an archive.

    Results are in OUT/scores, one row for each picture. After an interruption, the same command goes on where the run
    was. RAY_ADDRESS chooses a cluster; without it, Ray runs on this machine only.
    """
    settings, out = Settings.load(), out.absolute()
    if "://" not in source:
        source = str(Path(source).expanduser().absolute())
    with locked(out):
        scoring = prepare(out, source, bundle, precision, settings.completed_bundles)
        missing = scoring.missing()
        console.print(
            f"{scoring.rows:,} pictures in {scoring.pieces:,} pieces, of which {len(missing):,} are left; "
            f"{scoring.precision}."
        )
        if missing:
            with ray_cluster(settings.ray_address, workers) as cores:
                score_pieces(scoring, missing, workers or cores)
        from scripts.archive_summary import summarise  # imports matplotlib

        console.print(summarise(scoring))


@contextmanager
def ray_cluster(address: str, workers: int | None) -> Iterator[int]:
    """Connect to a cluster, or start Ray on this machine. Yields the number of cores. Raises ArchiveScoringError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ArchiveScoringError("Ray is not installed. Install it with `make archive`.") from error
    place: dict[str, Any] = {"address": address}
    if not address:
        place = {
            "address": "local",
            "num_cpus": workers or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **place)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ArchiveScoringError(f"Ray cannot be reached or started at {place['address']}: {error}.") from error
    try:
        yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def score_pieces(scoring: ScoringRun, missing: list[int], workers: int) -> None:
    """Score the missing pieces with a pool of workers. Raises ArchiveScoringError or a worker's own error."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    pool = ActorPoolStrategy(min_size=1, max_size=workers, initial_size=min(workers, len(missing)))
    pieces = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        PieceScorer,
        fn_constructor_args=[scoring.folder],
        batch_size=1,
        compute=pool,
        num_cpus=1,
    )
    done = scoring.pieces - len(missing)
    try:
        with progress_bar("scoring") as progress:
            for batch in pieces.iter_batches(batch_size=None):
                done += len(batch["rows"])
                progress(done, scoring.pieces)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause).strip().splitlines()[-1]
        raise ArchiveScoringError(
            f"The run stopped after a failure in a worker: {reason}. The same command goes on where the run was."
        ) from error


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/score.py data/archive --out runs/archive",
            "python scripts/score.py data/manifest.csv --out runs/manifest --bundle model_store/skin_vit",
            "RAY_ADDRESS=head:6379 python scripts/score.py s3://archive/2026 --out /shared/2026",
        ],
    )
