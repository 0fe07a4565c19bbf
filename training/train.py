"""Train a classifier of skin lesions: `python training/train.py [--config PRESET] [key=value ...]`.

One loop, to be read from top to bottom: settings, data, model, epochs, and then calibration, evaluation and the
bundle. An epoch depends on nothing but its number, the seed and the checkpoint before it, so a resumed run goes on
exactly as an uninterrupted one would have.
"""

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from scipy.special import softmax
from timm.utils import ModelEmaV3
from torch import nn

from handlers.backbone import BackboneError, build_backbone, fuse
from handlers.bundle import BundleError
from handlers.errors import UserError
from handlers.gradcam import grad_cam
from handlers.preprocessing import Preprocessing
from mlflow_tracking import metrics
from mlflow_tracking.command_line import console, errors, progress_bar
from mlflow_tracking.runs import Tracker, TrackingError, choose_store, code_revision
from mlflow_tracking.settings import SettingsError
from training.checkpoints import BEST, LAST, CheckpointError, find, load, restore, save
from training.config import DEFAULT_PRESET, ROOT, ConfigError, TrainConfig, load_config
from training.data.augmentation import Augment
from training.data.batches import Images, batches, classes_in, epoch_order, load_split, withhold
from training.data.image_cache import DataError
from training.data.manifest import ManifestError, build_manifest, fingerprint, read_manifest
from training.evaluation.network_outputs import predict
from training.finish import AFTER_EPOCHS, finish
from training.initial_weights import InitialWeights
from training.losses import ClassificationLoss, class_weights, prior_logits
from training.recipe import (
    attention_kernel,
    choose_device,
    heads_of,
    learning_rate,
    make_mix,
    make_optimizer,
    seed_everything,
    set_trainable,
)


class TrainingError(UserError):
    """A run that cannot go on, with a sentence saying why."""


