"""The card of a version in MLflow: tags for programs, a description for people, a signature, pinned requirements."""

from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import Any

from handlers.bundle import Bundle
from handlers.predictor import Predictor
from handlers.taxonomy import CODES

# The (name, type) of a registered model's inputs, and of its outputs.
Signature = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]
# Packages that run a registered model; a model without a serving graph also needs torch.
_SERVING = ("mlflow", "numpy", "opencv-python-headless", "openvino", "pandas", "pillow")
_EAGER = ("safetensors", "timm", "torch", "torchvision")


def tags(bundle: Bundle) -> dict[str, str]:
    """Return the tags of a new version: digest, architecture, evidence, and a check of its golden answers."""
    config, evidence = bundle.config, bundle.config.evidence
    values = {
        "digest": bundle.digest,
        "architecture": config.architecture,
        "image_size": config.preprocessing.image_size,
        "classes": " ".join(config.classes),
        "runtime": config.runtime,
        "golden": golden_result(bundle),
        "balanced_accuracy": balanced_accuracy(evidence.get("metrics") or {}),
        "dataset_fingerprint": evidence.get("dataset_fingerprint"),
        "code_revision": evidence.get("code_revision"),
        "training_run": evidence.get("run_id"),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def balanced_accuracy(metrics: Mapping[str, Any]) -> str | None:
    """Return balanced accuracy from a bundle's metrics: of the test split, else of validation, else at top level."""
    for figures in (metrics.get("test"), metrics.get("val"), metrics):
        value = figures.get("balanced_accuracy") if isinstance(figures, Mapping) else None
        if isinstance(value, int | float):
            return f"{value:.4f}"
    return None


def signature_types(bundle: Bundle) -> Signature:
    """Return the (name, type) of the inputs and outputs in MLflow's terms; only the image is required."""
    metadata = ((name, "double" if name == "age" else "string") for name in bundle.config.metadata.fields)
    return (("image", "binary"), *metadata), tuple((code, "double") for code in CODES)


def golden_result(bundle: Bundle) -> str:
    """Check the golden answers on this machine, in the precision of serving, and return the result in words."""
    predictor = Predictor(bundle)
    worst, precision = predictor.golden_difference(), predictor.runtime.precision
    return f"{len(bundle.golden())} golden answers, probabilities within {worst:.1e} in {precision}"


def description(bundle: Bundle) -> str:
    """Return the description on MLflow's page of the version (Markdown)."""
    config, evidence = bundle.config, bundle.config.evidence
    paragraphs = [
        f"**{config.architecture}**, {config.preprocessing.image_size} px, {len(config.classes)} classes"
        f" ({', '.join(config.classes)}). Research use only, not a medical device."
    ]
    if config.metadata.fields:
        paragraphs.append(f"Optional inputs next to the picture: {', '.join(config.metadata.fields)}.")
    if accuracy := balanced_accuracy(evidence.get("metrics") or {}):
        paragraphs.append(f"Balanced accuracy: {accuracy}.")
    if fingerprint := evidence.get("dataset_fingerprint"):
        paragraphs.append(f"Trained on data set `{fingerprint}`.")
    paragraphs.append("TorchServe serves the version that the alias `champion` points at.")
    return "\n\n".join(paragraphs)


def requirements(bundle: Bundle) -> list[str]:
    """Return pinned packages that run the registered model: the versions that have just checked it."""
    names = _SERVING if bundle.has_graph else (*_SERVING, *_EAGER)
    # A local version such as +cpu exists in one package index only.
    return [f"{name}=={installed(name).split('+')[0]}" for name in names]
