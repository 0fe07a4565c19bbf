"""Learn from corrections: train the champion further, with the pictures that readers or pathology have settled."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from handlers.errors import UserError
from handlers.kept_images import kept, kept_path
from handlers.receipt import Receipt, image_identities, overlap, read_receipt
from mlflow_tracking.command_line import console, progress_bar, run
from mlflow_tracking.promotion.evaluation_set import CurrentSet, extended, publish
from mlflow_tracking.registration import register
from mlflow_tracking.registry import EVALUATION_SET, Registry
from mlflow_tracking.stack_settings import MODEL_NAME, ROOT, Settings
from monitoring.corrections import settled
from monitoring.prediction_store import PredictionStore
from monitoring.queries import drift_by_version
from training.config import load_config
from training.data.corrected_pictures import CorrectedPicture, with_corrections
from training.data.data_sets import CORRECTIONS
from training.data.manifest import fingerprint, read_manifest, write_manifest
from training.evaluation.reference_fit import MIN_LESIONS
from training.interruption import Interruption
from training.train import train

MANIFEST = ROOT / "data" / "manifest.csv"
CHAMPION, CHALLENGER = "champion", "challenger"


class NothingToLearn(UserError):
    """There are too few corrections whose picture is kept."""


def retrain(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    data: Annotated[Path, typer.Option(help="The manifest that the champion was trained on.")] = MANIFEST,
    config: Annotated[str, typer.Option(help="A preset of the champion's network.")] = "dermoscopy",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 3,
    least: Annotated[int, typer.Option(min=1, help="Refuse to train with fewer corrections.")] = 50,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/retrain-TIME")] = None,
    extend_evaluation_set: Annotated[
        bool, typer.Option(help="Add the corrections of the random share to the gates' evaluation set.")
    ] = False,
) -> None:
    """Train the champion further with corrected pictures, and register the result as challenger.

    Corrections are settled readings and outcomes whose picture is kept
    (KEEP_IMAGES_DAYS). They join the manifest as a source of its own; those of
    the random share are for testing and never train a model. Training starts
    from the champion's weights with a tenth of the preset's learning rate, or
    as KEY=VALUE says. The gates judge the challenger as any version, and a
    person moves the alias champion.
    Exit codes: 0 done, 1 refused, 2 wrong options, 3 MLflow or the monitor's
    database does not answer.
    """
    settings = Settings.load()
    registry = Registry(settings.registry_uri)
    champion = registry.resolve(CHAMPION)
    if champion is None:
        raise NothingToLearn("There is no champion to start from. Deploy a version with `promote.py to VERSION`.")
    folder = output or ROOT / "runs" / time.strftime("retrain-%Y%m%d-%H%M%S")
    frame = joined_manifest(read_manifest(data), corrected_pictures(settings), least)
    bundle = registry.download_bundle(champion.version, folder / CHAMPION)
    frame = without_seen(frame, read_receipt(bundle))
    write_manifest(folder / "manifest.csv", frame)
    if extend_evaluation_set:
        extend(registry, settings, frame[(frame["source"] == CORRECTIONS) & (frame["split"] == "test")])
    gentle = ["pretrained=false", f"lr={load_config(config).lr / 10}", *(overrides or ())]
    # Resized copies of patients' pictures must not stay in a cache that other runs share.
    with removed_folder(folder / "cache") as cache, removed_folder(folder / "arrived") as arrived:
        link_arrived(settings, champion.version, arrived)
        flags = {
            "manifest": str(folder / "manifest.csv"),
            "initial_bundle": str(bundle),
            "output": str(folder),
            "epochs": epochs,
            "cache_dir": str(cache),
            "reference_dir": str(arrived) if any(arrived.iterdir()) else "",
        }
        train(load_config(config, gentle, flags), folder, None, Interruption())
    version = register(registry, folder / "bundle").version.version
    registry.set_alias(CHALLENGER, version)
    console.print(f"✓ {MODEL_NAME} version {version} is registered, and {CHALLENGER} points at it.")
    console.print(
        f"Compare it with the champion: python scripts/replay.py. Deploy it: python scripts/promote.py to {version}"
    )


@contextmanager
def removed_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that is removed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_arrived(settings: Settings, version: str, folder: Path) -> None:
    """Link the kept pictures into a folder: those that came since a version's drift alarm began, or else all.

    They become the reference, so that the new version's alarm tells of changes from now on. Too few are no reference.
    """
    states = drift_by_version(PredictionStore(settings.monitor_database_url))
    since = states[version][0].alarm_since if version in states else None
    names = [name for name, time in kept(settings.kept_images_folder).items() if time >= (since or 0)]
    if len(names) >= MIN_LESIONS:
        for name in names:
            path = kept_path(settings.kept_images_folder, name)
            (folder / path.name).symlink_to(path)


def joined_manifest(frame: pd.DataFrame, pictures: list[CorrectedPicture], least: int) -> pd.DataFrame:
    """Return the manifest with the corrections. Raises NothingToLearn for fewer than `least` that may train a model."""
    with progress_bar("corrections") as progress:
        joined, left_out = with_corrections(frame, pictures, progress)
    for reason, count in left_out.items():
        console.print(f"{count} corrections {reason}; they are left out.", style="yellow")
    splits = joined.loc[joined["source"] == CORRECTIONS, "split"].value_counts()
    usable = int(splits.drop("test", errors="ignore").sum())
    if usable < least:
        raise NothingToLearn(
            f"There are {usable} corrections to learn from, and at least {least} are needed. Review more pictures, or "
            "lower --least."
        )
    console.print("Corrections: " + ", ".join(f"{count} {split}" for split, count in splits.items()) + ".")
    return joined


def without_seen(frame: pd.DataFrame, receipt: Receipt) -> pd.DataFrame:
    """Leave out corrections that resemble a picture which the champion has seen in another split."""
    seen: set[str] = set()
    apart = frame[(frame["source"] == CORRECTIONS) & (frame["split"] != "train")]
    for split, rows in apart.groupby("split"):
        overlapping = overlap(receipt.without(str(split)), image_identities(rows))
        seen |= {*overlapping.same_image, *overlapping.same_lesion, *overlapping.near}
    if seen:
        console.print(
            f"{len(seen)} corrections resemble a picture of another split; they are left out.", style="yellow"
        )
    return frame[~((frame["source"] == CORRECTIONS) & frame["image_id"].isin(seen))]


def corrected_pictures(settings: Settings) -> list[CorrectedPicture]:
    """Return the corrections whose picture is kept, the earliest first. Raises StoreUnavailable."""
    store = PredictionStore(settings.monitor_database_url)
    corrections = sorted(settled(store, settings.review_random_share), key=lambda item: item.settled)
    pictures = [
        CorrectedPicture(
            kept_path(settings.kept_images_folder, item.image_sha256), item.image_sha256, item.diagnosis, item.is_random
        )
        for item in corrections
    ]
    readable = [picture for picture in pictures if picture.path.is_file()]
    if len(readable) < len(pictures):
        console.print(f"{len(pictures) - len(readable)} corrections have no kept picture; they are left out.")
    return readable


def extend(registry: Registry, settings: Settings, rows: pd.DataFrame) -> None:
    """Add pictures to the evaluation set in force, as a new version of it."""
    if rows.empty:
        console.print("No correction of the random share is new; the evaluation set stays as it is.")
        return
    current = CurrentSet(registry, settings.evaluation_cache).get()
    with tempfile.TemporaryDirectory() as temporary:
        evaluation = extended(current, rows, Path(temporary))
        tags = {"split": "test", "images": str(len(evaluation)), "dataset_fingerprint": fingerprint(rows)}
        registration = publish(registry, evaluation, tags)
    console.print(f"{EVALUATION_SET} version {registration.version.version} has {len(evaluation):,} pictures.")


if __name__ == "__main__":
    run(
        retrain,
        examples=[
            "python scripts/retrain.py --data data/manifest.csv",
            "python scripts/retrain.py --data data/manifest.csv --epochs 1 --least 20 threads=1",
        ],
    )
