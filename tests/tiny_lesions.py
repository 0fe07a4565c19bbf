"""A manifest of very small pictures whose colour gives their class, for the tests of training."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from training.data.manifest import write_manifest

COLOURS = {"MEL": (60, 40, 40), "NV": (190, 120, 90), "BCC": (230, 150, 170)}
SPLITS = {"train": 48, "val": 18, "calibration": 60, "test": 18}


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
