"""What the registry tells about a version: tags for programs, a description for people, requirements for MLflow."""

from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import Any

from handlers.bundle import Bundle
from handlers.predictor import Predictor
from handlers.taxonomy import CODES

# The (name, type) of a registered model's inputs, and of its outputs.
Signature = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]
# What the registered model needs to run; torch only where there is no exported graph.
_SERVING = ("mlflow", "numpy", "opencv-python-headless", "openvino", "pandas", "pillow")
_EAGER = ("safetensors", "timm", "torch", "torchvision")


def tags(bundle: Bundle) -> dict[str, str]:
    """The tags of a new version: what it is, where it comes from, and that it still gives its golden answers."""
    config, evidence = bundle.config, bundle.config.evidence
    metrics: Mapping[str, Any] = evidence.get("metrics") or {}
    always = {
        "digest": bundle.digest,
        "architecture": config.architecture,
        "image_size": str(config.preprocessing.image_size),
        "classes": " ".join(config.classes),
        "runtime": config.runtime,
        "golden": golden_result(bundle),
    }
    optional = {
        "balanced_accuracy": balanced_accuracy(metrics),
        "dataset_fingerprint": evidence.get("dataset_fingerprint"),
        "code_revision": evidence.get("code_revision"),
        "training_run": evidence.get("run_id"),
    }
    return always | {name: str(value) for name, value in optional.items() if value is not None}


def balanced_accuracy(metrics: Mapping[str, Any]) -> str | None:
    """Balanced accuracy among a bundle's metrics: on the test split, else on the validation split, else on any."""
    for place in (metrics.get("test"), metrics.get("val"), metrics):
        value = place.get("balanced_accuracy") if isinstance(place, Mapping) else None
        if isinstance(value, int | float):
            return f"{value:.4f}"
    return None


def signature_types(bundle: Bundle) -> Signature:
    """The (name, type) of what the registered model takes and gives, in MLflow's words; all but the image may be left
    out."""
    metadata = ((name, "double" if name == "age" else "string") for name in bundle.config.metadata.fields)
    return (("image", "binary"), *metadata), tuple((code, "double") for code in CODES)


def golden_result(bundle: Bundle) -> str:
    """How the bundle does on its golden images on this machine, in the precision that it would serve in."""
    predictor = Predictor(bundle)
    worst, precision = predictor.golden_difference(), predictor.runtime.precision
    cases = bundle.golden()
    images = len({case.name for case in cases})
    # A model that takes metadata is asked about each image with and without.
    asked = f"{images} images" if images == len(cases) else f"{images} images in {len(cases)} cases"
    return f"{asked}, probabilities within {worst:.1e} in {precision}"


def description(bundle: Bundle) -> str:
    """What a person reads in MLflow's page about a version (Markdown)."""
    config, evidence = bundle.config, bundle.config.evidence
    accuracy = balanced_accuracy(evidence.get("metrics") or {})
    lines = [
        f"**{config.architecture}**, {config.preprocessing.image_size} px, {len(config.classes)} classes"
        f" ({', '.join(config.classes)}); research use only, not a medical device.",
        f"Beside the picture it takes {', '.join(config.metadata.fields)}." if config.metadata.fields else "",
        f"Balanced accuracy: {accuracy}." if accuracy else "",
        f"Trained on data set `{evidence['dataset_fingerprint']}`." if evidence.get("dataset_fingerprint") else "",
        "The alias `champion` on this version makes TorchServe serve it.",
    ]
    return "\n\n".join(line for line in lines if line)


def requirements(bundle: Bundle) -> list[str]:
    """Pinned packages to run the registered model: the ones it was checked with just now."""
    names = _SERVING if bundle.has_graph else (*_SERVING, *_EAGER)
    # A local version such as +cpu names one index's build, which other machines may not have.
    return [f"{name}=={installed(name).split('+')[0]}" for name in names]
