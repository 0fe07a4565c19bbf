"""Write MODEL_CARD.md from model_card.template.md, the figures in docs/evaluation/ and the shipped bundle."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from handlers.bundle import Bundle
from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.suspicion import DEFAULT_SENSITIVITY
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.command_line import console, markdown_table, run
from mlflow_tracking.stack_settings import SHIPPED
from scripts.studies import unknowns_report
from training.config import ROOT
from training.evaluation import stress
from training.evaluation.evaluation_report import SLICE_METRICS, headline, slice_order

TEMPLATE = ROOT / "scripts" / "studies" / "model_card.template.md"
CARD = ROOT / "MODEL_CARD.md"
EVALUATION = ROOT / "docs" / "evaluation"
# Its JSON files, of the shipped model; and the one of the model that was shipped before.
PARTS = ("metrics", "tta", "unknowns", "stress", "explanations", "blur_and_source")
FORMER = "former_explanations"
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
# Figures of both models; those of UNK and of the alarm are not common to them.
COMPARED = {name: key for name, key in FIGURES.items() if key != "aurc"} | {
    "malignant called benign or UNK": "as_served_malignant_missed",
    "melanoma recall": "melanoma_recall",
    "melanoma specificity at 95 % sensitivity": "melanoma_specificity_at_95",
    "coverage of the 90 % sets": "conformal_coverage",
    "mean size of the sets": "conformal_mean_size",
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
        tables = {name: _read(evaluation, name) for name in PARTS}
        others = [f"{name}.json" for name, table in tables.items() if table["bundle"] != loaded.digest]
        if others:
            raise CardError(
                f"{', '.join(others)} in {evaluation} describe another bundle than {bundle}. Evaluate this bundle; "
                "--help lists the commands."
            )
        former = _read(evaluation, FORMER)
        if former["bundle"] != tables["metrics"]["against"]["bundle"]:
            raise CardError(
                f"{FORMER}.json in {evaluation} and the comparison in metrics.json describe two former bundles. "
                "Evaluate one; --help lists the commands."
            )
        return _fill(loaded, tables, former)
    except (KeyError, OSError, ValueError) as error:
        raise CardError(f"The evaluations in {evaluation} cannot be used ({error}). Run them again.") from error


def _read(evaluation: Path, name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((evaluation / f"{name}.json").read_text(encoding="utf-8"))
    return table


def _fill(loaded: Bundle, tables: dict[str, Any], former: dict[str, Any]) -> str:
    """Return the template with the figures of the tables."""
    config, test, tta = loaded.config.to_dict(), tables["metrics"], tables["tta"]
    held_out = tables["unknowns"]["held_out"]
    alarm = test["suspicion"]["malignant"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        bundle=config,
        evidence=config["evidence"],
        fingerprint=config["evidence"]["dataset_fingerprint"][:15],
        grid=len(loaded.golden()[0].grid),
        megabytes=sum(file["bytes"] for file in loaded.files.values()) / 1e6,
        all_images=sum(config["evidence"]["images"].values()),
        test=test,
        figures=_figures(test),
        former=_former(test["against"]["all"]),
        former_images=test["against"]["all"]["images"],
        mirrored={key: _with_interval(headline(tta)[key], tta["intervals_95"][key], 3) for key in FIGURES.values()},
        classes=_classes(test),
        slices=_slices(test["slices"]),
        weakest=test["weakest_slice"],
        missed=1 - test["as_served"]["recall"]["MEL"],
        alarm_codes=", ".join(alarm["codes"]),
        promises=_promises(alarm["sources"]["all sources"]["promises"]),
        alarm_sources=_alarm_sources(alarm["sources"]),
        level=config["calibration"]["conformal"]["confidence_level"],
        coverage=", ".join(f"{code} {share:.0%}" for code, share in _by_class(test["conformal"]["coverage_per_class"])),
        no_rejection=sum(table["called_malignant_by_all"] for table in held_out.values()) / len(held_out),
        unknowns=unknowns_report.markdown(tables["unknowns"]).strip(),
        stress=stress.markdown(tables["stress"]["faults"]).strip(),
        sharpness=_sharpness(tables["blur_and_source"]["sharpness"]),
        probe=tables["blur_and_source"]["source"]["balanced_accuracy"],
        chance=tables["blur_and_source"]["source"]["chance"],
        explanations=tables["explanations"],
        former_explanations=former,
    )


def _by_class(shares: dict[str, float]) -> list[tuple[str, float]]:
    return [(code, shares[code]) for code in KNOWN_CODES if code in shares]


def _figures(test: dict[str, Any]) -> str:
    """Return a row for each figure: value and interval."""
    figures, intervals = headline(test), test["intervals_95"]
    rows = [
        (name, f"{figures[key]:.3f}", unknowns_report.interval_text(intervals[key])) for name, key in FIGURES.items()
    ]
    return markdown_table(("figure", "value", "95 % interval"), rows)


def _former(comparison: dict[str, Any]) -> str:
    """Return a row for each figure of this model and the former one on the same pictures."""
    rows = []
    for name, key in COMPARED.items():
        row = comparison[key]
        low, high = row["interval_95"]
        rows.append((name, row["value"], row["against"], f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"))
    return markdown_table(("figure", "this model", "former model", "difference", "95 % interval"), rows)


def _promises(promises: list[dict[str, Any]]) -> str:
    """Return a row for each promise of the alarm, over all sources."""
    rows = [(f"{row['promised']:.2f}", *_kept_and_price(row)) for row in promises]
    return markdown_table(("promised sensitivity", "sensitivity on test", "other lesions flagged"), rows)


def _alarm_sources(sources: dict[str, Any]) -> str:
    """Return a row for each source: what the default promise keeps there, and its price."""
    rows = []
    for source, figures in sources.items():
        row = next(row for row in figures["promises"] if row["promised"] == DEFAULT_SENSITIVITY)
        rows.append((source, figures["lesions"], figures["other_lesions"], *_kept_and_price(row)))
    return markdown_table(("source", "malignant lesions", "others", "sensitivity", "others flagged"), rows)


def _kept_and_price(row: dict[str, Any]) -> list[str]:
    return [_with_interval(row[key], row[f"{key}_95"]) for key in ("sensitivity", "benign_flagged")]


def _sharpness(table: dict[str, Any]) -> str:
    rows = [
        (side, f"{row['images']:,}", row["macro_auc"], f"{row['auc_change']:+.3f}", row["balanced_accuracy"])
        for side, row in sorted(table.items(), key=lambda item: int(item[0]))
    ]
    return markdown_table(("shorter side in pixels", "images", "macro AUC", "change", "balanced accuracy"), rows)


def _classes(test: dict[str, Any]) -> str:
    rows = []
    for code in KNOWN_CODES:  # JSON files do not promise an order
        figures, intervals = test["per_class"][code], test["per_class_intervals_95"][code]
        cells = [_with_interval(figures[key], intervals[key]) for key in CLASS_FIGURES.values()]
        rows.append((code, figures["support"], *cells, f"{test['as_served']['recall'][code]:.2f}"))
    return markdown_table(("class", "images", *CLASS_FIGURES, "recall as served"), rows)


def _slices(slices: dict[str, Any]) -> str:
    head = ["slice", "images", "lesions", "classes", "accuracy", "balanced accuracy", "macro AUC", "ECE"]
    rows = []
    for column in ("source", "site", "sex", "age"):
        for value, entry in sorted(slices[column].items(), key=lambda item: slice_order(column, item[0])):
            drawn = entry.get("intervals_95", {})
            cells = [_with_interval(entry.get(name), drawn.get(name)) for name in SLICE_METRICS]
            cells += [_with_interval(entry.get(name), None) for name in ("coverage_by_lesion", "mean_set_size")]
            rows.append((f"{column}: {value}", entry["images"], entry["lesions"], entry["classes"], *cells))
    return markdown_table([*head, "set coverage", "set size"], rows)


def _with_interval(value: float | None, interval: list[float] | None, digits: int = 2) -> str:
    if value is None:
        return ""
    drawn = f" ({interval[0]:.{digits}f}–{interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{drawn}"


SHIPPED_ON_MANIFEST = "--bundle model_store/skin_vit --data data/manifest.csv"
EXAMPLES = [
    "python scripts/studies/model_card.py",
    "After another model was trained for shipping, first keep the former bundle as FORMER and run:",
    "python training/export.py runs/NAME/bundle model_store/skin_vit",
    f"python training/evaluate.py {SHIPPED_ON_MANIFEST} --tta --out reports/tta",
    "cp reports/tta/metrics.json docs/evaluation/tta.json",
    f"python training/evaluate.py {SHIPPED_ON_MANIFEST} --against FORMER --out docs/evaluation",
    f"python training/evaluation/stress.py {SHIPPED_ON_MANIFEST} --out docs/evaluation",
    f"python training/evaluation/explanations.py {SHIPPED_ON_MANIFEST} --out docs/evaluation",
    "python training/evaluation/explanations.py --bundle FORMER --data data/manifest.csv --allow-overlap --out reports",
    "cp reports/explanations.json docs/evaluation/former_explanations.json",
    f"python scripts/studies/blur_and_source.py {SHIPPED_ON_MANIFEST} --out docs/evaluation",
    f"python scripts/studies/unknowns.py {SHIPPED_ON_MANIFEST} --most 400 --out runs/unknowns",
    "cp runs/unknowns/unknowns.json docs/evaluation",
    "rm docs/evaluation/examples.png docs/evaluation/errors.png  # pictures of patients",
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
