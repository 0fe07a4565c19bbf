"""ISIC 2019 submissions, and the challenge's own scoring of them: `python training/evaluation/isic_scoring.py TRUTH SUBMISSION`.

The scorer is the maintained package isic-challenge-scoring. It needs a pandas older than this project's, so it runs in
an environment of its own, which uv makes (from the package index) and keeps.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import ArrayLike
from rich.table import Table

from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.identifiers import isic_id
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import console, errors

SCORER = "isic-challenge-scoring==5.6"
SCORER_NEEDS = "pandas<3"  # it calls DataFrame.applymap
WEIGHTS = ("score_weight", "validation_weight")  # columns of the challenge's truth, where an image counts more or less
TIMEOUT = 600  # seconds; the first use fetches the scorer


class ScoringError(UserError):
    """A submission that cannot be scored, with a sentence saying why."""


def write_submission(path: Path, image_ids: Sequence[str] | pd.Series, probabilities: ArrayLike) -> None:
    """Write probabilities (N, 9) in taxonomy order as the challenge takes them: image,MEL,NV,...,UNK."""
    table = pd.DataFrame(np.asarray(probabilities), columns=list(CODES))
    table.insert(0, "image", list(image_ids))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(table.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode())


def score(truth: Path, submission: Path) -> dict[str, Any]:
    """The challenge's figures: {"per_category": {figure: {class: value}}, "macro_average": ..., "aggregate": ...}.

    Images are known by their ISIC identifier, or else by their name as it is. Those that only one of the files has are
    left out: the result says how many `images` are left, and how many of each file are `left_out`. Weights of images in
    the truth (`score_weight`, `validation_weight`) go to the scorer with it.

    Raises:
        ScoringError: the files do not fit, or the scorer cannot be run.
    """
    frames = []
    for path, weights in ((truth, WEIGHTS), (submission, ())):
        try:
            frame = pd.read_csv(path, encoding="utf-8-sig", dtype={"image": str})
        except (OSError, ValueError) as error:
            raise ScoringError(f"{path} cannot be read as a table: {error}") from error
        if missing := [column for column in ("image", *CODES) if column not in frame]:
            raise ScoringError(f"{path} lacks the column {', '.join(missing)}.")
        frame["image"] = [isic_id(str(name)) or str(name) for name in frame["image"]]
        if frame["image"].duplicated().any():
            raise ScoringError(f"{path} has several rows of {frame['image'][frame['image'].duplicated()].iloc[0]}.")
        frames.append(frame[["image", *CODES, *(name for name in weights if name in frame)]])
    common = set(frames[0]["image"]) & set(frames[1]["image"])
    if not common:
        raise ScoringError(f"{truth} and {submission} have no image in common.")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise ScoringError("uv, which runs the challenge's scorer, is not there; `make env` installs it.")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("truth.csv", "submission.csv")]
        for path, frame in zip(paths, frames, strict=True):
            frame[frame["image"].isin(common)].to_csv(path, index=False)
        command = [uv, "tool", "run", "--quiet", "--from", SCORER, "--with", SCORER_NEEDS, "isic-challenge-scoring"]
        try:
            done = subprocess.run(
                [*command, "-o", "json", "classification", *map(str, paths)],
                capture_output=True, text=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ScoringError(f"The scorer did not answer in {TIMEOUT} s.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ScoringError(f"{SCORER} refuses: {said[-1] if said else 'it says nothing'}")
    try:  # uv and warnings may speak first
        scored: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        said = done.stdout.strip().splitlines()
        raise ScoringError(f"{SCORER} gives no figures, but {said[-1] if said else 'nothing'!r}.") from None
    left_out = {"truth": len(frames[0]) - len(common), "submission": len(frames[1]) - len(common)}
    return scored | {"images": len(common), "left_out": left_out}


def figures(scored: Mapping[str, Any]) -> Table:
    """A row for each class and one for the mean, narrow enough for 80 columns, which is what a pipe has."""
    columns = scored["per_category"].items()
    table = Table("", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in columns:
        table.add_column(name.replace("_", "\n", 1), justify="right", no_wrap=True)
    rows = {code: [values.get(code) for _, values in columns] for code in CODES}
    rows["mean"] = [scored["macro_average"].get(name) for name, _ in columns]
    for row, values in rows.items():
        table.add_row(row, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def main(
    truth: Annotated[Path, typer.Argument(help="The challenge's ground truth: image,MEL,NV,BCC,AK,...,UNK.")],
    submission: Annotated[Path, typer.Argument(help="Probabilities in the same form.")],
) -> None:
    """Score a submission as the ISIC 2019 challenge does.

    Example:

    python training/evaluation/isic_scoring.py ISIC_2019_Test_GroundTruth.csv submission.csv
    """
    try:
        scored = score(truth, submission)
    except ScoringError as error:
        errors.print(str(error))
        raise SystemExit(1) from None
    left_out = ", ".join(f"{count:,} of the {name}" for name, count in scored["left_out"].items())
    console.print(f"{scored['images']:,} images; left out, as the other file lacks them: {left_out}")
    console.print(figures(scored))
    console.print(f"balanced accuracy {scored['aggregate']['balanced_accuracy']:.4f}")


if __name__ == "__main__":
    typer.run(main)
