"""Write the bundle of a trained model: weights, calibration, evidence and golden answers, sealed by one digest.

Training calls `export_bundle` at its end. The command makes a slim copy of a bundle for a repository.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from safetensors.torch import save_file
from torch import nn

from handlers.bundle import (
    CONFIG,
    GOLDEN,
    GRAPH,
    GRAPH_WEIGHTS,
    RECEIPT,
    WEIGHTS,
    Bundle,
    BundleConfig,
    seal,
)
from handlers.files import new_folder, write_json
from handlers.graph_export import seal_with_graph
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import fingerprint
from handlers.receipt import Receipt
from handlers.reference import REFERENCE
from handlers.request import Request
from handlers.weights import BASIS, ORIGIN
from mlflow_tracking.command_line import console, run
from training.data.synthetic import draw_lesion
from training.evaluation.reference_fit import MIN_LESIONS, fit_reference
from training.evaluation.served_predictions import predict_rows
from training.evaluation.unknown_class_fit import KnownSpace

# Drawn pictures, one a class, which can be shipped without a licence.
GOLDEN_CODES = ("MEL", "NV", "BCC", "VASC")
# Their metadata, for a model that takes some. Each picture is also predicted without.
GOLDEN_METADATA: tuple[dict[str, Any], ...] = (
    {"age": 71.0, "sex": "male", "site": "head/neck"},
    {"age": 24.0, "sex": "female", "site": "posterior torso"},
    {"age": 85.0, "site": "upper extremity"},
    {"age": 5.0, "sex": "female"},
)


def export_bundle(
    out: Path,
    backbone: nn.Module,
    config: BundleConfig,
    receipt: Receipt,
    space: KnownSpace | None = None,
    reference_pictures: pd.DataFrame | None = None,
) -> Bundle:
    """Write the bundle of a trained backbone to the folder `out`, replacing a bundle that is there.

    Weights are stored in fp16. The golden answers are those of the stored weights.

    Args:
        backbone: from handlers.backbone.build_backbone, as `config` describes it.
        receipt: of the images that the model was made from.
        space: the known space that the calibration's rejection uses.
        reference_pictures: rows with path, lesion_id, split and metadata, for the reference of drift; without them, or
            with too few, the bundle has none.

    Raises:
        BundleError: `out` is something else, or the serving graph disagrees with the model.
        ManifestError: a picture of `reference_pictures` cannot be read.
    """
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    if space:  # in fp32: lengths are sums over many directions
        state[ORIGIN], state[BASIS] = (torch.tensor(a, dtype=torch.float32) for a in (space.origin, space.basis))
    with new_folder(out, CONFIG) as folder:
        save_file(state, folder / WEIGHTS)
        write_json(folder / RECEIPT, receipt.to_dict())
        draft = Bundle.draft(folder, config)
        _write_golden(draft)
        if reference_pictures is not None:
            write_reference(draft, reference_pictures)
        sealed = seal_with_graph(draft)
    return replace(sealed, path=out)


def write_reference(draft: Bundle, pictures: pd.DataFrame) -> None:
    """Predict the pictures and write their reference into the draft, unless they show too few lesions."""
    if pictures["lesion_id"].nunique() < MIN_LESIONS:
        console.print(
            f"There are fewer than {MIN_LESIONS} lesions for a reference, so the monitor cannot see drift for this "
            "model.",
            style="yellow",
        )
        return
    predictor = Predictor(draft, runtime="torch", precision="f32")
    predictions = predict_rows(predictor, pictures, label="reference")
    is_calibration = bool((pictures["split"] == "calibration").all())
    reference = fit_reference(predictions, pictures["lesion_id"].tolist(), is_calibration)
    write_json(draft.path / REFERENCE, reference.to_dict())


def slim(source: Path, out: Path) -> Bundle:
    """Copy a bundle without its serving graph, which registration derives from the weights, and without its run id.

    The copy is for other registries, which do not know the run. Raises BundleError.
    """
    bundle = Bundle.load(source)
    config = replace(bundle.config, runtime="", evidence={**bundle.config.evidence, "run_id": None})
    with new_folder(out, CONFIG) as folder:
        bundle.copy_files(folder, GRAPH, GRAPH_WEIGHTS)
        sealed = seal(folder, config)
    return replace(sealed, path=out)


def _write_golden(draft: Bundle) -> None:
    """Draw the golden pictures and keep the eager fp32 model's answers to them."""
    config, folder = draft.config, draft.path
    (folder / "golden").mkdir()
    names = []
    for seed, code in enumerate(GOLDEN_CODES):
        name = f"golden/{code}.jpg"
        buffer = io.BytesIO()
        draw_lesion(seed, code, size=(320, 240)).save(buffer, "JPEG", quality=90)
        (folder / name).write_bytes(buffer.getvalue())
        names.append(name)
    predictor = Predictor(draft, runtime="torch", precision="f32")
    inputs: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names]
    if fields := config.metadata.fields:
        for name, metadata in zip(names, GOLDEN_METADATA, strict=True):
            if values := {field: metadata[field] for field in fields if field in metadata}:
                inputs.append((name, values))
    answers = predictor.predict([Request((folder / name).read_bytes(), metadata=values) for name, values in inputs])
    cases = []
    for (name, values), answer in zip(inputs, answers, strict=True):
        if not isinstance(answer, Prediction):
            raise answer
        pixels, _ = config.preprocessing((folder / name).read_bytes())
        colours = fingerprint(pixels).round(2).tolist()
        case = {"name": name, "probabilities": answer.probabilities, "grid": answer.grid, "colours": colours}
        cases.append(case | ({"metadata": values} if values else {}))
    write_json(folder / GOLDEN, cases)


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle, such as runs/NAME/bundle.")],
    out: Annotated[Path, typer.Argument(help="Folder of the copy.")],
) -> None:
    """Copy a bundle without its serving graph, which registration makes again, so that a repository can hold it."""
    copy = slim(bundle, out)
    size = sum(file["bytes"] for file in copy.files.values()) / 1e6
    console.print(f"{out}: {size:.1f} MB, {copy.digest}")


if __name__ == "__main__":
    run(main, examples=["python training/export.py runs/NAME/bundle model_store/skin_vit"])
