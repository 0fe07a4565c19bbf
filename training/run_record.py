"""What a run leaves behind while it trains: checkpoints in its folder, and its MLflow run."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch

from mlflow_tracking.command_line import console
from mlflow_tracking.runs import Tracker, choose_store, code_revision
from training.checkpoints import BEST, LAST, TrainingState, save
from training.config import TrainConfig
from training.interruption import Interrupted, Interruption
from training.ranks import RankError, is_rank_error
from training.validation import describe_epoch


class RunRecord:
    """The checkpoints and the MLflow run. As a context it ends the MLflow run if training fails or is interrupted.

    Args:
        output: the run's folder.
        header: what every checkpoint holds besides the state.
        tracker: None in all processes but rank 0, which alone writes.
    """

    def __init__(
        self,
        output: Path,
        state: TrainingState,
        header: dict[str, Any],
        tracker: Tracker | None,
        interruption: Interruption,
    ) -> None:
        self.output, self.state, self.tracker, self.interruption = output, state, tracker, interruption
        self.header = header | ({"mlflow": {"uri": tracker.uri, "run_id": tracker.run_id}} if tracker else {})

    def save_last(self) -> None:
        """Write the checkpoint to resume from."""
        if self.tracker:
            save(self.output / LAST, self.header | self.state.to_dict())

    def add_epoch(self, figures: dict[str, float], config: TrainConfig) -> None:
        """Write, log and print an epoch; its weights, too, if they are the best so far."""
        state = self.state
        is_best = state.add_epoch(figures, config.monitor)
        if is_best and self.tracker:
            best = {"weights": state.ema.module.state_dict(), "best": state.best, "metrics": state.history[-1]}
            save(self.output / BEST, self.header | best)
        if self.tracker:
            self.tracker.epoch(state.epoch, figures)
        self.save_last()
        console.print(describe_epoch(state.history[-1], config.epochs) + ("  *" if is_best else ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error and self.tracker:
            self.tracker.end("KILLED" if self.interruption.number else "FAILED")
        last = self.output / LAST
        if isinstance(error, Interrupted):
            raise Interrupted(
                error.number,
                f"Interrupted after {self.state.epoch} whole epochs. "
                f"Resume with `python training/train.py --resume {last}`.",
            ) from None
        if is_rank_error(error):
            raise RankError(
                f"Another process of this run has ended, after {self.state.epoch} whole epochs. Resume with "
                f"`torchrun training/train.py --resume {last}` and any number of processes."
            ) from None


def start_tracking(
    config: TrainConfig,
    output: Path,
    checkpoint: dict[str, Any] | None,
    frame: pd.DataFrame,
    dataset_fingerprint: str,
    device: torch.device,
) -> Tracker:
    """Start the MLflow run, or continue the checkpoint's run. Raises SettingsError, TrackingError."""
    previous = checkpoint["mlflow"] if checkpoint else {"uri": "", "run_id": ""}
    uri, notice = choose_store(output, previous["uri"])
    if notice:
        console.print(notice)
    tracker = Tracker(uri, lambda text: console.print(text, style="yellow"))
    tags = {"code_revision": code_revision(), "device": str(device)}
    tracker.start(config.experiment, config.name, config.to_dict(), previous["run_id"], tags)
    tracker.dataset(frame, Path(config.manifest), dataset_fingerprint)
    console.print(f"Output {output}, run {tracker.url or tracker.run_id}")
    return tracker
