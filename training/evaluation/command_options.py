"""Command-line options that evaluate.py, stress.py and explanations.py share, and the test images that they name."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from handlers.taxonomy import KNOWN_CODES
from training.data.manifest import ManifestError, read_manifest

BundleOption = Annotated[Path, typer.Option(help="The bundle's folder.")]
ManifestOption = Annotated[Path, typer.Option(help="A manifest.csv, written by prepare_data.py.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the figures.")]
SplitOption = Annotated[str, typer.Option(help="Split of the manifest.")]
AllowOverlapOption = Annotated[
    bool, typer.Option("--allow-overlap", help="Accept images that the model was made from.")
]


def known_lesions(manifest: Path, split: str) -> pd.DataFrame:
    """Return the rows of a split whose class is known. Raises ManifestError if there is none."""
    frame = read_manifest(manifest)
    rows = frame[(frame["split"] == split) & frame["label"].isin(KNOWN_CODES)].reset_index(drop=True)
    if rows.empty:
        raise ManifestError(f"{manifest} has no image of a known class in the split {split!r}; choose another --split.")
    return rows
