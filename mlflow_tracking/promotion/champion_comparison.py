"""Comparison of champion and challenger: their answers to the same pictures."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from handlers.decoding import SHRINK_SIDE, decode
from handlers.errors import ImageError, UserError
from handlers.taxonomy import CODES
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.promotion.answers import PARALLEL, Answers, ask
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError

MAX_FLIPS = 20  # flips that are listed by name


def compare(
    evaluation: EvaluationSet | None, champion: Answers, challenger: Answers, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what would change if the challenger served, as a JSON-able table.

    Args:
        evaluation: the frozen set of the answers; None for other pictures, whose true class is unknown.
        names: the pictures' names (N,) without a set.

    Returns:
        `agreement`: share of pictures with the same most probable class; `into_malignant`, `out_of_malignant`: numbers
        of flips, `flips`: the first MAX_FLIPS; `moved`: mean total variation distance of the probabilities; for both
        versions p50 and p95 of latency, and balanced accuracy if the true classes are known.
    """
    labels = None if evaluation is None else evaluation.labels
    names = names if evaluation is None else list(evaluation.frame["image_id"])
    into = ~champion.malignant & challenger.malignant
    out = champion.malignant & ~challenger.malignant
    table: dict[str, Any] = {
        "images": len(champion.top),
        "evaluation_set": evaluation.digest if evaluation else None,
        "agreement": float((champion.top == challenger.top).mean()),
        "into_malignant": int(into.sum()),
        "out_of_malignant": int(out.sum()),
        "moved": float(0.5 * np.abs(champion.probabilities - challenger.probabilities).sum(1).mean()),
        "flips": [
            {
                "image": names[position],
                "champion": CODES[champion.top[position]],
                "challenger": CODES[challenger.top[position]],
                **({} if labels is None else {"truth": CODES[labels[position]]}),
            }
            for position in np.flatnonzero(into | out)[:MAX_FLIPS].tolist()
        ],
    }
    for role, answers in (("champion", champion), ("challenger", challenger)):
        p50, p95 = np.percentile(answers.milliseconds, [50, 95]).tolist()
        table[role] = {"p50_milliseconds": p50, "p95_milliseconds": p95}
        if labels is not None:
            table[role]["balanced_accuracy"] = metrics.balanced_accuracy(labels, answers.probabilities)
    return table


def replay_folder(torchserve: TorchServe, folder: Path, champion: Release, challenger: Release) -> dict[str, Any]:
    """Compare both versions on the pictures in a folder and below; hidden files are ignored.

    The table has `refused`: reasons by the names of files that are no pictures. Raises as `ask`, and OSError;
    UserError if there is no picture.
    """

    def answers_to(file: Path) -> tuple[Answers, Answers] | str:
        image = file.read_bytes()  # one at a time, so that memory never holds a whole folder
        try:
            decode(image, SHRINK_SIDE)
            return ask(torchserve, champion, [image], parallel=1), ask(torchserve, challenger, [image], parallel=1)
        except ImageError as error:
            return str(error)
        except TorchServeError as error:
            if error.transient or error.status >= 500:
                raise
            return str(error)

    files = sorted(_visible_files(folder))
    with ThreadPoolExecutor(PARALLEL) as pool:
        results = dict(zip(files, pool.map(answers_to, files), strict=True))
    refused = {str(file.relative_to(folder)): reason for file, reason in results.items() if isinstance(reason, str)}
    pairs = {str(file.relative_to(folder)): pair for file, pair in results.items() if not isinstance(pair, str)}
    if not refused and not pairs:
        raise UserError(f"{folder} is empty. Name a folder of pictures.")
    if not pairs:
        name, reason = next(iter(refused.items()))
        raise UserError(f"None of the {len(refused)} files in {folder} is a picture. The first is {name}. {reason}")
    before, after = (_concatenated([pair[side] for pair in pairs.values()]) for side in (0, 1))
    return compare(None, before, after, list(pairs)) | {"refused": refused}


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below, except hidden ones such as macOS's ._NAME.jpg."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _concatenated(answers: Sequence[Answers]) -> Answers:
    return Answers(
        np.concatenate([part.probabilities for part in answers]),
        np.concatenate([part.milliseconds for part in answers]),
    )
