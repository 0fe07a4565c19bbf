"""Train a classifier of skin lesions: `python training/train.py [--config PRESET] [key=value ...]`.

`train` is the whole run, from top to bottom: data, model, optimiser, epochs, then calibration, evaluation and the
bundle. An epoch depends only on its number, the seed and the checkpoint before it, so a resumed run equals an
uninterrupted one.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from timm.utils import ModelEmaV3
from torch import nn

from handlers.backbone import PRETRAINED_STEMS, fuse
from handlers.errors import UserError
from handlers.taxonomy import UNKNOWN
from mlflow_tracking.command_line import console, progress_bar, run
from training.backbone_check import check_backbone
from training.checkpoints import LAST, TrainingState, find, load
from training.config import DEFAULT_PRESET, ROOT, ConfigError, TrainConfig, load_config
from training.data.augmentation import Augment
from training.data.batches import batches, drawn_shares, epoch_order, sampling_weights, withhold
from training.data.manifest import fingerprint
from training.data.outliers import Outliers
from training.evaluation.network_outputs import outputs_of
from training.finish import AFTER_EPOCHS, finish
from training.initial_weights import InitialWeights
from training.interruption import Interruption
from training.losses import prior_logits
from training.precision import choose_precision
from training.pretrained import find_pretrained
from training.recipe import (
    choose_device,
    forward,
    heads_of,
    learning_rate,
    make_loss,
    make_mix,
    make_model,
    make_optimizer,
    seed_everything,
    set_trainable,
)
from training.run_record import RunRecord, start_tracking
from training.training_data import classes_to_learn, load_splits, open_manifest
from training.validation import out_of_patience, validation_figures


class TrainingError(UserError):
    """A run that cannot go on."""


def train(config: TrainConfig, output: Path, checkpoint: dict[str, Any] | None, interruption: Interruption) -> None:
    """Train, or resume from a checkpoint; then calibrate, evaluate and export to `output`/bundle.

    Raises:
        UserError: of the data, the settings, the checkpoint or MLflow, before training begins.
        TrainingError: the loss is not finite.
        Interrupted: a signal was received.
    """
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)

    # ---- data, and a network with its first weights
    check_backbone(config)
    frame = open_manifest(config, resumed=checkpoint is not None)
    interruption.watch()  # only now: the making of a manifest never calls `check`
    classes = classes_to_learn(frame, config.manifest, config.outliers)
    dataset_fingerprint = fingerprint(frame)
    initial = initial_weights(config, checkpoint, frame, dataset_fingerprint)
    # Before the images are decoded, since pretrained weights may be out of reach.
    seed_everything(config.seed, 0)
    model, heads, origin = first_weights(config, classes, checkpoint, initial)
    output.mkdir(parents=True, exist_ok=True)
    data = load_splits(config, frame, classes, interruption.check)
    weights = sampling_weights(data["train"], config.sampler_power, config.sampler_groups == "source_and_class")
    shares = drawn_shares(data["train"].labels, weights, classes, config.outliers).tolist()
    steps = max(1, len(data["train"]) // config.batch_size)

    # ---- optimiser, loss, augmentation
    model.to(device).to(memory_format=torch.channels_last)
    precision, measured = choose_precision(config, model, device, (checkpoint or {}).get("measured_precision", {}))
    # Warm-up: without it the average would remember the random initial weights for thousands of steps.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    state = TrainingState(model, ema, make_optimizer(model, config), scaler)
    criterion = make_loss(config, shares).to(device)
    prior = prior_logits(shares, config.logit_adjustment)
    augment, mix = Augment(config, config.preprocessing), make_mix(config, len(classes))
    add_outliers = Outliers(config.outliers, classes.index(UNKNOWN)) if config.outliers else None
    if checkpoint:
        state.restore(checkpoint, config.monitor)
    last_epoch = state.epoch if out_of_patience(state.best, state.epoch, config.patience) else config.epochs
    if checkpoint and state.epoch >= last_epoch:  # settings that only epochs read stay as they were
        config = config.model_copy(update={k: v for k, v in checkpoint["config"].items() if k not in AFTER_EPOCHS})
        console.print(f"All {state.epoch} epochs are done; only calibration, evaluation and export are repeated.")
    console.print(f"{len(data['train']):,} training and {len(data['val']):,} validation images, {device}, {precision}")

    # ---- MLflow, and what every checkpoint holds besides the state
    tracker = start_tracking(config, output, checkpoint, frame, dataset_fingerprint, device)
    header: dict[str, Any] = {
        "config": config.to_dict(),
        "classes": list(classes),
        "dataset_fingerprint": dataset_fingerprint,
        "class_shares": shares,
        "heads": heads,
        "pretrained": origin,
        "measured_precision": measured,
        "initial": initial.to_dict() if initial else (checkpoint or {}).get("initial"),
    }
    with RunRecord(output, state, header, tracker, interruption) as record:
        if not checkpoint:
            record.save_last()  # a run killed in its first epoch can be resumed, too

        # ---- epochs
        for epoch in range(state.epoch, last_epoch):
            if out_of_patience(state.best, epoch, config.patience):
                console.print(f"Stopping early: no improvement in the last {config.patience} epochs.")
                break
            began = time.monotonic()
            generator = seed_everything(config.seed, epoch)
            order = epoch_order(weights, config.seed, epoch)
            order = order[: steps * config.batch_size]  # whole batches: batch norm cannot use a batch of one
            set_trainable(model, heads if epoch < config.freeze_epochs else (), config.frozen_stages)
            loss_sum = torch.zeros((), device=device)
            with progress_bar(f"epoch {epoch + 1}/{config.epochs}") as progress:
                for step, batch in enumerate(batches(data["train"], order, config.batch_size, device)):
                    pixels, labels, metadata = batch
                    if add_outliers:
                        pixels, labels = add_outliers(pixels, labels, generator)
                    images, targets = mix(augment(pixels, generator), labels)
                    # A mixed image belongs to no patient, so the model gets no metadata with it.
                    drop = config.metadata_drop if targets.ndim == 1 else 1.0
                    metadata = withhold(metadata, config.metadata_inputs, drop, generator)
                    loss = criterion(fuse(model, forward(model, images, precision), metadata), targets)
                    lr = learning_rate(config, epoch * steps + step, steps)
                    take_step(loss, state, lr, config.grad_clip)
                    ema.update(model, step=epoch * steps + step)
                    loss_sum += loss.detach()
                    progress(step + 1, steps)
                    interruption.check()
            train_loss = loss_sum.item() / steps
            if not math.isfinite(train_loss):
                raise TrainingError(f"The loss is {train_loss} in epoch {epoch + 1}; try a lower lr or precision=fp32.")

            # ---- validation and checkpoints
            outputs = outputs_of(ema.module, data["val"], config.batch_size, config.preprocessing, device, precision)
            figures = {"train_loss": train_loss, "lr": lr}
            figures |= validation_figures(outputs.labels, outputs.logits - prior, classes)
            record.add_epoch(figures | {"seconds": time.monotonic() - began}, config)
            interruption.check()

        finish(config, output, frame, data, device, tracker, interruption.check)


def initial_weights(
    config: TrainConfig, checkpoint: dict[str, Any] | None, frame: pd.DataFrame, dataset_fingerprint: str
) -> InitialWeights | None:
    """Return the weights of `initial_bundle` for a new run.

    Raises:
        TrainingError: the checkpoint's run cannot be resumed on this data or from these initial weights.
        UserError: the initial bundle cannot be used.
    """
    if checkpoint:
        if checkpoint["dataset_fingerprint"] != dataset_fingerprint:
            raise TrainingError(f"{config.manifest} has changed since this run began; start a new run.")
        if checkpoint["config"]["initial_bundle"] != config.initial_bundle:
            raise TrainingError("A resumed run has its weights already; start a new run to use another initial_bundle.")
    if checkpoint or not config.initial_bundle:
        return None
    initial = InitialWeights.read(config.initial_bundle)
    initial.check(frame, dataset_fingerprint)
    return initial


def first_weights(
    config: TrainConfig, classes: tuple[str, ...], checkpoint: dict[str, Any] | None, initial: InitialWeights | None
) -> tuple[nn.Module, list[str], str]:
    """Return the network before training, the names of the heads that frozen epochs train, and its weights' origin."""
    pretrained = None
    if config.pretrained and not checkpoint:
        architecture = PRETRAINED_STEMS.get(config.stem, config.architecture)
        console.print(f"Looking for pretrained weights of {architecture}; without a network this takes a minute.")
        pretrained = find_pretrained(architecture, config.pretrained_file)
        console.print(f"Pretrained weights: {pretrained.origin}")
    model = make_model(config, len(classes), pretrained)
    heads = checkpoint["heads"] if checkpoint else heads_of(model)
    if initial and (new_heads := initial.put_into(model, classes, config.metadata_inputs)):
        heads = new_heads
        console.print(f"Loaded {config.initial_bundle} except {', '.join(heads)}: its classes or inputs differ.")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{config.architecture}, {millions:.1f} M parameters, {config.image_size} px, {len(classes)} classes")
    return model, heads, pretrained.origin if pretrained else (checkpoint or {}).get("pretrained", "")


