"""Write MODEL_CARD.md from model_card.template.md, the figures in docs/evaluation/ and the shipped bundle."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from handlers.bundle import Bundle
from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.command_line import console, run
from mlflow_tracking.settings import SHIPPED
from scripts.studies import unknowns_report
from training.config import ROOT
from training.evaluation import stress
from training.evaluation.evaluation_report import headline, slice_order

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
    """The evaluations do not fit the bundle."""


def render(bundle: Path = SHIPPED, evaluation: Path = EVALUATION) -> str:
    """Return the text of the card.

    Raises:
        BundleError: the bundle is damaged.
        CardError: a figure is missing, or an evaluation describes another bundle.
    """
    loaded = Bundle.load(bundle)
    try:
        tables = {name: json.loads((evaluation / f"{name}.json").read_text(encoding="utf-8")) for name in PARTS}
        others = [f"{name}.json" for name, table in tables.items() if table["bundle"] != loaded.digest]
        if others:
            raise CardError(
                f"{', '.join(others)} in {evaluation} describe another bundle than {bundle}. Evaluate this bundle; "
                "--help lists the commands."
            )
        return _fill(loaded, tables)
    except (KeyError, OSError, ValueError) as error:
        raise CardError(f"The evaluations in {evaluation} cannot be used ({error}). Run them again.") from error


def _fill(loaded: Bundle, tables: dict[str, Any]) -> str:
    """Return the template with the figures of the tables."""
    tta = tables["with_metadata_tta"]
    config, test, held_out = loaded.config.to_dict(), tables["metrics"], tables["unknowns"]["held_out"]
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
        with_metadata=tables["with_metadata"],
        figures=_figures(test, tables["with_metadata"]),
        mirrored={key: _with_interval(headline(tta)[key], tta["intervals_95"][key], 3) for key in FIGURES.values()},
        classes=_classes(test),
        slices=_slices(test["slices"]),
        missed=1 - test["as_served"]["recall"]["MEL"],
        alarms=1 - melanoma["specificity_at_95"],
        level=config["calibration"]["conformal"]["confidence_level"],
        coverage=", ".join(f"{code} {coverage[code]:.0%}" for code in KNOWN_CODES if code in coverage),
        no_rejection=sum(table["called_malignant_by_all"] for table in held_out.values()) / len(held_out),
        unknowns=unknowns_report.markdown(tables["unknowns"]).strip(),
        stress=stress.markdown(tables["stress"]["faults"]).strip(),
        explanations=tables["explanations"],
    )


def _figures(alone: dict[str, Any], with_metadata: dict[str, Any]) -> str:
    """Return a row for each figure: value and interval by the picture alone and with metadata."""
    lines = ["| figure | picture alone | 95 % interval | with age, sex and site | 95 % interval |", "| --- " * 5 + "|"]
    for name, key in FIGURES.items():
        cells = []
        for table in (alone, with_metadata):
            low, high = table["intervals_95"][key]
            cells += [f"{headline(table)[key]:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _classes(test: dict[str, Any]) -> str:
    lines = [f"| class | images | {' | '.join(CLASS_FIGURES)} | recall as served |"]
    lines.append("| --- " * (3 + len(CLASS_FIGURES)) + "|")
    for code in KNOWN_CODES:  # JSON files do not promise an order
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


SHIPPED_ON_MANIFEST = "--bundle model_store/skin_vit --data data/manifest.csv"
EVALUATE = f"python training/evaluate.py {SHIPPED_ON_MANIFEST}"
EXAMPLES = [
    "python scripts/studies/model_card.py",
    "After another model was trained for shipping, first run:",
    "python training/export.py runs/NAME/bundle model_store/skin_vit",
    f"{EVALUATE} --out reports/metadata",
    "cp reports/metadata/metrics.json docs/evaluation/with_metadata.json",
    f"{EVALUATE} --tta --out reports/tta",
    "cp reports/tta/metrics.json docs/evaluation/with_metadata_tta.json",
    f"{EVALUATE} --picture-alone --out docs/evaluation",
    f"python training/evaluation/stress.py {SHIPPED_ON_MANIFEST} --out docs/evaluation",
    f"python training/evaluation/explanations.py {SHIPPED_ON_MANIFEST} --out docs/evaluation",
    f"python scripts/studies/unknowns.py {SHIPPED_ON_MANIFEST} --out runs/unknowns",
    "cp runs/unknowns/unknowns.json docs/evaluation",
]


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle that the card describes.")] = SHIPPED,
    evaluation: Annotated[Path, typer.Option(help="Folder with the JSON files of the evaluations.")] = EVALUATION,
    out: Annotated[Path, typer.Option(help="The card to write.")] = CARD,
) -> None:
    """Write the model card of a bundle from its evaluations."""
    text = render(bundle, evaluation)
    with atomic_file(out) as file:
        file.write(text.encode())
    console.print(f"Written: {out}.")


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
