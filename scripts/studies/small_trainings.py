"""Trainings that a study makes once and keeps, so that an interrupted study continues where it stopped."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from handlers.bundle import Bundle
from mlflow_tracking.command_line import console
from scripts.studies.study_error import StudyError
from training.checkpoints import LAST, load
from training.config import ROOT, TrainConfig, load_config
from training.data.manifest import fingerprint, write_manifest


def trained_bundle(rows: pd.DataFrame, config: str, settings: Sequence[str], folder: Path, cache: Path) -> Bundle:
    """Return the bundle of a model that is trained on these rows; train it unless `folder` has it.

    Args:
        rows: of a manifest; written to the folder as manifest.csv.
        config: a preset.
        settings: key=value pairs over the preset.
        cache: folder of resized images.

    Raises:
        StudyError: the training failed, or the folder has a model of other data or settings.
    """
    settings = [*settings, f"manifest={folder / 'manifest.csv'}", f"cache_dir={cache}"]
    begun = (folder / LAST).is_file() or (folder / "bundle").is_dir()
    if begun:
        state = load(folder / LAST)
        new, old = load_config(config, settings), load_config(base=state["config"])
        if state["dataset_fingerprint"] != fingerprint(rows) or _without_paths(new) != _without_paths(old):
            raise StudyError(
                f"{folder} has a model of other data or settings. Delete it, or name another folder with --out."
            )
    if not (folder / "bundle").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder / "manifest.csv", rows)
        command = [sys.executable, str(ROOT / "training" / "train.py")]
        command += ["--resume", str(folder)] if begun else ["--config", config, "--output", str(folder), *settings]
        console.print(f"Training on {int((rows['split'] == 'train').sum()):,} images, {folder}.")
        if subprocess.run(command, check=False).returncode:
            raise StudyError(f"A training failed. Its messages are above, its files in {folder}.")
    return Bundle.load(folder / "bundle")


def _without_paths(config: TrainConfig) -> dict[str, Any]:
    """Return the settings without the folders."""
    return config.model_copy(update=dict.fromkeys(("manifest", "data_dir", "cache_dir", "output"), "")).to_dict()
