"""Write a bundle's model for other runtimes: ONNX, or LiteRT for phones.

The file holds the whole serving graph: standardisation, network and Grad-CAM. `model.json` next to it describes the
preprocessing before it and the calibration after it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from handlers.bundle import Bundle
from handlers.errors import UserError
from handlers.files import write_json
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import console, run
from mlflow_tracking.stack_settings import ROOT

EXAMPLES = [
    "python scripts/export_model.py model_store/skin_vit --format onnx --out exported",
    "python scripts/export_model.py runs/NAME/bundle --format litert --out exported",
]
# A probability of a golden answer may differ by this much in another runtime, in fp32.
TOLERANCE = 1e-3
# The newest litert-torch needs a torch before 2.15.
LITERT = (
    "litert-torch==0.10.*",
    "ai-edge-litert==2.3.*",
    "torch==2.14.*",
    "timm==1.0.31",
    "safetensors",
    "numpy",
    "pillow",
)
NAMES = ("pixels", "target", "metadata")
OUTPUTS = ("logits", "gradcam", "residual")


class Format(StrEnum):
    """A file format, named as on the command line."""

    ONNX = "onnx"
    LITERT = "litert"


class ExportError(UserError):
    """A model that cannot be converted, or that answers differently after it."""


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle, such as model_store/skin_vit or runs/NAME/bundle.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and model.json.")],
    format: Annotated[Format, typer.Option(help="onnx: any batch size. litert: one picture at a time.")] = Format.ONNX,
) -> None:
    """Convert a bundle for other runtimes, and compare its answers there with the golden answers.

    LiteRT's converter runs in an environment of its own, which the first use downloads (about 2 GB).
    """
    source = Bundle.load(bundle)
    out.mkdir(parents=True, exist_ok=True)
    inputs = golden_inputs(source)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        draft = Path(temporary) / ("model.onnx" if format is Format.ONNX else "model.tflite")
        with console.status(f"Converting to {format} …"):
            convert = convert_onnx if format is Format.ONNX else convert_litert
            names, outputs = convert(source, inputs, draft)
        difference = largest_difference(source, outputs)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"A golden probability differs by {difference:.2g} in {format}, and {TOLERANCE:g} is allowed. "
                "Serve this model with OpenVINO or torch."
            )
        write_json(out / "model.json", describe(source, draft.name, names))
        draft.replace(out / draft.name)
    size = (out / draft.name).stat().st_size / 1e6
    console.print(f"{out / draft.name}: {size:.1f} MB; golden probabilities differ by at most {difference:.1e}.")


def golden_inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    """Return the golden pictures as the graph takes them: pixels (N, S, S, 3), target (N,), metadata (N, D) if any."""
    config, cases = bundle.config, bundle.golden()
    inputs = {
        "pixels": np.stack([config.preprocessing(case.image)[0] for case in cases]),
        "target": np.full(len(cases), -1, np.int64),
    }
    if config.metadata.fields:
        inputs["metadata"] = np.stack([config.metadata.encode(case.metadata or {}) for case in cases])
    return inputs


def largest_difference(bundle: Bundle, outputs: Sequence[np.ndarray]) -> float:
    """Return the largest difference of a probability from the golden answers, for logits, maps and residuals."""
    logits, _, residuals = outputs
    probabilities = bundle.config.calibration.probabilities(logits, bundle.config.classes, residuals)
    expected = [[case.probabilities[code] for code in CODES] for case in bundle.golden()]
    return float(np.abs(probabilities - expected).max())


def convert_onnx(bundle: Bundle, inputs: dict[str, np.ndarray], path: Path) -> tuple[list[str], list[np.ndarray]]:
    """Write an ONNX model for any batch size; return its input names, and its outputs from ONNX Runtime."""
    import onnxruntime
    import torch

    from handlers.serving_graph import serving_module

    names = list(inputs)
    example = tuple(torch.from_numpy(array[:2]) for array in inputs.values())
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        # All inputs share the batch axis, whose name can stand once.
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        program = torch.onnx.export(
            serving_module(bundle),
            example,
            input_names=names,
            output_names=list(OUTPUTS),
            dynamic_shapes=tuple({0: batch} for _ in example),
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "dynamo returns a program"
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return names, session.run(list(OUTPUTS), inputs)


def convert_litert(bundle: Bundle, inputs: dict[str, np.ndarray], path: Path) -> tuple[list[str], list[np.ndarray]]:
    """Write a LiteRT model for one picture; return its input names, and its outputs from LiteRT's interpreter."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise ExportError("LiteRT's converter needs uv: `make env` installs it.")
    saved = path.with_name("inputs.npz")
    np.savez(saved, **inputs)  # type: ignore[arg-type]
    packages = [word for package in LITERT for word in ("--with", package)]
    command = [uv, "run", "--quiet", "--no-project", "--python", sys.executable, *packages, "python"]
    command += [str(ROOT / "scripts" / "litert_conversion.py"), str(bundle.path.resolve()), str(saved), str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"LiteRT's converter failed: {last}. Check the network, or use --format onnx.")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    outputs = [np.array(column, np.float32) for column in zip(*answer["outputs"], strict=True)]
    return [slot["name"] for slot in answer["inputs"]], outputs


def describe(bundle: Bundle, file: str, names: Sequence[str]) -> dict[str, Any]:
    """Return what an application needs around the model, as JSON values."""
    config = bundle.config
    size = config.preprocessing.image_size
    meanings = {
        "pixels": f"uint8 (N, {size}, {size}, 3): the whole picture, upright, sRGB, resized to a square as below",
        "target": "int64 (N,): index of the class for the heatmap; -1 for the most probable class",
        "metadata": "float32 (N, D): age, sex and site, encoded in the order of `metadata_columns`; zeros if unknown",
    }
    return {
        "file": file,
        "model": config.name,
        "digest": bundle.digest,
        "architecture": config.architecture,
        "classes": list(config.classes),
        "inputs": [
            {"name": name, "meaning": meanings[role]} for role, name in zip(NAMES[: len(names)], names, strict=True)
        ],
        "outputs": [
            {"name": OUTPUTS[0], "meaning": f"float32 (N, {len(config.classes)}), in the order of `classes`"},
            {"name": OUTPUTS[1], "meaning": "float32 (N, h, w): Grad-CAM over the whole picture, not normalised"},
            {"name": OUTPUTS[2], "meaning": "float32 (N,): for the probability of UNK"},
        ],
        "preprocessing": asdict(config.preprocessing),
        "metadata_columns": list(config.metadata.columns),
        "metadata": asdict(config.metadata),
        "calibration": asdict(config.calibration),
        "probabilities": [
            "lesions = the logits without that of UNK; outlier = the logit of UNK, or 0 if UNK is not in `classes`",
            "known = softmax(lesions / temperature)",
            "familiarity = logsumexp(lesions) - outlier - residual_weight * residual",
            "unknown = 1 / (1 + exp((familiarity - threshold) / scale)), with threshold and scale of `rejection`",
            "the nine probabilities: known * (1 - unknown) in the order of `classes` without UNK, and UNK = unknown",
        ],
        "disclaimer": "Research use only. Not a medical device.",
    }


if __name__ == "__main__":
    run(main, EXAMPLES)
