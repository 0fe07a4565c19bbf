"""The data of a training run: find or make the manifest, and load its splits through the image cache."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import UNKNOWN
from mlflow_tracking.command_line import console, progress_bar
from training.config import TrainConfig
from training.data.batches import Images, classes_in, load_split
from training.data.image_cache import DataError
from training.data.manifest import read_manifest
from training.data.preparation import build_manifest

SPLITS = ("train", "val", "calibration", "test")


def open_manifest(config: TrainConfig, resumed: bool) -> pd.DataFrame:
    """Read the manifest; make it from `data_dir` if it is missing.

    It is not made for a resumed run, or if only `manifest` was set: the path may be mistyped, and a new manifest has
    other splits. If only `data_dir` was set, an existing manifest of other images is not used in its place.

    Raises:
        DataError: there is no manifest and no data to make it from, or it may be the wrong one.
        ManifestError: it cannot be made or read.
    """
    manifest, folder = Path(config.manifest), Path(config.data_dir)
    manifest_set, folder_set = (name in config.model_fields_set for name in ("manifest", "data_dir"))
    if manifest.is_file():
        if folder_set and not manifest_set and not resumed:
            raise DataError(
                f"{manifest} exists, so {folder} would not be read; leave data_dir out, or add manifest=FILE to make "
                "another manifest."
            )
        return read_manifest(manifest)
    if resumed or (manifest_set and not folder_set):
        raise DataError(
            f"There is no manifest {manifest}; make it with python scripts/prepare_data.py --data DIR --out {manifest}."
        )
    if not folder.is_dir() or not any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise DataError(
            f"There is no manifest {manifest} and no data in {folder}; put a data set there, or run python "
            "scripts/prepare_data.py --data DIR and add manifest=FILE."
        )
    with progress_bar("reading images") as progress:
        build_manifest([folder], manifest, progress=progress)
    console.print(f"Made {manifest} from {folder}.")
    return read_manifest(manifest)


def classes_to_learn(frame: pd.DataFrame, manifest: str, outliers: float = 0.0) -> tuple[str, ...]:
    """Return the codes of the training images, and UNK if some become outliers.

    Raises DataError unless the training images have at least two codes.
    """
    classes = classes_in(frame)
    if len(classes) == 1:
        raise DataError(f"All training images in {manifest} are {classes[0]}; add images of another class.")
    return classes if UNKNOWN in classes or not outliers else (*classes, UNKNOWN)


def load_splits(
    config: TrainConfig, frame: pd.DataFrame, classes: tuple[str, ...], check: Callable[[], None]
) -> dict[str, Images]:
    """Load every split that has images: training images at the cache's size, all others as serving resizes them.

    Args:
        check: called after each image; may raise to stop.

    Raises:
        DataError: there are no training or validation images, an image cannot be read, a metadata field has no value,
            or the disk is full.
    """
    manifest, inputs = Path(config.manifest), config.metadata_inputs
    cache = Path(config.cache_dir) if config.cache_dir else manifest.parent / "cache"
    check_metadata(frame, inputs)
    splits = {}
    for split in SPLITS:
        if not (frame["split"] == split).any():
            if split in ("train", "val"):
                raise DataError(f"{manifest} has no images in the split {split!r}; prepare it again with more lesions.")
            continue
        with progress_bar(f"caching {split}") as draw:

            def progress(done: int, total: int) -> None:
                check()
                draw(done, total)

            preprocessing = training_preprocessing(config) if split == "train" else config.preprocessing
            splits[split] = load_split(frame, split, classes, preprocessing, cache, progress, inputs)
    return splits


def training_preprocessing(config: TrainConfig) -> Preprocessing:
    """Return how training images are resized for the cache: to the input's size, or larger for random crops."""
    return Preprocessing(max(config.cache_size, config.image_size))


def check_metadata(frame: pd.DataFrame, inputs: Metadata) -> None:
    """Raise DataError if no training image has a value for one of the model's metadata fields."""
    training = frame[frame["split"] == "train"]
    for name in inputs.fields:
        if all(inputs.understood({name: value})[name] is None for value in training[name]):
            raise DataError(f"No training image has a known {name}; leave {name} out of metadata.")
