"""A prediction log as TorchServe writes and rotates it, and a monitor that reads it, for tests."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from handlers.reference import DRIFT_STATISTICS, INPUT_STATISTICS, LEVELS, Reference
from handlers.taxonomy import CODES
from mlflow_tracking.stack_settings import Settings
from monitoring.monitor import OPENING, Monitor
from monitoring.monitor_service import create_app
from scripts.child_processes import free_ports
from tests.waiting import eventually

NOW = datetime.now(UTC).timestamp()


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def prediction(request_id: str, seconds: float = NOW, code: str = "NV", version: str = "1", **fields: Any) -> bytes:
    """A prediction's line with probability 0.6 for `code`."""
    row = {
        "time": stamp(seconds), "request_id": request_id, "image_sha256": "0" * 64, "metadata_sent": {},
        "model": "skin_vit", "version": version, "digest": "sha256:1",
        "probabilities": {other: 0.6 if other == code else 0.05 for other in CODES},
        "entropy": 1.2, "set": ["NV", "MEL"], "flagged": False, "width": 600, "height": 450, "milliseconds": 20.0,
    } | fields  # fmt: skip
    return json.dumps(row).encode() + b"\n"


def refusal(request_id: str, seconds: float = NOW, code: str = "invalid_image", status: int = 400) -> bytes:
    row = {"time": stamp(seconds), "request_id": request_id, "version": "1", "code": code, "status": status}
    return json.dumps(row).encode() + b"\n"


def many(count: int, seconds: float = NOW, version: str = "1", seed: int = 0, **fields: Any) -> bytes:
    """Lines of predictions, one each second up to `seconds`, with all classes and latencies of 10 to 100 ms."""
    rng = np.random.default_rng(seed)
    return b"".join(
        prediction(f"{version}-{seed}-{i}", seconds - count + i, CODES[rng.integers(len(CODES))], version,
                   milliseconds=float(rng.uniform(10, 100)), flagged=bool(rng.random() < 0.3), **fields)
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


def drain(monitor: Monitor) -> None:
    """Let the monitor read until nothing is left."""
    while monitor.step() == 0:
        pass
    assert monitor.error == ""


def settings_of(state: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, stack_state=state, model_store=state / "store", **values)  # type: ignore[call-arg]


def normal_values(count: int, rng: np.random.Generator) -> np.ndarray:
    """Drift values (N, S) of unchanged pictures: normal ones, and one of two sizes."""
    values = rng.normal(size=(count, len(DRIFT_STATISTICS)))
    values[:, 0] = rng.choice([16.0, 18.0], size=count, p=[0.8, 0.2])
    return values


def normal_reference(lesions: int = 2000, seed: int = 0) -> Reference:
    """The reference of `normal_values`."""
    quantiles = np.quantile(normal_values(lesions, np.random.default_rng(seed)), LEVELS, axis=0, method="inverted_cdf")
    return Reference(
        lesions, lesions, {"flagged_share": 0.3}, dict(zip(DRIFT_STATISTICS, quantiles.T.tolist(), strict=True))
    )


def archive_with(reference: Reference, store: Path, version: str = "1") -> str:
    """Put an archive with a bundle of this reference into a store; return the bundle's digest."""
    store.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"version": version}).encode()
    with zipfile.ZipFile(store / f"skin_vit-{version}-0123456789ab.mar", "w") as archive:
        archive.writestr("bundle/bundle.json", config)
        archive.writestr("bundle/reference.json", json.dumps(reference.to_dict()))
    return f"sha256:{hashlib.sha256(config).hexdigest()}"


def measured(values: np.ndarray, digest: str, first: int = 0, seconds: float = NOW, **fields: Any) -> bytes:
    """Lines of predictions of new pictures whose drift values (except of size and probabilities) are these."""
    names = INPUT_STATISTICS[1:]  # the probabilities follow
    return b"".join(
        prediction(f"p{first + i}", seconds - len(values) + i, image_sha256=f"{first + i:064x}",
                   digest=digest, width=256, height=int(2 ** row[0]) // 256,
                   statistics=dict(zip(names, row[1:], strict=False)), **fields)
        for i, row in enumerate(values.tolist())
    )  # fmt: skip


@contextmanager
def running_monitor(settings: Settings) -> Iterator[str]:
    """The address of a monitor in a thread."""
    [port] = free_ports(1)
    monitor = Monitor(settings)
    server = uvicorn.Server(uvicorn.Config(create_app(monitor), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started and monitor.error != OPENING)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