def take_step(loss: torch.Tensor, state: TrainingState, lr: float, grad_clip: float) -> None:
    """Update the model by the gradient of `loss`, with the norm limited to `grad_clip` (0: unlimited)."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    if grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="A preset of training/configs by name, or a YAML file.", show_default=DEFAULT_PRESET),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="the preset's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--batch_size", help="Images per step.", show_default="the preset's")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for checkpoints and bundle.", show_default="runs/NAME-TIME")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue from a run's last.pt or folder.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="the preset's, or auto")
    ] = None,
) -> None:
    """Train a classifier of skin lesions and export it as a bundle.

    Without arguments: the preset vit_small on data/manifest.csv, which is made from data/ if it is missing. Every
    setting of training/config.py can be written as KEY=VALUE. Other settings come from the preset or from the resumed
    run, or are the defaults.
    """
    checkpoint = load(find(resume)) if resume else None
    run_folder = find(resume).parent if resume else None
    flags = {"epochs": epochs, "batch_size": batch_size, "output": output, "device": device}
    base = checkpoint["config"] | {"output": str(run_folder)} if checkpoint else None
    settings = load_config(config or (None if checkpoint else DEFAULT_PRESET), overrides or (), flags, base)
    folder = Path(settings.output or ROOT / "runs" / time.strftime(f"{settings.name}-%Y%m%d-%H%M%S"))
    if run_folder and folder.resolve() != run_folder.resolve():  # the best weights so far are there
        raise ConfigError(f"The resumed run writes to its own folder {run_folder}; leave output={folder} out.")
    if not checkpoint and (folder / LAST).exists():
        raise ConfigError(f"{folder} holds a run already; add --resume {folder / LAST}, or choose another --output.")
    train(settings, folder, checkpoint, Interruption())


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/train.py --config resnet18 --epochs 10",
            "python training/train.py --config vit_small pretrained=false image_size=128 lr=1e-3",
            "python training/train.py --resume runs/skin_vit-20260101-120000/last.pt",
        ],
    )
