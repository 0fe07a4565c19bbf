"""From the best checkpoint of a run to its bundle: calibration, evaluation, export, and what MLflow is told of them.

It needs nothing but the output folder and the data, so it can be run again: resuming a run whose epochs are done
comes straight here.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from handlers.backbone import build_backbone
from handlers.files import write_json
from handlers.receipt import Receipt
from mlflow_tracking.command_line import console
from mlflow_tracking.runs import Tracker, code_revision
from training.checkpoints import BEST, LAST, load
from training.config import TrainConfig
from training.data.batches import Images
from training.evaluation.assessment import assess, headline
from training.evaluation.calibration_fit import MIN_IMAGES, fit_calibration
from training.evaluation.detectors import Known, KnownSpace, Outputs, known_space
from training.evaluation.figures import confusion_figure, curves_figure, reliability_figure
from training.evaluation.leakage import manifest_receipt
from training.evaluation.network_outputs import outputs_of
from training.export import export_bundle
from training.losses import prior_logits

# Settings that count even where no epoch is left to do: what is read here, and where and on what it runs.
AFTER_EPOCHS = (
    "manifest", "data_dir", "cache_dir", "image_size", "metadata", "batch_size", "logit_adjustment", "confidence_level",
    "bootstrap", "device", "threads", "output", "name", "experiment",
)  # fmt: skip


def lower_bias(model: nn.Module, shift: NDArray[np.float64]) -> None:
    """Take `shift` (K,) off all logits, by way of the classifier's bias."""
    backbone: Any = model
    head: Any = backbone.get_classifier()
    bias: Any = (head[-1] if isinstance(head, nn.Sequential) else head).bias
    with torch.no_grad():
        bias -= torch.tensor(shift, dtype=bias.dtype)


def find_space(model: nn.Module, val: Outputs, labels: NDArray[np.int64]) -> KnownSpace | None:
    """Where known lesions lie among the features, from the validation split: images that the weights were not fitted
    to. None if the head is not one linear layer, or the images are fewer than the features' dimensions; then it says
    so."""
    backbone: Any = model
    head, known = backbone.get_classifier(), labels >= 0
    reason = ""
    if not isinstance(head, nn.Linear):
        reason = "the head has hidden layers"
    elif known.sum() < val.features.shape[1]:
        reason = f"the {known.sum():,} validation images are fewer than their {val.features.shape[1]:,} dimensions"
    if reason:
        console.print(f"The unknown will be told by the logits alone, not by the features: {reason}.")
        return None
    weight, bias = (tensor.detach().cpu().double().numpy() for tensor in (head.weight, head.bias))
    return known_space(Known(Outputs(val.features[known], val.logits[known]), labels[known], weight, bias))


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
    classes: list[str] = best["classes"]
    inputs, options = config.metadata_inputs, config.options
    width = len(inputs.columns)
    model = build_backbone(config.architecture, len(classes), config.image_size, options=options, metadata_width=width)
    model.load_state_dict(best["weights"])
    if config.logit_adjustment:
        counts = np.bincount(data["train"].labels, minlength=len(classes))
        lower_bias(model, prior_logits(counts.tolist(), config.logit_adjustment))
    model.to(device)
    found = {
        split: outputs_of(model, images, config.batch_size, config.preprocessing, device)
        for split, images in data.items()
        if split != "train"
    }
    pictures = {split: outputs for split, (outputs, _) in found.items()}
    space = find_space(model, pictures["val"], data["val"].labels)
    residuals = {split: space.residuals(outputs.features) if space else None for split, outputs in pictures.items()}
    alone = {split: outputs.logits for split, outputs in pictures.items()}
    logits = {split: told for split, (_, told) in found.items()}
    check()

    calibration = fit_calibration(
        logits.get("calibration", np.zeros((0, len(classes)))),
        data["calibration"].labels if "calibration" in data else [],
        classes,
        config.confidence_level,
        residuals=residuals.get("calibration"),
        residual_weight=space.weight if space else 0.0,
        alone=alone.get("calibration") if inputs.fields else None,
        lesions=data["calibration"].lesions if "calibration" in data else None,
    )
    if calibration.conformal is None:
        console.print(
            f"The calibration split has fewer than {MIN_IMAGES} images: "
            "probabilities are left as they are, and nothing is ever called unknown.",
            style="yellow",
        )
    reports = {}
    for split in ("val", "test"):
        if split not in data:
            continue
        rows, labels = frame[frame["split"] == split], data[split].labels
        # The known space is of the validation images, whose residuals are therefore smaller than those of others:
        # what the rejection does to them says nothing.
        judged = replace(calibration, rejection=None) if split == "val" else calibration
        ways = {split: logits[split]} | ({f"{split}_picture_alone": alone[split]} if inputs.fields else {})
        for name, asked in ways.items():
            reports[name] = assess(
                rows["label"].tolist(),
                judged.probabilities(asked, classes, residuals[split]),
                judged.conformal_sets(asked, classes, residuals[split]),
                rows["lesion_id"].tolist(),
                config.bootstrap,
                with_unknown=split != "val",
            )
            # val_... are the metrics of each epoch, not calibrated
            prefix = f"best_{name}" if split == "val" else name
            tracker.metrics({f"{prefix}_{figure}": value for figure, value in headline(reports[name]).items()})
        table, codes = reports[split]["confusion"], reports[split]["classes"]
        tracker.figure(confusion_figure(table, codes), f"confusion_{split}.png")
        known = calibration.known_probabilities(logits[split][labels >= 0])
        tracker.figure(reliability_figure(labels[labels >= 0], known), f"reliability_{split}.png")
    tracker.figure(curves_figure(load(output / LAST)["history"]), "curves.png")
    write_json(output / "metrics.json", reports)
    check()

    receipt = manifest_receipt(frame, best["dataset_fingerprint"])
    initial = best.get("initial")
    evidence: dict[str, Any] = {
        "run_id": tracker.run_id,
        "dataset_fingerprint": best["dataset_fingerprint"],
        "code_revision": code_revision(),
        "epoch": best["best"]["epoch"],
        "seed": config.seed,
        "images": {split: int((frame["split"] == split).sum()) for split in ("train", "val", "calibration", "test")},
        "metrics": {split: headline(report) for split, report in reports.items()},
    }
    if initial:
        evidence["initial_bundle"] = initial["digest"]
        receipt = receipt.joined(Receipt.from_dict(initial["receipt"]))
    bundle = export_bundle(
        output / "bundle",
        backbone=model,
        architecture=config.architecture,
        options=options,
        metadata=inputs,
        classes=classes,
        preprocessing=config.preprocessing,
        calibration=calibration,
        evidence=evidence,
        receipt=receipt,
        space=space,
    )
    check()
    tracker.artifact(output / "bundle", "bundle")
    tracker.artifact(output / "metrics.json", "evaluation")
    tracker.artifact(output / BEST, "checkpoints")
    tracker.artifact(output / LAST, "checkpoints")
    tracker.tags({"bundle_digest": bundle.digest})
    tracker.end("FINISHED")
    for split, report in reports.items():
        figures = "  ".join(f"{key} {value:.3f}" for key, value in headline(report).items() if value is not None)
        console.print(f"{split}  {figures}")
    # The registry finds a run by its id only on its own server.
    told = tracker.url and not tracker.failed
    if note := os.environ.get("BUNDLE_NOTE"):  # containers/train.sh registers it
        Path(note).write_text(str(bundle.path))
    source = f"--run-id {tracker.run_id}" if told else f"--bundle {bundle.path}"
    console.print(f"Bundle: {bundle.path}\nRegister it: python scripts/register_model.py {source}")
