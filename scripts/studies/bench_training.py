"""Compare the speed of the training step by the source of its batches.

The same step (augmentation, forward, backward, optimiser) reads random tensors from memory, the image cache as
training/train.py does, and a plain torchvision ImageFolder that decodes with PIL in worker processes. The rounds
alternate, so that other load on the machine affects all three; compare the ratios of the medians.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from handlers.backbone import build_backbone
from mlflow_tracking.command_line import console, run, table
from training.config import TrainConfig, load_config
from training.data.augmentation import Augment
from training.data.batches import Images, batches, classes_in, epoch_order, even_batches, load_split
from training.data.draws import Draws
from training.data.image_cache import DataError
from training.data.manifest import read_manifest
from training.losses import ClassificationLoss
from training.precision import choose_precision
from training.recipe import choose_device, forward, make_optimizer
from training.training_data import training_preprocessing

Batches = Generator[tuple[Tensor, Tensor], None, None]


class TrainingStep:
    """One training step of a configuration.

    Augmentation, forward, backward and optimiser as in training/train.py, without mixing, focal loss, class weights,
    metadata, the moving average of the weights and fp16's loss scaling.
    """

    def __init__(self, config: TrainConfig, classes: int) -> None:
        self.device = choose_device(config.device)
        model = build_backbone(config.architecture, classes, config.image_size, options=config.options)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).train()
        self.precision, _ = choose_precision(config, self.model, self.device, {})
        self.optimizer = make_optimizer(self.model, config)
        self.criterion = ClassificationLoss(label_smoothing=config.label_smoothing)
        self.augment = Augment(config, config.preprocessing)
        self.seed = config.seed

    def __call__(self, pixels: Tensor, labels: Tensor) -> None:
        images = self.augment(pixels.to(self.device), Draws((self.seed,), len(pixels)))
        logits = forward(self.model, images, self.precision)
        self.optimizer.zero_grad()
        self.criterion(logits, labels.to(self.device)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def time_steps(step: TrainingStep, source: Batches, steps: int, batch_size: int) -> float:
    """Return images per second over `steps` batches, after one that is not timed."""
    step(*next(source))
    began = time.perf_counter()
    for _ in range(steps):
        step(*next(source))
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - began)


def from_memory(batch: int, side: int, classes: int) -> Batches:
    """Yield one random batch repeatedly."""
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    labels = torch.randint(0, classes, (batch,))
    while True:
        yield pixels, labels


def from_cache(images: Images, batch: int, device: torch.device, seed: int) -> Batches:
    """Yield whole batches of a shuffled epoch, as training reads them."""
    order = epoch_order(np.full(len(images), 1 / len(images)), seed, 0)
    order = np.resize(order, max(len(order), 10_000 * batch))
    for pixels, labels, _ in batches(images, even_batches(order, batch), device):
        yield pixels, labels


def from_files(root: Path, side: int, batch: int, workers: int) -> Batches:
    """Yield batches of a plain ImageFolder; PIL decodes and resizes in worker processes."""
    transform = v2.Compose([v2.Resize((side, side)), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(str(root), transform), batch, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        for images, labels in loader:
            yield images.permute(0, 2, 3, 1), labels


def main(
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data.py writes it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as for train.py.")
    ] = None,
    config: Annotated[str, typer.Option(help="A preset of training/configs by name, or a YAML file.")] = "demo_vit",
    steps: Annotated[int, typer.Option(min=1, help="Batches per round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each source.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes of the ImageFolder.")] = os.cpu_count() or 1,
) -> None:
    """Compare the speed of the training step by the source of its batches: memory, image cache, ImageFolder."""
    settings = load_config(config, overrides or (), {"manifest": str(data)})
    frame = read_manifest(data)
    classes = classes_in(frame)
    preprocessing = training_preprocessing(settings)
    folder = Path(settings.cache_dir) if settings.cache_dir else data.parent / "cache"
    images = load_split(frame, "train", classes, preprocessing, folder)
    if len(images) < settings.batch_size:
        raise DataError(f"{data} has {len(images)} training images. Set batch_size={len(images)} or less.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    step = TrainingStep(settings, len(classes))
    side, batch = preprocessing.image_size, settings.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        training = frame[frame["split"] == "train"]
        for label, path, name in zip(training["label"], training["path"], training["image_id"], strict=True):
            (Path(temporary) / label).mkdir(exist_ok=True)
            (Path(temporary) / label / f"{name}{Path(path).suffix}").symlink_to(path)
        sources: dict[str, Callable[[], Batches]] = {
            "random tensors": lambda: from_memory(batch, side, len(classes)),
            "cache": lambda: from_cache(images, batch, step.device, settings.seed),
            "ImageFolder": lambda: from_files(Path(temporary), side, batch, workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(rounds):
            for name, open_source in sources.items():
                # Closed after each round: a loader's workers must not fetch ahead while another is timed.
                with closing(open_source()) as source:
                    rates[name].append(time_steps(step, source, steps, batch))
    best = statistics.median(rates["random tensors"])
    grid = table("", ("batches from", "images/s, median", "range", "of random tensors"))
    for name, values in rates.items():
        median = statistics.median(values)
        grid.add_row(name, f"{median:.1f}", f"{min(values):.1f} to {max(values):.1f}", f"{median / best:.3f}")
    load = os.getloadavg()[0]
    console.print(f"{settings.architecture}, {settings.image_size} px, batch {batch}, {step.device}, load {load:.1f}")
    console.print(grid)


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/studies/bench_training.py --data data/manifest.csv --config demo_vit",
            "python scripts/studies/bench_training.py --data data/manifest.csv --config resnet18 image_size=128",
        ],
    )
