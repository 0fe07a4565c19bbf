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
from mlflow_tracking.command_line import console, progress_bar, run
from training.backbone_check import check_backbone
from training.checkpoints import LAST, TrainingState, find, load
from training.config import DEFAULT_PRESET, ROOT, ConfigError, TrainConfig, load_config
from training.data.batches import batches, drawn_shares, epoch_order, even_batches, sampling_weights
from training.data.draws import Draws
from training.data.manifest import fingerprint
from training.early_stopping import out_of_patience
from training.evaluation.network_outputs import outputs_of
from training.finish import AFTER_EPOCHS, finish
from training.initial_weights import InitialWeights
from training.interruption import Interruption
from training.losses import prior_logits
from training.precision import choose_precision
from training.pretrained import find_pretrained
from training.ranks import ALONE, Ranks, joined
from training.recipe import (
    choose_device,
    forward,
    heads_of,
    learning_rate,
    make_loss,
    make_model,
    make_optimizer,
    seed_everything,
    set_trainable,
)
from training.run_record import RunRecord, start_tracking
from training.training_data import classes_to_learn, load_splits, open_manifest
from training.training_views import TrainingViews
from training.validation import validation_figures


class TrainingError(UserError):
    """A run that cannot go on."""


def train(
    config: TrainConfig, output: Path, checkpoint: dict[str, Any] | None, stop: Interruption, ranks: Ranks = ALONE
) -> None:
    """Train, or resume from a checkpoint; then calibrate, evaluate and export to `output`/bundle.

    Raises:
        UserError: of the data, the settings, the checkpoint or MLflow, before training begins.
        TrainingError: the loss is not finite.
        Interrupted: a signal was received.
    """
    device = ranks.device(choose_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)

    # ---- data, and a network with its first weights
    check_backbone(config)
    frame = ranks.in_turn(lambda: open_manifest(config, resumed=checkpoint is not None))
    stop.watch()  # only now: the making of a manifest never calls `check`
    classes = classes_to_learn(frame, config.manifest, config.outliers)
    dataset_fingerprint = fingerprint(frame)
    initial = initial_weights(config, checkpoint, frame, dataset_fingerprint)
    # Before the images are decoded, since pretrained weights may be out of reach.
    seed_everything(config.seed, 0)
    model, heads, origin = first_weights(config, classes, checkpoint, initial)
    output.mkdir(parents=True, exist_ok=True)
    data = ranks.in_turn(lambda: load_splits(config, frame, classes, stop.check))
    ranks.check_sizes(len(data["train"]), len(data["val"]), config)
    weights = sampling_weights(data["train"], config.sampler_power, config.sampler_groups == "source_and_class")
    shares = drawn_shares(data["train"].labels, weights, classes, config.outliers).tolist()

    # ---- optimiser, loss, augmentation
    model.to(device).to(memory_format=torch.channels_last)
    measured = (checkpoint or {}).get("measured_precision", {})
    precision, measured = ranks.from_first(choose_precision(config, model, device, measured))
    model = ranks.prepared(model, config, device)
    # Warm-up: without it the average would remember the random initial weights for thousands of steps.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_power=config.ema_power)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    state = TrainingState(model, ema, make_optimizer(model, config), scaler)
    criterion = make_loss(config, shares).to(device)
    prior = prior_logits(shares, config.logit_adjustment)
    views = TrainingViews(config, classes)
    if checkpoint:
        state.restore(checkpoint, config.monitor)
    last_epoch = state.epoch if out_of_patience(state.best, state.epoch, config.patience) else config.epochs
    if checkpoint and state.epoch >= last_epoch:  # settings that only epochs read stay as they were
        config = config.model_copy(update={k: v for k, v in checkpoint["config"].items() if k not in AFTER_EPOCHS})
        console.print(f"All {state.epoch} epochs are done; only calibration, evaluation and export are repeated.")
    console.print(f"{len(data['train']):,} training and {len(data['val']):,} validation images, {device}, {precision}")

    # ---- MLflow, and what every checkpoint holds besides the state
    tracker = start_tracking(config, output, checkpoint, frame, dataset_fingerprint, device) if ranks.writes else None
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
    with RunRecord(output, state, header, tracker, stop) as record:
        if not checkpoint:
            record.save_last()  # a run killed in its first epoch can be resumed, too

        # ---- epochs
        for epoch in range(state.epoch, last_epoch):
            if out_of_patience(state.best, epoch, config.patience):
                console.print(f"Stopping early: no improvement in the last {config.patience} epochs.")
                break
            began = time.monotonic()
            seed_everything(config.seed, epoch, ranks.number)
            epoch_batches = even_batches(epoch_order(weights, config.seed, epoch), config.batch_size)
            parts, steps = ranks.parts(epoch_batches, config.accumulate), len(epoch_batches)
            set_trainable(model, heads if epoch < config.freeze_epochs else (), config.frozen_stages)
            network = ranks.connected(model)
            loss_sum = torch.zeros((), device=device)
            with progress_bar(f"epoch {epoch + 1}/{config.epochs}") as progress:
                part_batches = batches(data["train"], [part.images for part in parts], device)
                for part, batch in zip(parts, part_batches, strict=True):
                    draws = Draws((config.seed, epoch, part.step), len(part.batch), part.rows)
                    images, targets, metadata = views(*batch, draws)
                    ranks.average_gradients(network, now=part.is_last)
                    loss = criterion(fuse(model, forward(network, images, precision), metadata), targets) * part.share
                    state.scaler.scale(loss * ranks.count).backward()  # the processes' gradients are averaged
                    loss_sum += loss.detach()
                    if part.is_last:
                        lr = learning_rate(config, epoch * steps + part.step, steps)
                        take_step(state, lr, config.grad_clip)
                        ema.update(model, step=epoch * steps + part.step)
                        progress(part.step + 1, steps)
                        stop.check(ranks.largest)
            train_loss = ranks.sum(loss_sum).item() / steps
            if not math.isfinite(train_loss):
                raise TrainingError(f"The loss is {train_loss} in epoch {epoch + 1}; try a lower lr or precision=fp32.")

            # ---- validation and checkpoints
            ranks.average_buffers(model, ema.module)
            own = ranks.own(data["val"])
            outputs = outputs_of(ema.module, own, config.batch_size, config.preprocessing, device, precision)
            logits = ranks.gather(outputs.logits) - prior
            figures = {"train_loss": train_loss, "lr": lr} | validation_figures(data["val"].labels, logits, classes)
            record.add_epoch(figures | {"seconds": time.monotonic() - began}, config)
            stop.check(ranks.largest)

        ranks.part()
        if tracker:
            finish(config, output, frame, data, device, tracker, stop.check)


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
    initial.check(frame)
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


