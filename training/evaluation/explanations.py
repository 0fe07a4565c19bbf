"""Check whether a model's heatmaps can be trusted.

`python training/evaluation/explanations.py --bundle DIR --data MANIFEST --out DIR` makes four checks. Does the map
depend on what was learnt (Adebayo et al. 2018, "Sanity Checks for Saliency Maps")? Does hiding the marked cells change
the prediction more than hiding others (deletion; Petsiuk et al. 2018, "RISE")? Does the map point at the lesion? How
much heat lies on the border of the picture, where there is rarely a lesion?
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from handlers.bundle import Bundle, BundleError
from handlers.calibration import split_logits
from handlers.files import write_json
from handlers.runtimes import TorchRuntime
from mlflow_tracking.command_line import console, run
from training.data.image_cache import build_cache
from training.data.manifest import fingerprint
from training.evaluation.command_options import (
    AllowOverlapOption,
    BundleOption,
    ManifestOption,
    OutOption,
    SplitOption,
    known_lesions,
)
from training.evaluation.figures import deletion_figure
from training.evaluation.leakage import check_overlap
from training.evaluation.lesion_masks import pointing

BATCH = 64
SEED = 0  # of the shuffled weights and the random order
STEPS = 10  # of the deletion: a tenth of the cells at a time
BLUR = 0.08  # sigma of the blur of hidden cells, as a share of the side: it keeps colours and removes structure


def check_heatmaps(bundle: Bundle, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Make all checks on pixels (N, S, S, 3), with each image explained for its own top diagnosis.

    Returns `randomised` {shuffled part: mean rank correlation with the true maps}, `deletion` {order: mean probability
    of the top class after 0, 1, ..., STEPS tenths are hidden}, `deletion_area` (their means), `pointing`
    (training.evaluation.lesion_masks), `border` (share of the
    heat in the outermost cells), `border_cells` (their share of the grid), and `empty`: the share of images whose map
    is zero everywhere, which the other figures leave out.

    Raises:
        BundleError: the weights do not fit, or every map is zero everywhere.
    """
    rng = np.random.default_rng(SEED)
    runtime = TorchRuntime(bundle)
    logits, _ = _run(runtime, pixels, np.full(len(pixels), -1))
    targets = split_logits(logits, bundle.config.classes)[0].argmax(1)  # as served: a diagnosis, never UNK
    _, maps = _run(runtime, pixels, targets)
    full = maps.max((1, 2)) > 0
    if not full.any():
        raise BundleError(
            f"Every heatmap of {bundle.path} is empty, so there is nothing to check; train the model for longer."
        )
    kept, chosen, heat = pixels[full], targets[full], maps[full]

    randomised = {}
    for name in ("head", "all"):
        _, other = _run(_shuffled(bundle, name, SEED), kept, chosen)
        randomised[name] = _correlation(heat, other)

    noise = rng.random(heat.shape)
    orders = {"hottest first": heat + 1e-9 * noise, "random": noise, "coldest first": -heat + 1e-9 * noise}
    deletion = {name: _deletion(runtime, bundle, kept, chosen, order) for name, order in orders.items()}

    inner = np.zeros(heat.shape[1:], bool)
    inner[1:-1, 1:-1] = True
    share = heat[:, ~inner].sum(1) / heat.sum((1, 2))
    return {
        "images": len(pixels),
        "empty": float(1 - full.mean()),
        "randomised": randomised,
        "deletion": deletion,
        "deletion_area": {name: float(np.mean(curve)) for name, curve in deletion.items()},
        "pointing": pointing(heat, kept),
        "border": float(share.mean()),
        "border_cells": float((~inner).mean()),
    }


