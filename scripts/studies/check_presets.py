"""Run every preset for real, at a size that a small machine can bear, and print a table of what came of it.

Each preset of training/configs, but for held_out, which only a study
trains, is trained from scratch for three epochs on a few hundred images at
a small input, exported, and its Grad-CAM held against the grad-cam
package. With --promote it is also registered in the running stack,
promoted by the alias champion, and asked over REST; the golden answers
must come back. What is shown is that each preset works, not how good it
gets.
"""

import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer

from handlers.bundle import Bundle
from handlers.errors import UserError
from handlers.files import write_json
from handlers.receipt import SEEN_SPLITS
from handlers.serving_graph import serving_module
from mlflow_tracking.command_line import console, errors
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable
from mlflow_tracking.settings import Settings
from training.checkpoints import LAST, CheckpointError, load
from training.config import PRESETS, ROOT, ConfigError, load_config
from training.data.image_cache import build_cache
from training.data.manifest import COLUMNS, ManifestError, read_manifest

EPILOG = """
Examples:

  python scripts/studies/check_presets.py --data data/manifest.csv --out runs/presets --preset resnet18 --preset vit_small

  python scripts/studies/check_presets.py --data data/manifest.csv --out runs/presets --promote
"""
# No averaging, no long warm-up, no balancing: a hundred steps are all there is, and the loss should show what they do.
SETTINGS = (
    "pretrained=false", "epochs=3", "batch_size=16", "lr=2e-4", "warmup_epochs=0.2", "ema_decay=0", "bootstrap=0",
    "sampler_power=0", "label_smoothing=0", "patience=0",
)  # fmt: skip
HELD_OUT = "held_out"  # of the study scripts/studies/unknowns.py
IMAGES = {"train": 520, "val": 150, "calibration": 60, "test": 60}
PROMOTION_SECONDS = 180
TOLERANCE = 0.02  # of a golden probability over REST, where the graph may compute in bf16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class CheckError(UserError):
    """A preset that does not do what it should, with a sentence saying what."""


def served_presets() -> list[str]:
    """The presets whose models are for serving: all but that of the study."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != HELD_OUT)


def small_manifest(data: Path, out: Path) -> Path:
    """A manifest of IMAGES of each split of `data`: those with the smallest hashes."""
    frame = read_manifest(data).sort_values("sha256")
    parts = [frame[frame["split"] == split].head(count) for split, count in IMAGES.items()]
    rows = pd.concat(parts)
    out.mkdir(parents=True, exist_ok=True)
    rows.assign(image=rows["path"])[list(COLUMNS)].to_csv(out / "manifest.csv", index=False)
    return out / "manifest.csv"


def train(preset: str, manifest: Path, folder: Path, size: int) -> dict[str, Any]:
    """Train a preset unless `folder` holds its bundle; loss on validation by epoch, seconds an epoch.

    Raises:
        CheckError: the training failed.
        CheckpointError: the folder's last checkpoint cannot be read.
    """
    if not (folder / "bundle").is_dir():
        settings = [f"manifest={manifest}", f"image_size={size}", f"cache_size={size}", f"output={folder}", *SETTINGS]
        command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", preset, *settings]
        if subprocess.run(command, check=False).returncode:
            raise CheckError(f"{preset} was not trained; the reason is above.")
    history = load(folder / LAST)["history"]
    return {
        "val_loss": [row["val_loss"] for row in history],
        "seconds": float(np.mean([row["seconds"] for row in history])),
    }


def gradcam_difference(bundle: Bundle, rows: pd.DataFrame, cache: Path) -> float:
    """Largest difference to the grad-cam package's maps, both scaled to [0, 1]: the same weights and images."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from handlers.gradcam import target_layer

    module = serving_module(bundle)
    backbone: Any = module.cam.backbone
    pixels = torch.tensor(np.asarray(build_cache(rows, bundle.config.preprocessing, cache)))
    images = module.images(pixels)
    logits, maps, _ = (tensor.detach() for tensor in module.cam(images, torch.full((len(images),), -1)))

    def to_grid(tokens: torch.Tensor) -> torch.Tensor:
        patches = tokens[:, backbone.num_prefix_tokens :]
        return patches.unflatten(1, backbone.patch_embed.grid_size).permute(0, 3, 1, 2)

    transform = to_grid if hasattr(backbone, "patch_embed") else None
    with GradCAM(backbone, [target_layer(backbone)], reshape_transform=transform) as reference:
        # The package enlarges its map to the image; a map of the same size keeps the comparison exact.
        reference.get_target_width_height = lambda images: (maps.shape[2], maps.shape[1])
        expected = torch.tensor(reference(images, [ClassifierOutputTarget(int(k)) for k in logits.argmax(1)]))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return float(((maps - low) / (high - low + 1e-7) - expected).abs().max())


