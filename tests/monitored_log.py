"""A prediction log as TorchServe writes and rotates it, and a monitor that reads it, for tests."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from handlers.taxonomy import CODES
from mlflow_tracking.settings import Settings

NOW = datetime.now(UTC).timestamp()


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def prediction(request_id: str, seconds: float = NOW, code: str = "NV", version: str = "1", **fields: Any) -> bytes:
    """A prediction's line with probability 0.6 for `code`."""
    row = {
        "time": stamp(seconds), "request_id": request_id, "image_sha256": "0" * 64, "metadata_sent": [],
        "model": "skin_vit", "version": version, "digest": "sha256:1",
        "probabilities": {other: 0.6 if other == code else 0.05 for other in CODES},
        "entropy": 1.2, "set": ["NV", "MEL"], "flagged": False, "width": 600, "height": 450, "milliseconds": 20.0,
    } | fields  # fmt: skip
    return json.dumps(row).encode() + b"\n"


def refusal(request_id: str, seconds: float = NOW, code: str = "invalid_image", status: int = 400) -> bytes:
    row = {"time": stamp(seconds), "request_id": request_id, "version": "1", "code": code, "status": status}
    return json.dumps(row).encode() + b"\n"


def many(count: int, seconds: float = NOW, version: str = "1", seed: int = 0) -> bytes:
    """Lines of predictions, one each second up to `seconds`, with all classes and latencies of 10 to 100 ms."""
    rng = np.random.default_rng(seed)
    return b"".join(
        prediction(f"{version}-{seed}-{i}", seconds - count + i, CODES[rng.integers(len(CODES))], version,
                   milliseconds=float(rng.uniform(10, 100)), flagged=bool(rng.random() < 0.3))
        for i in range(count)
    )  # fmt: skip


class RotatedLog:
    """The log of a state folder."""

    def __init__(self, state: Path) -> None:
        self.path = state / "logs" / "predictions.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)

    def rotate(self) -> None:
        """Rename .8 to .9, …, .1 to .2, and the log to .1, as log4j2 does with fileIndex=min."""
        for number in range(8, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            if older.exists():
                older.rename(self.path.with_name(f"{self.path.name}.{number + 1}"))
        if self.path.exists():
            self.path.rename(self.path.with_name(f"{self.path.name}.1"))


def settings_of(state: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, stack_state=state, model_store=state / "store", **values)  # type: ignore[call-arg]
