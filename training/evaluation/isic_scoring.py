"""ISIC 2019 submissions and the challenge's own score.

`python training/evaluation/isic_scoring.py TRUTH SUBMISSION` runs the maintained package isic-challenge-scoring. It
needs an older pandas than this project, so uv runs it in an environment of its own.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import ArrayLike

from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.identifiers import isic_id
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import console, run, table

SCORER = "isic-challenge-scoring==5.6"
SCORER_NEEDS = "pandas<3"  # it calls DataFrame.applymap
WEIGHTS = ("score_weight", "validation_weight")  # columns of the challenge's truth, where an image counts more or less
TIMEOUT = 600  # seconds; the first use fetches the scorer


class ScoringError(UserError):
    """A submission that cannot be scored."""


def write_submission(path: Path, image_ids: Sequence[str] | pd.Series, probabilities: ArrayLike) -> None:
    """Write probabilities (N, 9) in taxonomy order in the challenge's format: image,MEL,NV,...,UNK."""
    table = pd.DataFrame(np.asarray(probabilities), columns=list(CODES))
    table.insert(0, "image", list(image_ids))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(table.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode())


def score(truth: Path, submission: Path) -> dict[str, Any]:
    """Return the figures: {"per_category": {figure: {class: value}}, "macro_average": ..., "aggregate": ...}.

    Images are matched by ISIC identifier, or else by name. Images in only one of the files are left out, and the result
    has the number of `images` scored. The scorer also gets the truth's weights of images.

    Raises:
        ScoringError: the files do not match, or the scorer cannot run.
    """
    tables = [_read(truth, WEIGHTS), _read(submission, ())]
    common = set(tables[0]["image"]) & set(tables[1]["image"])
    if not common:
        raise ScoringError(f"{truth} and {submission} have no image in common; check their column image.")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise ScoringError("The challenge's scorer needs uv, which is not installed; run `make env`.")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("truth.csv", "submission.csv")]
        for path, frame in zip(paths, tables, strict=True):
            frame[frame["image"].isin(common)].to_csv(path, index=False)
        command = [uv, "tool", "run", "--quiet", "--from", SCORER, "--with", SCORER_NEEDS, "isic-challenge-scoring"]
        command += ["-o", "json", "classification", *map(str, paths)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
            scored: dict[str, Any] = json.loads(
                done.stdout[done.stdout.index("{") :]
            )  # uv and warnings may print first
        except subprocess.TimeoutExpired:
            raise ScoringError(f"The scorer did not finish within {TIMEOUT} s; try again.") from None
        except subprocess.CalledProcessError as error:
            raise ScoringError(f"{SCORER} failed. {error.stderr.strip() or error.stdout.strip()}") from None
        except ValueError:
            raise ScoringError(f"{SCORER} printed {done.stdout!r} instead of figures; try again.") from None
    return scored | {"images": len(common)}


def _read(path: Path, weights: Sequence[str]) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, encoding="utf-8-sig", dtype={"image": str})
    except (OSError, ValueError) as error:
        raise ScoringError(f"{path} cannot be read as a table: {error}.") from error
    if missing := [column for column in ("image", *CODES) if column not in frame]:
        raise ScoringError(f"{path} has no column {', '.join(missing)}; add it.")
    frame["image"] = [isic_id(str(name)) or str(name) for name in frame["image"]]
    if frame["image"].duplicated().any():
        repeated = frame["image"][frame["image"].duplicated()].iloc[0]
        raise ScoringError(f"{path} has several rows of {repeated}; keep one.")
    return frame[["image", *CODES, *(name for name in weights if name in frame)]]


def main(
    truth: Annotated[Path, typer.Argument(help="The challenge's ground truth: image,MEL,NV,BCC,AK,...,UNK.")],
    submission: Annotated[Path, typer.Argument(help="Probabilities in the same format.")],
) -> None:
    """Score a submission as the ISIC 2019 challenge does."""
    scored = score(truth, submission)
    grid = table("", ["figure", *CODES, "mean"])
    for name, values in scored["per_category"].items():
        cells = [*(values.get(code) for code in CODES), scored["macro_average"].get(name)]
        grid.add_row(name, *("" if value is None else f"{value:.3f}" for value in cells))
    console.print(grid)
    console.print(f"{scored['images']:,} images are in both files.")
    console.print(f"Balanced accuracy: {scored['aggregate']['balanced_accuracy']:.4f}")


if __name__ == "__main__":
    run(
        main,
        examples=["python training/evaluation/isic_scoring.py ISIC_2019_Test_GroundTruth.csv submission.csv"],
    )