def promote(bundle: Bundle, settings: Settings) -> float:
    """Register, promote and ask over REST; the largest difference of a golden probability. Raises CheckError."""
    command = [sys.executable, str(ROOT / "scripts" / "register_model.py"), "--bundle", str(bundle.path)]
    if subprocess.run([*command, "--alias", "champion"], check=False, stdout=subprocess.DEVNULL).returncode:
        raise CheckError("The stack did not register it; is it running (`make up`)?")
    cases = [case for case in bundle.golden() if not case.metadata]
    end = time.monotonic() + PROMOTION_SECONDS
    with closing(TorchServe(settings.inference_url, settings.management)) as server:
        while time.monotonic() < end:
            # TorchServe may start anew, a worker be loading: what counts is what answers in the end.
            with suppress(TorchServeUnavailable, TorchServeError):
                version = server.default()
                answers = [server.predict(case.image, version) for case in cases] if version else []
                if answers and all(answer["model"]["digest"] == bundle.digest for answer in answers):
                    pairs = zip(cases, answers, strict=True)
                    difference = float(np.max([case.difference(answer["probabilities"]) for case, answer in pairs]))
                    if not difference <= TOLERANCE:  # so that NaN differs
                        raise CheckError(f"The served answers differ from the golden ones by {difference:.3f}.")
                    return difference
            time.sleep(1)
    raise CheckError(f"It was not served within {PROMOTION_SECONDS} s; `python scripts/promote.py status` shows why.")


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| preset | parameters | input | s an epoch | validation loss | served by | Grad-CAM | REST |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in table.items():
        losses = " → ".join(f"{loss:.3f}" for loss in row["val_loss"])
        rest = "" if row["rest"] is None else f"{row['rest']:.4f}"
        lines.append(
            f"| `{name}` | {row['parameters'] / 1e6:.1f} M | {row['image_size']} px | {row['seconds']:.0f} | {losses} "
            f"| {row['runtime']} | {row['gradcam']:.0e} | {rest} |"
        )
    return "\n".join(lines) + "\n"


@app.command(help=__doc__, epilog=EPILOG)
def check(
    data: Path = typer.Option(..., help="A manifest.csv with images of all classes."),
    out: Path = typer.Option(..., help="Folder for the runs, presets.json and presets.md."),
    preset: list[str] = typer.Option([], help=f"A preset; repeat for more. Default: all but {HELD_OUT}."),
    size: int = typer.Option(64, help="Side of the input, pixels, of presets that are yet to be trained."),
    to_stack: bool = typer.Option(False, "--promote", help="Also promote each in the running stack, and ask it."),
) -> None:
    names = preset or served_presets()
    table: dict[str, dict[str, Any]] = {}
    try:
        settings = Settings.load()  # a wrong one is told before the work, not after it; so is a preset
        for name in names:
            load_config(name)
        manifest = small_manifest(data, out.resolve())
        frame = read_manifest(manifest)
        rows = frame[~frame["split"].isin(SEEN_SPLITS)].head(8).reset_index(drop=True)
        for name in names:
            figures = train(name, manifest, out.resolve() / name, size)
            bundle = Bundle.load(out / name / "bundle")
            module = serving_module(bundle)
            table[name] = figures | {
                "parameters": sum(p.numel() for p in module.parameters()),
                "image_size": bundle.config.preprocessing.image_size,
                "runtime": bundle.config.runtime,
                "gradcam": gradcam_difference(bundle, rows, out / "cache"),
                "rest": promote(bundle, settings) if to_stack else None,
            }
            write_json(out / "presets.json", table)
            (out / "presets.md").write_text(markdown(table), encoding="utf-8")
    except ConfigError as error:
        errors.print(str(error))
        raise SystemExit(2) from None
    except (ManifestError, CheckError, CheckpointError, ValueError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None
    console.print(markdown(table))
    worse = [name for name, row in table.items() if row["val_loss"][-1] >= row["val_loss"][0]]
    if worse:
        errors.print(f"The validation loss did not fall: {', '.join(worse)}.")
        raise SystemExit(1)


if __name__ == "__main__":
    app()