class Interrupted(Exception):
    """SIGINT or SIGTERM was received; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number


class Interruption:
    """From `watch` on, turns the first SIGINT or SIGTERM into an exception at the next `check`; the second one acts at
    once."""

    def __init__(self) -> None:
        self.number = 0

    def watch(self) -> None:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number:
            raise Interrupted(self.number)


def train(config: TrainConfig, output: Path, checkpoint: dict[str, Any] | None, stop: Interruption) -> None:
    """Train, or go on from a checkpoint; then calibrate, evaluate and export to `output`/bundle.

    Raises:
        ConfigError: this machine does not have the device.
        ManifestError, DataError: the images cannot be used, are of one class, or `initial_bundle` has learnt from some
            that would judge.
        BackboneError, BundleError: the network or `initial_bundle` cannot be used.
        CheckpointError: `checkpoint` is of another network.
        SettingsError, TrackingError: MLflow cannot be logged to.
        TrainingError: the checkpoint is of other data or weights, or the loss is no number.
        Interrupted: a signal came before the first epoch.
        SystemExit: a signal came later; with 128 and its number.
    """
    device, precision = choose_device(config.device, config.precision)
    if config.threads:
        torch.set_num_threads(config.threads)

    # ---- data and model
    frame = open_manifest(config, checkpoint is not None)
    stop.watch()  # not before, as nothing in there asks `check`
    data_id, classes = fingerprint(frame), classes_in(frame)
    if len(classes) == 1:
        raise DataError(f"All training images in {config.manifest} are {classes[0]}: add images of another class.")
    if checkpoint and checkpoint["dataset_fingerprint"] != data_id:
        raise TrainingError(f"{config.manifest} has changed since this run began; start a new run.")
    if checkpoint and config.initial_bundle != checkpoint["config"].get("initial_bundle", ""):
        raise TrainingError("A resumed run has its weights already; start a new run from that initial_bundle.")
    initial = InitialWeights.read(config.initial_bundle) if config.initial_bundle and not checkpoint else None
    if initial:
        initial.check(frame, data_id)
    # Before the images are decoded, since pretrained weights may be out of reach. A checkpoint brings its own.
    seed_everything(config.seed, 0)
    pretrained = config.pretrained and checkpoint is None
    inputs = config.metadata_inputs
    model = build_backbone(
        config.architecture, len(classes), config.image_size, pretrained, config.options, len(inputs.columns)
    )
    try_explaining(model, config)
    # What frozen epochs train: the heads that begin anew, or all of them where none does.
    heads: list[str] = (checkpoint or {}).get("heads", heads_of(model))
    if initial and (anew := initial.put_into(model, classes, inputs)):
        heads = anew
        console.print(
            f"Of {config.initial_bundle}, all but the {' and the '.join(anew)} is used: its classes or inputs "
            "are others."
        )
    output.mkdir(parents=True, exist_ok=True)  # before the images are decoded, as it may not be allowed
    data = load_data(config, frame, classes, stop)
    counts = np.bincount(data["train"].labels, minlength=len(classes))
    steps = max(1, len(data["train"]) // config.batch_size)

    # ---- what moves the model
    model.to(device).to(memory_format=torch.channels_last)
    # Warm-up keeps the average from remembering the random start: timm's decay at step s is 1 - s^(-2/3) until that
    # reaches ema_decay, which for 0.999 takes 31,600 steps.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    weights = class_weights(counts.tolist(), config.class_weight_power) if config.class_weight_power else None
    gamma = config.focal_gamma if config.loss == "focal" else 0.0
    criterion = ClassificationLoss(weights, config.label_smoothing, gamma).to(device)
    prior = prior_logits(counts.tolist(), config.logit_adjustment)
    augment, mix = Augment(config, config.preprocessing), make_mix(config, len(classes))

    start = 0
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    if checkpoint:
        start, history, best = restore(checkpoint, model, ema, optimizer, scaler)
        if best:  # by what is watched now
            best = {"epoch": best["epoch"], "score": score_of(history[best["epoch"] - 1], config)}

    # ---- the run
    left = start < config.epochs and not (best and waited_enough(best, start, config))
    if checkpoint and not left:  # what only the epochs would have read is as they had it
        config = config.model_copy(update={k: v for k, v in checkpoint["config"].items() if k not in AFTER_EPOCHS})
        console.print(f"{start} epochs are done, none is left; only calibration, evaluation and bundle are made again.")
    remembered = checkpoint["mlflow"] if checkpoint else {"uri": "", "run_id": ""}
    uri, notice = choose_store(output, remembered["uri"])
    if notice:
        console.print(notice)
    tracker = Tracker(uri, lambda text: console.print(text, style="yellow"))
    tags = {"code_revision": code_revision(), "device": str(device)}
    tracker.start(config.experiment, config.name, config.to_dict(), remembered["run_id"], tags)
    tracker.dataset(frame, Path(config.manifest), data_id)
    described: dict[str, Any] = {"config": config.to_dict(), "classes": list(classes), "dataset_fingerprint": data_id}
    described["heads"] = heads
    described["initial"] = initial.described() if initial else (checkpoint or {}).get("initial")
    described["mlflow"] = {"uri": tracker.uri, "run_id": tracker.run_id}

    def save_last(epoch: int) -> None:
        state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"scaler": scaler.state_dict(), "epoch": epoch, "history": history, "best": best}
        save(output / LAST, described | state)

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{config.architecture}, {parameters:.1f} M parameters, {config.image_size} px, {len(classes)} classes, "
        f"{len(data['train']):,} training and {len(data['val']):,} validation images, {device}, "
        f"{str(precision).removeprefix('torch.')}; output {output}, run {tracker.url or tracker.run_id}"
    )

    try:
        if not checkpoint:
            save_last(0)  # so that a run killed in its first epoch can be resumed in the same MLflow run
        # ---- the loop
        for epoch in range(start, config.epochs if left else start):
            if best and waited_enough(best, epoch, config):
                console.print(f"Stopping early: nothing better since epoch {best['epoch']}.")
                break
            began = time.monotonic()
            generator = seed_everything(config.seed, epoch)
            order = epoch_order(data["train"].labels, config.seed, epoch, config.sampler_power)
            order = order[: steps * config.batch_size]  # whole batches: batch norm cannot take a batch of one
            set_trainable(model, heads if epoch < config.freeze_epochs else ())
            total = torch.zeros((), device=device)
            with progress_bar(f"epoch {epoch + 1}/{config.epochs}") as progress:
                for step, batch in enumerate(batches(data["train"], order, config.batch_size, device)):
                    lr = learning_rate(config, epoch * steps + step, steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    pixels, labels, metadata = batch
                    images, targets = mix(augment(pixels, generator), labels)
                    # A mixed picture is of no one patient: it is learnt from by itself, told nothing.
                    share = config.metadata_drop if targets.ndim == 1 else 1.0
                    told = withhold(metadata, inputs, share, generator)
                    autocast = torch.autocast(device.type, precision, enabled=precision is not torch.float32)
                    with autocast, attention_kernel(device):
                        logits = fuse(model, model(images.contiguous(memory_format=torch.channels_last)), told)
                    loss = criterion(logits, targets)
                    optimizer.zero_grad()
                    scaler.scale(loss).backward()
                    if config.grad_clip:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                    scaler.step(optimizer)
                    scaler.update()
                    ema.update(model, step=epoch * steps + step)
                    total += loss.detach()
                    progress(step + 1, steps)
                    stop.check()
            train_loss = total.item() / steps
            if not math.isfinite(train_loss):
                raise TrainingError(f"The loss is {train_loss} in epoch {epoch + 1}; try a lower lr or precision=fp32.")

            found = predict(ema.module, data["val"], config.batch_size, config.preprocessing, device, precision)
            judged = validation(data["val"].labels, found - prior)
            row = {"epoch": epoch + 1, "train_loss": train_loss, "lr": lr, **judged}
            row["seconds"] = time.monotonic() - began
            history.append(row)
            score = score_of(row, config)
            improved = best is None or score > best["score"]
            if improved:
                best = {"epoch": epoch + 1, "score": score}
                save(output / BEST, described | {"weights": ema.module.state_dict(), "best": best, "metrics": row})
            tracker.epoch(epoch + 1, {key: value for key, value in row.items() if key != "epoch"})
            save_last(epoch + 1)
            console.print(describe(row, config.epochs) + ("  *" if improved else ""))
            stop.check()

        finish(config, output, frame, data, device, tracker, stop.check)
    except Interrupted as interrupt:
        tracker.end("KILLED")
        console.print(
            f"Interrupted; {len(history)} whole epochs are kept. "
            f"To go on: python training/train.py --resume {output / LAST}"
        )
        raise SystemExit(128 + interrupt.number) from None
    except BaseException:
        tracker.end("KILLED" if stop.number else "FAILED")
        raise


def try_explaining(model: nn.Module, config: TrainConfig) -> None:
    """Have an empty picture classified and explained: what timm has and Grad-CAM does not know shows now, not after the
    last epoch. Raises BackboneError."""
    nothing = torch.zeros(1, 3, config.image_size, config.image_size)
    try:
        with torch.no_grad():
            grad_cam(model.eval())(nothing, torch.tensor([-1]))
    except Exception as error:  # timm's models fail in their own many ways
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BackboneError(
            f"{config.architecture} cannot be explained by Grad-CAM here ({reason[0][:200]}); choose a vision "
            "transformer, ResNet, EfficientNet or EfficientNetV2 of timm."
        ) from error


def open_manifest(config: TrainConfig, resumed: bool) -> pd.DataFrame:
    """The manifest. One that is not there is prepared from the data folder, but where it was named and the folder was
    not: the name may be mistyped, and other images in other splits another training.

    Raises:
        DataError: there is none, and no data to make it from; or the folder was named, and there is one that is not
            about it.
        ManifestError: it cannot be made or read.
    """
    manifest, folder, named = Path(config.manifest), Path(config.data_dir), config.model_fields_set
    if manifest.is_file() and not resumed and "data_dir" in named and "manifest" not in named:
        raise DataError(
            f"There is {manifest} already, and {folder} would not be read: leave data_dir out to train on what that "
            "holds, or name another manifest=FILE."
        )
    if not manifest.is_file():
        if resumed or ("manifest" in named and "data_dir" not in named):
            raise DataError(
                f"There is no manifest {manifest}; make it with python scripts/prepare_data.py --data DIR "
                f"--out {manifest}."
            )
        if not folder.is_dir() or not any(path for path in folder.iterdir() if not path.name.startswith(".")):
            raise DataError(
                f"There is no manifest {manifest} and no data in {folder}: put a data set there "
                "(README, 'Train on your own data'), or run python scripts/prepare_data.py --data DIR and give "
                "manifest=FILE."
            )
        with progress_bar("reading images") as progress:
            build_manifest([folder], manifest, progress=progress)
        console.print(f"Made {manifest} from {folder}.")
    return read_manifest(manifest)


def cache_preprocessing(config: TrainConfig) -> Preprocessing:
    """How training images are resized for the cache: a little larger than the input, where the settings say so."""
    return Preprocessing(config.cache_size or config.image_size)


def load_data(
    config: TrainConfig, frame: pd.DataFrame, classes: tuple[str, ...], stop: Interruption
) -> dict[str, Images]:
    """Every split that has images; the training split at the cache's size, the others as serving sees them.

    Raises:
        DataError: there is no image to train on or to validate with, one cannot be read, none has a known value of what
            the model is to take, or there is no room for the cache.
        Interrupted: a signal came.
    """
    manifest, serving, larger = Path(config.manifest), config.preprocessing, cache_preprocessing(config)
    cache = Path(config.cache_dir) if config.cache_dir else manifest.parent / "cache"
    inputs, training = config.metadata_inputs, frame[frame["split"] == "train"]
    for name in inputs.fields:
        if all(inputs.understood({name: value})[name] is None for value in training[name]):
            raise DataError(f"No training image in {manifest} has a known {name}; leave {name} out of metadata.")
    data = {}
    for split in ("train", "val", "calibration", "test"):
        if not (frame["split"] == split).any():
            if split in ("train", "val"):
                raise DataError(f"{manifest} has no images in the split {split!r}; prepare it again with more lesions.")
            continue
        with progress_bar(f"caching {split}") as draw:

            def progress(done: int, total: int) -> None:
                stop.check()
                draw(done, total)

            preprocessing = larger if split == "train" else serving
            data[split] = load_split(frame, split, classes, preprocessing, cache, progress, inputs)
    return data


def validation(labels: NDArray[np.int64], logits: NDArray[np.floating[Any]]) -> dict[str, float]:
    """The metrics of one epoch, over the images whose class has a logit."""
    known = labels >= 0
    y, p = labels[known], softmax(logits[known].astype(np.float64), axis=1)
    return {
        "val_loss": metrics.nll(y, p),
        "val_accuracy": metrics.accuracy(y, p),
        "val_balanced_accuracy": metrics.balanced_accuracy(y, p),
        "val_macro_f1": metrics.macro_f1(y, p),
        "val_macro_auc": metrics.macro_auc(y, p),
    }


def score_of(row: Mapping[str, float], config: TrainConfig) -> float:
    """What picks the best epoch, higher being better, of one epoch's figures."""
    return -row["val_loss"] if config.monitor == "loss" else row["val_balanced_accuracy"]


