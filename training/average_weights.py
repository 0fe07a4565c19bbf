"""Average the weights of runs that went on from one bundle, and of that bundle: `python training/average_weights.py`.

The average is often better than each of them, also on pictures from elsewhere (Wortsman et al. 2022, "Model soups").
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from handlers.errors import UserError
from mlflow_tracking.command_line import console, run
from training.checkpoints import BEST, LAST, find, load, save
from training.config import TrainConfig, load_config
from training.data.batches import load_split
from training.early_stopping import score
from training.evaluation.network_outputs import outputs_of
from training.initial_weights import InitialWeights
from training.losses import prior_logits
from training.recipe import choose_device, make_model
from training.training_data import open_manifest
from training.validation import validation_figures


class AverageError(UserError):
    """Runs whose weights cannot be averaged."""


def mean_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor. Counters, which are integers, are those of the first state."""
    first = states[0]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def check_runs(checkpoints: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Raise AverageError unless all runs fit the network, and have the same classes, data and initial bundle."""
    first = checkpoints[0]
    if not first["initial"]:
        raise AverageError("The first run has no initial_bundle. Only runs that went on from one bundle fit together.")
    for checkpoint in checkpoints:
        same = all(first[key] == checkpoint[key] for key in ("classes", "dataset_fingerprint"))
        if not same or (checkpoint["initial"] or {}).get("digest") != first["initial"]["digest"]:
            raise AverageError(
                "The runs differ in classes, manifest or initial_bundle. Average runs that agree in them."
            )
        if shapes(checkpoint["ema"]) != shapes(model.state_dict()):
            raise AverageError("A run has another network than these settings. Average runs of one network.")


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor."""
    return {name: tensor.shape for name, tensor in state.items()}


def validate(config: TrainConfig, model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation figures of a network."""
    manifest, classes = Path(config.manifest), checkpoint["classes"]
    cache = Path(config.cache_dir) if config.cache_dir else manifest.parent / "cache"
    frame = open_manifest(config, resumed=True)
    images = load_split(frame, "val", classes, config.preprocessing, cache, metadata=config.metadata_inputs)
    device = choose_device(config.device)
    outputs = outputs_of(model.to(device), images, config.batch_size, config.preprocessing, device)
    prior = prior_logits(checkpoint["class_shares"], config.logit_adjustment)
    return validation_figures(images.labels, outputs.logits - prior, classes)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the new run.")],
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="Folders of runs, then settings that change.")
    ],
) -> None:
    """Average the weights of runs and of the bundle that all of them started from.

    The averaged (EMA) weights of each run's last epoch count as much as the bundle's. The new run's folder gets them as
    its only epoch, with the settings of the first run. Calibrate, evaluate and export them with `train.py --resume`.
    """
    overrides = [argument for argument in arguments if "=" in argument]
    checkpoints = [load(find(Path(argument))) for argument in arguments if "=" not in argument]
    if not checkpoints:
        raise AverageError("No run is named. Name the folders of the runs to average.")
    if (output / LAST).exists():
        raise AverageError(f"{output} holds a run already; choose another --output.")
    first = checkpoints[0]
    config = load_config(None, overrides, {"output": str(output), "epochs": 1}, first["config"])
    model = make_model(config, len(first["classes"]))
    check_runs(checkpoints, model)
    initial = InitialWeights.read(config.initial_bundle)
    if initial.bundle.digest != first["initial"]["digest"]:
        raise AverageError(f"The runs did not start from the present {config.initial_bundle}. Restore that bundle.")
    if heads := initial.put_into(model, tuple(first["classes"]), config.metadata_inputs):
        raise AverageError(f"{config.initial_bundle} has no weights for {', '.join(heads)}: the runs have new heads.")
    weights = mean_weights([model.state_dict(), *(checkpoint["ema"] for checkpoint in checkpoints)])
    model.load_state_dict(weights)
    figures = validate(config, model.eval(), first)
    row: dict[str, float] = {"epoch": 1, "train_loss": float("nan"), "lr": 0.0, "seconds": 0.0, **figures}
    console.print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    best = {"epoch": 1, "score": score(figures, config.monitor)}
    header = first | {"config": config.to_dict(), "mlflow": {"uri": "", "run_id": ""}}  # train.py starts an MLflow run
    state = {"model": weights, "ema": weights, "epoch": 1, "history": [row], "best": best}
    kept = {name: value for name, value in header.items() if name not in ("model", "ema", "optimizer", "scaler")}
    output.mkdir(parents=True, exist_ok=True)
    save(output / BEST, kept | {"weights": weights, "best": best, "metrics": row})
    save(output / LAST, header | state)
    console.print(f"Written: {output}. Next: python training/train.py --resume {output / LAST}")


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/average_weights.py runs/first runs/second --output runs/average",
            "python training/average_weights.py runs/first runs/second output_stride=16 --output runs/average",
        ],
    )
