"""Does the loader ever limit training? Images per second of the training step, fed in three ways, in one run.

The same loop (augmentation, forward, backward, optimiser) takes its
batches from random tensors that are there already, from the cache as
training/train.py does, and from a plain torchvision ImageFolder that
decodes with PIL in worker processes. The rounds alternate, so that
whatever else the machine does falls on all three; the ratio of the
medians is what counts.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from handlers.backbone import build_backbone
from mlflow_tracking.command_line import console, errors
from training.config import ConfigError, TrainConfig, load_config
from training.data.augmentation import Augment
from training.data.batches import Images, batches, classes_in, epoch_order, load_split
from training.data.image_cache import DataError
from training.data.manifest import ManifestError, read_manifest
from training.losses import ClassificationLoss
from training.recipe import attention_kernel, choose_device, make_optimizer
from training.training_data import training_preprocessing

EPILOG = """
Examples:

  python scripts/studies/bench_training.py --data data/manifest.csv --config demo_vit

  python scripts/studies/bench_training.py --data data/manifest.csv --config resnet18 pretrained=false image_size=128
"""
Batches = Generator[tuple[Tensor, Tensor], None, None]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Step:
    """One training step of a configuration: augmentation, forward, backward and optimiser as in training/train.py,
    without mixing, focal loss, class weights, metadata, the moving average of the weights and fp16's loss scaling."""

    def __init__(self, config: TrainConfig, classes: int) -> None:
        self.device, self.precision = choose_device(config.device, config.precision)
        model = build_backbone(config.architecture, classes, config.image_size, options=config.options)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, config)
        self.criterion = ClassificationLoss(label_smoothing=config.label_smoothing)
        self.augment = Augment(config, config.preprocessing)
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, pixels: Tensor, labels: Tensor) -> None:
        images = self.augment(pixels.to(self.device), self.generator).contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)
        with autocast, attention_kernel(self.device):
            logits = self.model(images)
        self.optimizer.zero_grad()
        self.criterion(logits, labels.to(self.device)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def time_steps(step: Step, source: Batches, steps: int, batch_size: int) -> float:
    """Images per second over `steps` batches, after one that is not timed."""
    step(*next(source))
    began = time.perf_counter()
    for _ in range(steps):
        step(*next(source))
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - began)


def from_memory(batch: int, side: int, classes: int) -> Batches:
    """The same random batch again and again."""
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    labels = torch.randint(0, classes, (batch,))
    while True:
        yield pixels, labels


def from_cache(images: Images, batch: int, device: torch.device, seed: int) -> Batches:
    """As training reads: whole batches of a shuffled epoch."""
    order = epoch_order(images.labels, seed, 0)
    for pixels, labels, _ in batches(images, np.resize(order, max(len(order), 10_000 * batch)), batch, device):
        yield pixels, labels


def from_files(root: Path, side: int, batch: int, workers: int) -> Batches:
    """A plain ImageFolder: PIL decodes and resizes in worker processes."""
    transform = v2.Compose([v2.Resize((side, side)), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(str(root), transform), batch, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        for images, labels in loader:
            yield images.permute(0, 2, 3, 1), labels


@app.command(help=__doc__, epilog=EPILOG)
def bench(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings, as for train.py."),
    data: Path = typer.Option(..., help="A manifest.csv, as prepare_data writes it."),
    config: str = typer.Option("demo_vit", help="A preset of training/configs by name, or a YAML file."),
    steps: int = typer.Option(20, min=1, help="Batches a round."),
    rounds: int = typer.Option(5, min=1, help="Rounds of each of the three."),
    workers: int = typer.Option(os.cpu_count() or 1, min=0, help="Processes of the ImageFolder's loader."),
) -> None:
    try:
        settings = load_config(config, overrides or (), {"manifest": str(data)})
        frame = read_manifest(data)
        classes = classes_in(frame)
        preprocessing = training_preprocessing(settings)
        folder = Path(settings.cache_dir) if settings.cache_dir else data.parent / "cache"
        images = load_split(frame, "train", classes, preprocessing, folder)
        if len(images) < settings.batch_size:
            raise DataError(
                f"{data} has {len(images)} training images, fewer than a batch of {settings.batch_size}; "
                "give a smaller batch_size=."
            )
        step = Step(settings, len(classes))
    except (ConfigError, DataError, ManifestError) as error:
        errors.print(str(error))
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    if settings.threads:
        torch.set_num_threads(settings.threads)
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
    table = Table("batches from", "images/s (median)", "least to most", "of random tensors")
    for name, values in rates.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.1f}", f"{min(values):.1f} to {max(values):.1f}", f"{median / best:.3f}")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    console.print(f"{settings.architecture}, {settings.image_size} px, batch {batch}, {step.device}{load}")
    console.print(table)


if __name__ == "__main__":
    app()