def waited_enough(best: Mapping[str, Any], done: int, config: TrainConfig) -> bool:
    """Whether so many epochs without a better one are done that the run stops early."""
    return bool(config.patience and done - best["epoch"] >= config.patience)


def describe(row: Mapping[str, float], epochs: int) -> str:
    """One line for one epoch."""
    return (
        f"epoch {row['epoch']:>3}/{epochs}  loss {row['train_loss']:.4f}  val {row['val_loss']:.4f}  "
        f"accuracy {row['val_accuracy']:.3f}  balanced {row['val_balanced_accuracy']:.3f}  "
        f"F1 {row['val_macro_f1']:.3f}  AUC {row['val_macro_auc']:.3f}  lr {row['lr']:.1e}  {row['seconds']:.0f} s"
    )


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
        int | None, typer.Option("--batch-size", "--batch_size", help="Images a step.", show_default="the preset's")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for checkpoints and bundle.", show_default="runs/NAME-TIME")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from a run's last.pt (or its folder).")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps.", show_default="the preset's, or auto")
    ] = None,
) -> None:
    """Train a classifier of skin lesions, and export it as a bundle.

    Without arguments: the preset vit_small on data/manifest.csv, which is prepared from data/ if it is not there.
    Every setting of training/config.py can be given as KEY=VALUE; those not given are the preset's, or those of the
    run that is resumed, or else the defaults that stand there.

    Examples:

    python training/train.py --config resnet18 --epochs 10

    python training/train.py --config vit_small pretrained=false image_size=128 lr=1e-3

    python training/train.py --resume runs/skin_vit-20260101-120000/last.pt
    """
    flags = {"epochs": epochs, "batch_size": batch_size, "output": output, "device": device}
    try:
        checkpoint = load(find(resume)) if resume else None
        preset = config if config or checkpoint else DEFAULT_PRESET
        base = checkpoint["config"] | {"output": str(find(resume).parent)} if resume and checkpoint else None
        settings = load_config(preset, overrides or (), flags, base)
        folder = Path(settings.output or ROOT / "runs" / time.strftime(f"{settings.name}-%Y%m%d-%H%M%S"))
        if resume and folder.resolve() != find(resume).parent.resolve():  # the best weights so far lie in the run's own
            raise ConfigError(f"A run goes on in its own folder, {find(resume).parent}; leave output={folder} out.")
        if not checkpoint and (folder / LAST).exists():
            raise ConfigError(
                f"{folder} holds a run already; add --resume {folder / LAST}, or choose another --output."
            )
        train(settings, folder, checkpoint, Interruption())
    except ConfigError as error:
        errors.print(str(error))
        raise SystemExit(2) from None
    except Interrupted as interrupt:
        console.print("Interrupted before training began.")
        raise SystemExit(128 + interrupt.number) from None
    except (
        BackboneError, BundleError, CheckpointError, DataError, ManifestError, SettingsError, TrackingError,
        TrainingError,
    ) as error:  # fmt: skip
        errors.print(str(error))
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)
