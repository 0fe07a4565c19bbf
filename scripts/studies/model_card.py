"""Write MODEL_CARD.md: its words from model_card.template.md, its numbers from what the evaluations wrote.

    python scripts/studies/model_card.py

reads docs/evaluation/ (metrics.json of pictures alone, with_metadata.json, with_metadata_tta.json, unknowns.json,
stress.json, explanations.json) and the shipped bundle.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from handlers.bundle import Bundle, BundleError
from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.command_line import console, errors
from mlflow_tracking.settings import SHIPPED
from scripts.studies import unknowns
from training.config import ROOT
from training.evaluation import stress
from training.evaluation.assessment import headline, slice_order

TEMPLATE = ROOT / "scripts" / "studies" / "model_card.template.md"
CARD = ROOT / "MODEL_CARD.md"
EVALUATION = ROOT / "docs" / "evaluation"
PARTS = ("metrics", "with_metadata", "with_metadata_tta", "unknowns", "stress", "explanations")  # its JSON files
FIGURES = {
    "accuracy": "accuracy",
    "balanced accuracy, 8 classes": "balanced_accuracy",
    "accuracy as served": "as_served_accuracy",
    "balanced accuracy as served": "balanced_accuracy_9",
    "macro F1": "macro_f1",
    "weighted F1": "weighted_f1",
    "macro AUC": "macro_auc",
    "expected calibration error (15 bins)": "ece",
    "Brier score": "brier",
    "negative log-likelihood": "nll",
    "area under risk-coverage": "aurc",
}
CLASS_FIGURES = {
    "recall": "recall",
    "precision": "precision",
    "specificity": "specificity",
    "AUC": "auc",
    "AUC above 80 % sensitivity": "auc_above_80",
    "specificity at 95 % sensitivity": "specificity_at_95",
}


class CardError(UserError):
    """Evaluations that a card cannot be written from, with a sentence saying why."""


def render(bundle: Path = SHIPPED, evaluation: Path = EVALUATION) -> str:
    """The card's text.

    Raises:
        BundleError: the bundle is damaged.
        CardError: an evaluation is of another bundle.
        OSError, KeyError: figures are missing.
    """
    files = {name: evaluation / f"{name}.json" for name in PARTS}
    told = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    loaded = Bundle.load(bundle)
    if others := [name for name, table in told.items() if table.get("bundle") != loaded.digest]:
        raise CardError(
            f"Of another bundle than {bundle}: {', '.join(f'{name}.json' for name in others)} in {evaluation}; "
            "evaluate this one (--help says how)."
        )
    tta = told["with_metadata_tta"]
    config, test, held_out = loaded.config.to_dict(), told["metrics"], told["unknowns"]["held_out"]
    melanoma = test["per_class"]["MEL"]
    coverage = test["conformal"]["coverage_per_class"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        bundle=config,
        evidence=config["evidence"],
        fingerprint=config["evidence"]["dataset_fingerprint"][:15],
        grid=len(loaded.golden()[0].grid),
        megabytes=sum(file["bytes"] for file in loaded.files.values()) / 1e6,
        all_images=sum(config["evidence"]["images"].values()),
        test=test,
        told=told["with_metadata"],
        figures=_figures(test, told["with_metadata"]),
        mirrored={key: _with_interval(headline(tta)[key], tta["intervals_95"][key], 3) for key in FIGURES.values()},
        classes=_classes(test),
        slices=_slices(test["slices"]),
        missed=1 - test["as_served"]["recall"]["MEL"],
        alarms=1 - melanoma["specificity_at_95"],
        level=config["calibration"]["conformal"]["confidence_level"],
        coverage=", ".join(f"{code} {coverage[code]:.0%}" for code in KNOWN_CODES if code in coverage),
        no_rejection=sum(table["called_malignant_by_all"] for table in held_out.values()) / len(held_out),
        unknowns=unknowns.markdown(told["unknowns"]).strip(),
        stress=stress.markdown(told["stress"]["faults"]).strip(),
        explanations=told["explanations"],
    )


def _figures(alone: dict[str, Any], told: dict[str, Any]) -> str:
    """A row for each figure: its value and interval by the picture alone, and with metadata."""
    lines = ["| figure | picture alone | 95 % interval | with age, sex and site | 95 % interval |", "| --- " * 5 + "|"]
    for name, key in FIGURES.items():
        cells = []
        for table in (alone, told):
            low, high = table["intervals_95"][key]
            cells += [f"{headline(table)[key]:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _classes(test: dict[str, Any]) -> str:
    lines = [f"| class | images | {' | '.join(CLASS_FIGURES)} | recall as served |"]
    lines.append("| --- " * (3 + len(CLASS_FIGURES)) + "|")
    for code in KNOWN_CODES:  # JSON keeps no order
        figures = test["per_class"][code]
        cells = [
            _with_interval(figures[key], test["per_class_intervals_95"][code][key]) for key in CLASS_FIGURES.values()
        ]
        served = test["as_served"]["recall"][code]
        lines.append(f"| {code} | {figures['support']} | {' | '.join(cells)} | {served:.2f} |")
    return "\n".join(lines)


def _slices(slices: dict[str, Any]) -> str:
    lines = ["| slice | images | lesions | classes | accuracy | balanced accuracy | macro AUC | ECE |"]
    lines.append("| --- " * 8 + "|")
    for column in ("source", "site", "sex", "age"):
        values = slices[column]
        for value, entry in sorted(values.items(), key=lambda item: slice_order(column, item[0])):
            drawn = entry.get("intervals_95", {})
            names = ("accuracy", "balanced_accuracy", "macro_auc", "ece")
            cells = [_with_interval(entry.get(name), drawn.get(name)) for name in names]
            counts = f"{entry['images']} | {entry['lesions']} | {entry['classes']}"
            lines.append(f"| {column}: {value} | {counts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(value: float | None, interval: list[float] | None, digits: int = 2) -> str:
    if value is None:
        return ""
    drawn = f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{drawn}"


def main(
    bundle: Annotated[Path, typer.Option(help="The bundle that the card is of.")] = SHIPPED,
    evaluation: Annotated[Path, typer.Option(help="Folder with the evaluations' JSON files.")] = EVALUATION,
    out: Annotated[Path, typer.Option(help="The card.")] = CARD,
) -> None:
    """Write the model card of a bundle from its evaluations.

    Example, after training, for a model to ship:

    python training/export.py runs/NAME/bundle model_store/skin_vit

    python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --out reports/told

    cp reports/told/metrics.json docs/evaluation/with_metadata.json

    python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --tta --out reports/tta

    cp reports/tta/metrics.json docs/evaluation/with_metadata_tta.json

    python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --picture-alone
    --out docs/evaluation

    python training/evaluation/stress.py --bundle model_store/skin_vit --data data/manifest.csv --out docs/evaluation

    python training/evaluation/explanations.py --bundle model_store/skin_vit --data data/manifest.csv --out docs/evaluation

    python scripts/studies/unknowns.py --bundle model_store/skin_vit --data data/manifest.csv --out runs/unknowns

    cp runs/unknowns/unknowns.json docs/evaluation

    python scripts/studies/model_card.py
    """
    try:
        text = render(bundle, evaluation)
    except (BundleError, OSError, ValueError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None
    except KeyError as error:
        errors.print(f"The evaluations in {evaluation} lack {error}; run them again (--help says how).")
        raise SystemExit(1) from None
    with atomic_file(out) as file:
        file.write(text.encode())
    console.print(f"Written: {out}.")


if __name__ == "__main__":
    typer.run(main)
