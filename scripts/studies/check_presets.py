"""Run every preset at a small size, from training to an exported bundle, and print a table.

Each preset of training/configs, except that of a study, is trained from scratch for three epochs on a few hundred
images at a small input, and exported. Its Grad-CAM is compared with the grad-cam package. This shows that each preset
works, not how good it gets.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from handlers.bundle import Bundle
from handlers.errors import UserError
from handlers.files import write_json
from handlers.receipt import SEEN_SPLITS
from handlers.serving_graph import serving_module
from mlflow_tracking.command_line import console, run
from training.backbone_check import nearest_size
from training.checkpoints import LAST, load
from training.config import PRESETS, ROOT, load_config
from training.data.image_cache import build_cache
from training.data.manifest import read_manifest, write_manifest

EXAMPLES = [
    "python scripts/studies/check_presets.py --data data/manifest.csv --out runs/presets --preset resnet18",
    "python scripts/studies/check_presets.py --data data/manifest.csv --out runs/presets",
]
# No averaging, long warm-up or balancing, so that the loss shows the effect of a hundred steps.
SETTINGS = (
    "pretrained=false", "epochs=3", "batch_size=16", "lr=2e-4", "warmup_epochs=0.2", "ema_decay=0", "bootstrap=0",
    "sampler_power=0", "label_smoothing=0", "patience=0",
)  # fmt: skip
HELD_OUT = "held_out"  # the preset of scripts/studies/unknowns.py
IMAGES = {"train": 520, "val": 150, "calibration": 60, "test": 60}


class CheckError(UserError):
    """A preset does not do what it should."""


def served_presets() -> list[str]:
    """Return the presets whose models are for serving."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != HELD_OUT)


def small_manifest(data: Path, out: Path) -> Path:
    """Write a manifest with IMAGES of each split of `data`, those with the smallest hashes."""
    frame = read_manifest(data).sort_values("sha256")
    rows = [frame[frame["split"] == split].head(count) for split, count in IMAGES.items()]
    write_manifest(out / "manifest.csv", pd.concat(rows))
    return out / "manifest.csv"


def train(preset: str, manifest: Path, folder: Path, size: int) -> dict[str, Any]:
    """Return validation loss by epoch and seconds an epoch; train first, at about `size` pixels, if there is no bundle.

    Raises:
        CheckError: the training failed.
        CheckpointError: the last checkpoint of the folder cannot be read.
    """
    if not (folder / "bundle").is_dir():
        size = nearest_size(load_config(preset, [f"image_size={size}", f"cache_size={size}"])) or size
        settings = [f"manifest={manifest}", f"image_size={size}", f"cache_size={size}", f"output={folder}", *SETTINGS]
        command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", preset, *settings]
        if subprocess.run(command, check=False).returncode:
            raise CheckError(f"The training of {preset} failed. Its messages are above.")
    history = load(folder / LAST)["history"]
    return {
        "val_loss": [row["val_loss"] for row in history],
        "seconds": float(np.mean([row["seconds"] for row in history])),
    }


def gradcam_difference(bundle: Bundle, rows: pd.DataFrame, cache: Path) -> float:
    """Return the largest difference from the maps of the grad-cam package, both scaled to [0, 1]."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from handlers.gradcam import TappedBackbone

    module = serving_module(bundle)
    tapped = TappedBackbone(module.cam.backbone)
    pixels = torch.tensor(np.asarray(build_cache(rows, bundle.config.preprocessing, cache)))
    images = module.images(pixels)
    logits, maps, _ = (tensor.detach() for tensor in module.cam(images, torch.full((len(images),), -1)))
    with GradCAM(tapped, [tapped.layer], reshape_transform=tapped.channels_first) as reference:
        # The package enlarges its map to the image; a map of the same size keeps the comparison exact.
        reference.get_target_width_height = lambda images: (maps.shape[2], maps.shape[1])
        expected = torch.tensor(reference(images, [ClassifierOutputTarget(int(k)) for k in logits.argmax(1)]))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return float(((maps - low) / (high - low + 1e-7) - expected).abs().max())


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| preset | parameters | input | s an epoch | validation loss | served by | Grad-CAM |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in table.items():
        losses = " → ".join(f"{loss:.3f}" for loss in row["val_loss"])
        lines.append(
            f"| `{name}` | {row['parameters'] / 1e6:.1f} M | {row['image_size']} px | {row['seconds']:.0f} | {losses} "
            f"| {row['runtime']} | {row['gradcam']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[Path, typer.Option(help="A manifest.csv with images of all classes.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, presets.json and presets.md.")],
    preset: Annotated[
        list[str] | None, typer.Option(help=f"A preset; repeat for more. Default: all except {HELD_OUT}.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the input in pixels, for presets that are not trained yet.")] = 64,
) -> None:
    """Run every preset at a small size, from training to an exported bundle, and print a table."""
    names = preset or served_presets()
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        load_config(name)  # a wrong preset is reported before the work
    manifest = small_manifest(data, out.resolve())
    frame = read_manifest(manifest)
    rows = frame[~frame["split"].isin(SEEN_SPLITS)].head(8).reset_index(drop=True)
    for name in names:
        figures = train(name, manifest, out.resolve() / name, size)
        bundle = Bundle.load(out / name / "bundle")
        table[name] = figures | {
            "parameters": sum(p.numel() for p in serving_module(bundle).parameters()),
            "image_size": bundle.config.preprocessing.image_size,
            "runtime": bundle.config.runtime,
            "gradcam": gradcam_difference(bundle, rows, out / "cache"),
        }
        write_json(out / "presets.json", table)
        (out / "presets.md").write_text(markdown(table), encoding="utf-8")
    console.print(markdown(table))
    if worse := [name for name, row in table.items() if row["val_loss"][-1] >= row["val_loss"][0]]:
        raise CheckError(f"The validation loss did not fall: {', '.join(worse)}.")


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
