"""Tiny untrained models for tests: right in shape, quick to build, their answers spread by a larger head."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from handlers.backbone import build_backbone
from handlers.bundle import CONFIG, RECEIPT, Bundle, BundleConfig, seal
from handlers.calibration import Calibration, Conformal
from handlers.files import write_json
from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from handlers.receipt import Receipt
from handlers.suspicion import Alarm, Promise
from handlers.taxonomy import KNOWN_CODES
from handlers.unknown_class import Rejection
from mlflow_tracking.stack_settings import MODEL_NAME
from training.evaluation.unknown_class_fit import KnownSpace
from training.export import export_bundle

ARCHITECTURE = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
IMAGE_SIZE = 64
NOTHING_SEEN = Receipt("sha256:test", {})
PLACE = TemporaryDirectory()  # of the bundles that are kept


def tiny_backbone(
    classes: int = len(KNOWN_CODES),
    architecture: str = ARCHITECTURE,
    options: dict[str, Any] | None = None,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    metadata_width: int = 0,
) -> torch.nn.Module:
    """A backbone in eval mode with random norms and heads, so that no gradient is trivially zero."""
    torch.manual_seed(seed)
    options = OPTIONS if options is None and architecture == ARCHITECTURE else options
    backbone = build_backbone(architecture, classes, image_size, options=options, metadata_width=metadata_width).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        backbone.get_classifier().weight.normal_(std=backbone.num_features**-0.5)
        if metadata_width:
            backbone.metadata_head.logits.weight.normal_()
    return backbone


def known_space() -> KnownSpace:
    """Half of the directions of the tiny model's features, drawn."""
    rng, width = np.random.default_rng(0), OPTIONS["embed_dim"]
    basis, _ = np.linalg.qr(rng.normal(size=(width, width // 2)))
    return KnownSpace(rng.normal(size=width), basis, 1.0)


def tiny_bundle(
    out: Path,
    seed: int = 0,
    classes: tuple[str, ...] = KNOWN_CODES,
    residual_weight: float = 0.0,
    metadata: Metadata | None = None,
    options: dict[str, Any] | None = None,
    run_id: str | None = None,
    architecture: str = ARCHITECTURE,
    receipt: Receipt | None = None,
    graph: bool = True,
    **export: Any,
) -> Bundle:
    """Return the bundle of a tiny network, by default a vision transformer, with every kind of calibration.

    Without a graph, which takes seconds, torch serves it.
    """
    # The export takes seconds and is cached; further options of an export cannot be keys of a cache.
    exported = _exported.__wrapped__ if export else _exported
    made = exported(
        seed, classes, residual_weight, metadata, json.dumps(OPTIONS if options is None else options), architecture,
        graph, **export,
    )  # fmt: skip
    shutil.copytree(made.path, out, dirs_exist_ok=True)
    (out / CONFIG).unlink()
    if receipt:
        write_json(out / RECEIPT, receipt.to_dict())
    return seal(out, replace(made.config, evidence=made.config.evidence | {"run_id": run_id}))


@cache
def _exported(
    seed: int,
    classes: tuple[str, ...],
    residual_weight: float,
    metadata: Metadata | None,
    options: str,
    architecture: str,
    graph: bool,
    **export: Any,
) -> Bundle:
    inputs, network = metadata or Metadata(), json.loads(options)
    rejection = Rejection(threshold=1.0, scale=0.5, residual_weight=residual_weight)
    alarm = Alarm(("MEL", "BCC", "SCC"), 60, (Promise(0.9, 0.3, 0.2),))
    calibration = Calibration(0.7, rejection, Conformal(0.9, dict.fromkeys(KNOWN_CODES, 0.8)), alarm)
    evidence = {"dataset_fingerprint": "sha256:test", "metrics": {"balanced_accuracy": 0.125}}
    config = BundleConfig(
        MODEL_NAME, architecture, network, classes, Preprocessing(IMAGE_SIZE), calibration, evidence, metadata=inputs
    )
    backbone = tiny_backbone(len(classes), architecture, network, seed=seed, metadata_width=len(inputs.columns))
    with nullcontext() if graph else patch("handlers.graph_export.export_graph", side_effect=RuntimeError("no graph")):
        return export_bundle(Path(mkdtemp(dir=PLACE.name)) / "bundle", backbone, config, NOTHING_SEEN, **export)