def take_step(state: TrainingState, lr: float, grad_clip: float) -> None:
    """Update the model by its gradients, with their norm limited to `grad_clip` (0: unlimited), and delete them."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()


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
    with joined() as ranks:
        checkpoint = load(find(resume)) if resume else None
        run_folder = find(resume).parent if resume else None
        flags = {"epochs": epochs, "batch_size": batch_size, "output": output, "device": device}
        base = checkpoint["config"] | {"output": str(run_folder)} if checkpoint else None
        settings = load_config(config or (None if checkpoint else DEFAULT_PRESET), overrides or (), flags, base)
        folder = Path(settings.output or ROOT / "runs" / time.strftime(f"{settings.name}-%Y%m%d-%H%M%S"))
        if run_folder and folder.resolve() != run_folder.resolve():  # the best weights so far are there
            raise ConfigError(f"The resumed run writes to its own folder {run_folder}; leave output={folder} out.")
        if not checkpoint and (folder / LAST).exists():
            raise ConfigError(
                f"{folder} holds a run already; add --resume {folder / LAST}, or choose another --output."
            )
        train(settings, ranks.from_first(folder), checkpoint, Interruption(), ranks)


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/train.py --config resnet18 --epochs 10",
            "python training/train.py --config vit_small pretrained=false image_size=128 lr=1e-3",
            "python training/train.py --resume runs/skin_vit-20260101-120000/last.pt",
        ],
    )