def _run(
    runtime: TorchRuntime, pixels: NDArray[np.uint8], targets: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    parts = [
        runtime(pixels[start : start + BATCH], targets[start : start + BATCH]) for start in range(0, len(pixels), BATCH)
    ]
    return np.concatenate([logits for logits, _, _ in parts]), np.concatenate([maps for _, maps, _ in parts])


def _shuffled(bundle: Bundle, part_name: str, seed: int) -> TorchRuntime:
    """Return the model with the values inside each weight tensor shuffled, of the "head" or of "all" parts."""
    runtime = TorchRuntime(bundle)
    generator = torch.Generator().manual_seed(seed)
    backbone: Any = runtime.module.cam.backbone
    part: nn.Module = backbone.get_classifier() if part_name == "head" else backbone
    with torch.no_grad():
        for parameter in part.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return runtime


def _correlation(maps: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Return the mean rank correlation of the maps, over images where neither map is flat; 0 if there is none."""
    pairs = [(a.ravel(), b.ravel()) for a, b in zip(maps, others, strict=True) if np.ptp(a) > 0 and np.ptp(b) > 0]
    return float(np.mean([spearmanr(a, b).statistic for a, b in pairs])) if pairs else 0.0


def _deletion(
    runtime: TorchRuntime,
    bundle: Bundle,
    pixels: NDArray[np.uint8],
    targets: NDArray[np.int64],
    priority: NDArray[np.float64],
) -> list[float]:
    """Return the mean probability of `targets` after each tenth of the cells is blurred, by `priority` (N, h, w)."""
    size = pixels.shape[1]
    blurred = np.stack([cv2.GaussianBlur(picture, (0, 0), BLUR * size) for picture in pixels])
    rank = (-priority).reshape(len(pixels), -1).argsort(1).argsort(1).reshape(priority.shape)
    cells = rank[0].size
    fine = np.stack([cv2.resize(r.astype(np.float32), (size, size), interpolation=cv2.INTER_NEAREST) for r in rank])
    curve = []
    for step in range(STEPS + 1):
        hidden = (fine < step * cells / STEPS)[..., None]
        logits, _ = _run(runtime, np.where(hidden, blurred, pixels), targets)
        lesion_logits, _ = split_logits(logits, bundle.config.classes)
        probabilities = bundle.config.calibration.known_probabilities(lesion_logits)
        curve.append(float(probabilities[np.arange(len(targets)), targets].mean()))
    return curve


def main(
    bundle: BundleOption,
    data: ManifestOption,
    out: OutOption,
    split: SplitOption = "test",
    most: Annotated[int, typer.Option(min=1, help="Largest number of images; those with the smallest hashes.")] = 300,
    allow_overlap: AllowOverlapOption = False,
) -> None:
    """Check a model's heatmaps: shuffled weights, deletion curves, the lesion, heat on the border.

    Writes explanations.json and the deletion curves. Images that the model was made from are refused.
    """
    rows = known_lesions(data, split).sort_values("sha256").head(most).reset_index(drop=True)
    overlap = check_overlap(bundle, rows, allow_overlap)
    loaded = Bundle.load(bundle)
    with tempfile.TemporaryDirectory() as cache:  # decoded images of patients, which must not stay in `out`
        table = check_heatmaps(loaded, np.asarray(build_cache(rows, loaded.config.preprocessing, Path(cache))))
    out.mkdir(parents=True, exist_ok=True)
    header = {"bundle": loaded.digest, "data": fingerprint(rows), "split": split, "overlap": overlap}
    write_json(out / "explanations.json", header | table)
    deletion_figure(table["deletion"]).savefig(out / "deletion.png", dpi=110)
    show(table)
    console.print(f"{table['images']:,} images. Written to {out}.")


def show(table: dict[str, Any]) -> None:
    """Print the figures."""
    shown = Table("check", "figure")
    for part, value in table["randomised"].items():
        shown.add_row(f"rank correlation with the map after shuffling {part}", f"{value:.3f}")
    for name, value in table["deletion_area"].items():
        shown.add_row(f"mean probability while cells are hidden, {name}", f"{value:.3f}")
    game = table["pointing"]
    if game["images"]:
        shown.add_row(f"hottest cell on the lesion, {game['images']} plain pictures", f"{game['hit']:.3f}")
        shown.add_row("a random cell on the lesion", f"{game['chance']:.3f}")
        shown.add_row("the middle of the picture on the lesion", f"{game['centre']:.3f}")
        shown.add_row("share of the heat on the lesion", f"{game['heat_inside']:.3f}")
    shown.add_row(
        f"share of the heat on the border ({table['border_cells']:.0%} of the cells)", f"{table['border']:.3f}"
    )
    shown.add_row("share of empty maps", f"{table['empty']:.3f}")
    console.print(shown)


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/evaluation/explanations.py --bundle model_store/skin_vit --data data/manifest.csv "
            "--out runs/evaluation"
        ],
    )
