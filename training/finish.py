"""The end of a training run: calibrate the best epoch's weights, evaluate them, export the bundle, log everything.

It needs only the output folder and the data, so resuming a run without epochs left repeats just this.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from handlers.bundle import Bundle, BundleConfig
from handlers.calibration import Calibration
from handlers.files import write_json
from handlers.receipt import Receipt
from handlers.taxonomy import UNKNOWN
from mlflow_tracking.command_line import console
from mlflow_tracking.runs import Tracker, code_revision
from mlflow_tracking.stack_settings import MODEL_NAME
from training.checkpoints import BEST, LAST, load
from training.config import TrainConfig
from training.data.batches import Images
from training.data.image_files import IMAGE_ENDINGS
from training.data.splits import SPLITS
from training.evaluation.calibration_fit import MIN_IMAGES, fit_calibration
from training.evaluation.evaluation_report import build_report, headline
from training.evaluation.figures import confusion_figure, curves_figure, reliability_figure
from training.evaluation.leakage import manifest_receipt
from training.evaluation.network_outputs import NetworkOutputs, outputs_of
from training.evaluation.unknown_class_fit import KnownSpace, KnownSpaceError, known_space_of
from training.export import export_bundle
from training.losses import prior_logits
from training.recipe import make_model

# Settings that still count when no epoch is left.
AFTER_EPOCHS = (
    "manifest", "data_dir", "cache_dir", "reference_dir", "image_size", "half_turn", "metadata", "batch_size",
    "logit_adjustment", "confidence_level", "malignant", "bootstrap", "device", "threads", "output", "name",
    "experiment",
)  # fmt: skip

Reports = dict[str, dict[str, Any]]


def finish(
    config: TrainConfig,
    output: Path,
    frame: pd.DataFrame,
    data: Mapping[str, Images],
    device: torch.device,
    tracker: Tracker,
    check: Callable[[], None],
) -> None:
    """Calibrate the best epoch's weights, evaluate them on val and test, export and log the bundle.

    Args:
        output: folder of the run's checkpoints; gets metrics.json and the bundle.
        frame: the manifest.
        data: its splits, by name.
        check: called between the stages; may raise to stop.
    """
    best = load(output / BEST)
    classes = best["classes"]
    model = best_model(config, best).to(device)
    outputs = {
        split: outputs_of(model, images, config.batch_size, config.preprocessing, device)
        for split, images in data.items()
        if split != "train"
    }
    check()
    space = find_known_space(model, outputs["val"], classes)
    sources = data["calibration"].sources if "calibration" in data else None
    calibration = calibrate(config, classes, outputs.get("calibration"), sources, space)
    reports = evaluate_splits(config, classes, frame, outputs, space, calibration)
    write_json(output / "metrics.json", reports)
    log_evaluations(tracker, classes, reports, calibration, outputs)
    tracker.figure(curves_figure(load(output / LAST)["history"]), "curves.png")
    check()
    bundle_config = BundleConfig(
        MODEL_NAME,
        config.architecture,
        config.options,
        tuple(classes),
        config.preprocessing,
        calibration,
        evidence(config, best, frame, reports, tracker.run_id),
        metadata=config.metadata_inputs,
    )
    pictures = reference_pictures(config.reference_dir, frame)
    bundle = export_bundle(output / "bundle", model, bundle_config, receipt(best, frame), space, pictures)
    check()
    log_files(tracker, output, bundle)
    announce(tracker, reports, bundle)


def best_model(config: TrainConfig, best: Mapping[str, Any]) -> nn.Module:
    """Return the network with the best epoch's weights, and with its logits adjusted to the class frequencies."""
    classes = best["classes"]
    model = make_model(config, len(classes))
    model.load_state_dict(best["weights"])
    if config.logit_adjustment:
        lower_bias(model, prior_logits(best["class_shares"], config.logit_adjustment))
    return model


def lower_bias(model: nn.Module, shift: NDArray[np.float64]) -> None:
    """Subtract `shift` (K,) from all logits, by way of the classifier's bias."""
    backbone: Any = model
    head: Any = backbone.get_classifier()
    bias: Any = (head[-1] if isinstance(head, nn.Sequential) else head).bias
    with torch.no_grad():
        bias -= torch.tensor(shift, dtype=bias.dtype)


def find_known_space(model: nn.Module, val: NetworkOutputs, classes: Sequence[str]) -> KnownSpace | None:
    """Fit the known space on the validation split; if that is impossible, print why and return None."""
    backbone: Any = model
    try:
        has_lesion = np.array([code != UNKNOWN for code in classes])
        labels = np.where(has_lesion[val.labels], val.labels, -1)  # -1 stays
        return known_space_of(backbone.get_classifier(), val.features, val.image_logits, labels)
    except KnownSpaceError as error:
        console.print(str(error))
        return None


def calibrate(
    config: TrainConfig,
    classes: list[str],
    split: NetworkOutputs | None,
    sources: NDArray[np.str_] | None,
    space: KnownSpace | None,
) -> Calibration:
    """Fit the calibration on the calibration split, if it is there and large enough."""
    calibration = Calibration()
    if split:
        calibration = fit_calibration(
            split.logits,
            split.labels,
            classes,
            config.confidence_level,
            residuals=space.residuals(split.features) if space else None,
            residual_weight=space.weight if space else 0.0,
            image_logits=split.image_logits if config.metadata else None,
            lesions=split.lesions,
            sources=sources,
            malignant=config.malignant,
        )
    if calibration.conformal is None:
        console.print(
            f"The calibration split has fewer than {MIN_IMAGES} images, so probabilities are not calibrated and no "
            "image is called unknown.",
            style="yellow",
        )
    return calibration


