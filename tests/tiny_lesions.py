"""A manifest of very small pictures whose colour gives their class, and training without MLflow, for tests."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from training import run_record
from training.data.manifest import write_manifest

COLOURS = {"MEL": (60, 40, 40), "NV": (190, 120, 90), "BCC": (230, 150, 170)}
SPLITS = {"train": 48, "val": 18, "calibration": 60, "test": 18}


class RecordingTracker:
    """Stands in for the MLflow run, which takes seconds to start; records the calls."""

    uri, run_id, url, failed = "nowhere", "run", "", False
    calls: ClassVar[list[tuple[str, tuple[Any, ...]]]] = []

    def __init__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args))


@contextmanager
def without_mlflow() -> Iterator[pytest.MonkeyPatch]:
    """Let training use RecordingTracker. Yields the patch for more changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_record, "Tracker", RecordingTracker)
        patch.setenv("MLFLOW_TRACKING_URI", "nowhere")
        yield patch


def tiny_manifest(folder: Path, splits: dict[str, int] | None = None, size: tuple[int, int] = (40, 32)) -> Path:
    """Write PNGs and manifest.csv to `folder`; images of each split go through the classes in turn."""
    rng = np.random.default_rng(0)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (splits or SPLITS).items():
        for number in range(count):
            code = list(COLOURS)[number % len(COLOURS)]
            pixels = np.asarray(COLOURS[code]) + rng.normal(0, 20, (size[1], size[0], 3))
            name = f"{split}_{number}"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{name}.png")
            sha256 = hashlib.sha256((folder / f"{name}.png").read_bytes()).hexdigest()
            row = {"path": str(folder.resolve() / f"{name}.png"), "image_id": name, "label": code, "split": split}
            row |= {"lesion_id": f"{split}_{number // 2}", "patient_id": "", "source": "folder"}
            rows.append(row | {"age": "", "sex": "", "site": "", "sha256": sha256, "phash": sha256[:16]})
    manifest = folder / "manifest.csv"
    write_manifest(manifest, pd.DataFrame(rows))
    return manifest


def printed(calls, text):
    """Whether a recorded call of the console holds the text."""
    return any(name == "print" and text in str(args[0]) for name, args in calls)
