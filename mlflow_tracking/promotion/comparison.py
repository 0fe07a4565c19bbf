"""Shadow replay: the same pictures answered by champion and challenger, and where the two part."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from handlers.taxonomy import CODES
from mlflow_tracking import metrics
from mlflow_tracking.promotion.answers import PARALLEL, AnswerBook, Answers, ask
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError

EXAMPLES = 20  # flips named one by one


def compare(
    evaluation: EvaluationSet | None, champion: Answers, challenger: Answers, names: Any = None
) -> dict[str, Any]:
    """What would change if the challenger answered, as one JSON-able table.

    Args:
        evaluation: the frozen set that was asked about; None for other pictures, whose truth is not known.
        names: what to call the pictures (N,) where there is no set.

    Returns:
        `agreement`: share of pictures with the same most probable class; `into_malignant`, `out_of_malignant`: flips by
        number, `flips`: the first of them by name; `moved`: mean total variation distance of the nine probabilities;
        milliseconds of both, p50 and p95, as measured while they were asked; balanced accuracies where truth is known.
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
            for position in np.flatnonzero(into | out)[:EXAMPLES].tolist()
        ],
    }
    for who, answers in (("champion", champion), ("challenger", challenger)):
        p50, p95 = np.percentile(answers.milliseconds, [50, 95]).tolist()
        table[who] = {"p50_milliseconds": p50, "p95_milliseconds": p95}
        if labels is not None:
            table[who]["balanced_accuracy"] = metrics.balanced_accuracy(labels, answers.probabilities)
    return table


def replay_set(
    torchserve: TorchServe, book: AnswerBook, evaluation: EvaluationSet, champion: Release, challenger: Release
) -> dict[str, Any]:
    """Both versions on the frozen set; answers that are kept are not asked again. Raises as `ask`."""
    return compare(
        evaluation,
        book.complete(torchserve, champion, evaluation),
        book.complete(torchserve, challenger, evaluation),
    )


def replay_samples(
    torchserve: TorchServe, files: Sequence[Path], champion: Release, challenger: Release
) -> dict[str, Any]:
    """Both versions on pictures whose truth is not known; `refused` has those that were no pictures, with the reason.

    Raises as `ask`, and OSError; TorchServeError when no picture is left.
    """

    def both(file: Path) -> tuple[Answers, Answers] | str:
        image = file.read_bytes()  # here, so that a folder of many is never in memory whole
        try:
            return ask(torchserve, champion, [image], parallel=1), ask(torchserve, challenger, [image], parallel=1)
        except TorchServeError as error:
            if error.transient or error.status >= 500:
                raise
            return str(error)

    with ThreadPoolExecutor(PARALLEL) as pool:
        found = list(zip(files, pool.map(both, files), strict=True))
    pairs = [pair for _, pair in found if not isinstance(pair, str)]
    refused = {file.name: pair for file, pair in found if isinstance(pair, str)}
    if not pairs:
        name, reason = next(iter(refused.items()))
        raise TorchServeError(400, f"None of the {len(files)} pictures can be read; {name}: {reason}")
    before, after = (_together([pair[side] for pair in pairs]) for side in (0, 1))
    names = [file.name for file, pair in found if not isinstance(pair, str)]
    return compare(None, before, after, names) | {"refused": refused}


def _together(answers: Sequence[Answers]) -> Answers:
    parts = zip(*((one.probabilities, one.milliseconds) for one in answers), strict=True)
    return Answers(*(np.concatenate(part) for part in parts))