def evaluate_splits(
    config: TrainConfig,
    classes: list[str],
    frame: pd.DataFrame,
    outputs: Mapping[str, NetworkOutputs],
    space: KnownSpace | None,
    calibration: Calibration,
) -> Reports:
    """Return a report for val and test, and one `..._picture_alone` each if the model takes metadata."""
    reports = {}
    for split in (split for split in ("val", "test") if split in outputs):
        rows = frame[frame["split"] == split]
        residuals = space.residuals(outputs[split].features) if space else None
        # The known space was fitted on the validation images, so their rejection says nothing about new images.
        applied = replace(calibration, rejection=None) if split == "val" else calibration
        variants = {split: outputs[split].logits}
        if config.metadata:
            variants[f"{split}_picture_alone"] = outputs[split].image_logits
        for name, logits in variants.items():
            reports[name] = build_report(
                rows["label"].tolist(),
                applied.probabilities(logits, classes, residuals),
                applied.conformal_sets(logits, classes, residuals),
                rows["lesion_id"].tolist(),
                config.bootstrap,
                with_unknown=split != "val",
            )
    return reports


def log_evaluations(
    tracker: Tracker,
    classes: Sequence[str],
    reports: Reports,
    calibration: Calibration,
    outputs: Mapping[str, NetworkOutputs],
) -> None:
    """Log the reports' figures and diagrams."""
    lesion_classes = [code for code in classes if code != UNKNOWN]  # UNK comes last
    for name, report in reports.items():
        prefix = f"best_{name}" if name.startswith("val") else name  # val_... are each epoch's figures, uncalibrated
        tracker.metrics({f"{prefix}_{figure}": value for figure, value in headline(report).items()})
        if name in outputs:
            labels = outputs[name].labels
            labelled = (labels >= 0) & (labels < len(lesion_classes))
            probabilities = calibration.known_probabilities(outputs[name].logits[labelled][:, : len(lesion_classes)])
            tracker.figure(confusion_figure(report["confusion"], report["classes"]), f"confusion_{name}.png")
            tracker.figure(reliability_figure(labels[labelled], probabilities), f"reliability_{name}.png")


def evidence(
    config: TrainConfig, best: Mapping[str, Any], frame: pd.DataFrame, reports: Reports, run_id: str
) -> dict[str, Any]:
    """Describe how the bundle was made."""
    initial = {"initial_bundle": best["initial"]["digest"]} if best["initial"] else {}
    pretrained = {"pretrained": best["pretrained"]} if best["pretrained"] else {}
    return (
        initial
        | pretrained
        | {
            "run_id": run_id,
            "dataset_fingerprint": best["dataset_fingerprint"],
            "code_revision": code_revision(),
            "epoch": best["best"]["epoch"],
            "seed": config.seed,
            "images": {split: int((frame["split"] == split).sum()) for split in SPLITS},
            "metrics": {split: headline(report) for split, report in reports.items()},
        }
    )


def reference_pictures(folder: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the pictures for the reference: those of a folder, or without one the lesions of the calibration split."""
    if not folder:
        return frame[(frame["split"] == "calibration") & (frame["label"] != UNKNOWN)]
    paths = sorted(str(path) for path in Path(folder).iterdir() if path.suffix.casefold() in IMAGE_ENDINGS)
    # Each picture counts as a lesion of its own, of which nothing is known.
    return pd.DataFrame({"path": paths, "lesion_id": paths, "split": "", "age": np.nan, "sex": "", "site": ""})


def receipt(best: Mapping[str, Any], frame: pd.DataFrame) -> Receipt:
    """Return the receipt of the run's images and of those that its initial bundle has seen."""
    own = manifest_receipt(frame, best["dataset_fingerprint"])
    return own.joined(Receipt.from_dict(best["initial"]["receipt"])) if best["initial"] else own


def log_files(tracker: Tracker, output: Path, bundle: Bundle) -> None:
    """Log bundle, reports and checkpoints, and close the run."""
    tracker.artifact(bundle.path, "bundle")
    tracker.artifact(output / "metrics.json", "evaluation")
    tracker.artifact(output / BEST, "checkpoints")
    tracker.artifact(output / LAST, "checkpoints")
    tracker.tags({"bundle_digest": bundle.digest})
    tracker.end("FINISHED")


def announce(tracker: Tracker, reports: Reports, bundle: Bundle) -> None:
    """Print the figures and how to register the bundle."""
    for name, report in reports.items():
        figures = "  ".join(f"{key} {value:.3f}" for key, value in headline(report).items() if value is not None)
        console.print(f"{name}  {figures}")
    if note := os.environ.get("BUNDLE_NOTE"):  # containers/train.sh registers the bundle
        Path(note).write_text(str(bundle.path))
    console.print(f"Bundle: {bundle.path}")
    if tracker.url and not tracker.failed:  # only a server's runs can be registered by their id
        console.print(f"Register it: python scripts/register_model.py --run-id {tracker.run_id}")
    else:
        console.print(f"Register it: python scripts/register_model.py --bundle {bundle.path}")
