"""What is timed without a server, on all cores, one after the other.

The handler's stages, the plain forward pass as a bundle, and our part of a worker's start.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor, nn
from ts.context import Context, RequestProcessor

from handlers.backbone import split_attention
from handlers.bundle import CONFIG, GRAPH, GRAPH_WEIGHTS, Bundle, seal
from handlers.decoding import decode
from handlers.errors import UserError
from handlers.graph_export import export_graph
from handlers.overlay import SHOWN_MIN_SIDE, overlay
from handlers.picture_statistics import picture_statistics
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.serving_graph import serving_module
from handlers.skin_lesion_handler import SkinLesionHandler
from mlflow_tracking.promotion import model_archive
from mlflow_tracking.stack_settings import MODEL_NAME

BATCHES = (1, 8)
# In a fresh interpreter: what TorchServe's worker does after it has imported itself.
START = """
import importlib, json, sys, time
folder, config, torchserve = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
sys.path[:0] = [folder, torchserve]
import worker
worker.import_message_handler()
from ts.context import Context
import ts.model_loader
began = time.perf_counter()
handler = importlib.import_module("skin_lesion_handler").SkinLesionHandler()
handler.initialize(Context("m", folder, json.load(open(folder + "/MAR-INF/MANIFEST.json")), 1, None, "0",
                           model_yaml_config=config))
print("SECONDS", time.perf_counter() - began)
"""


class HandlerFailed(UserError):
    """The handler does not start, or rejects a picture."""


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Return milliseconds of each call, for `seconds` and at least twice, after one that is not timed."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e3)
    return took


def stages(bundle: Bundle, precision: str, images: list[bytes], seconds: float) -> dict[int, dict[str, float]]:
    """Return median ms an image by batch size of each stage, and of the handler's whole answer."""
    predictor = Predictor(bundle, precision=precision)
    handler = _handler(bundle, precision)
    stages_ms: dict[int, dict[str, float]] = {}
    for batch in BATCHES:
        files = [images[index % len(images)] for index in range(batch)]
        pixels = np.stack([predictor.config.preprocessing(file)[0] for file in files])
        predictions = [answer for answer in predictor.predict(files) if isinstance(answer, Prediction)]
        pictures = [(file, np.asarray(prediction.grid)) for file, prediction in zip(files, predictions, strict=True)]
        calls: dict[str, Callable[[], object]] = {
            "decode": partial(_each, predictor.config.preprocessing, files),
            "graph": partial(predictor.runtime, pixels, np.full(batch, -1)),
            "statistics": partial(_each, picture_statistics, list(pixels)),
            "encode": partial(_each, _encode, predictions),
            "overlay": partial(_each, _draw, pictures),
            "handler": partial(handler, [{"data": bytearray(file)} for file in files]),
        }
        stages_ms[batch] = {name: statistics.median(timed(call, seconds)) / batch for name, call in calls.items()}
    return stages_ms


def _each(call: Callable[[Any], object], values: list[Any]) -> None:
    for value in values:
        call(value)


def _encode(prediction: Prediction) -> bytes:
    return json.dumps(prediction.to_dict(), separators=(",", ":"), ensure_ascii=False).encode()


def _draw(picture: tuple[bytes, np.ndarray]) -> bytes:
    file, grid = picture
    return overlay(decode(file, SHOWN_MIN_SIDE).image, grid)


def _handler(bundle: Bundle, precision: str) -> Callable[[list[dict[str, bytearray]]], list[bytes]]:
    """Return the handler as TorchServe's worker calls it. The call raises HandlerFailed if a picture is rejected."""
    config = yaml.safe_load(model_archive.MODEL_CONFIG.read_text())
    config["handler"]["precision"] = precision
    manifest = {"model": {"modelName": MODEL_NAME, "modelVersion": "1"}}
    handler = SkinLesionHandler()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / model_archive.BUNDLE_FOLDER).symlink_to(bundle.path.resolve())
        context = Context(MODEL_NAME, folder, manifest, max(BATCHES), None, "0", model_yaml_config=config)
        handler.initialize(context)

    def handle(rows: list[dict[str, bytearray]]) -> list[bytes]:
        context.request_ids = {index: str(index) for index in range(len(rows))}
        context.request_processor = [RequestProcessor({}) for _ in rows]
        answers = handler.handle(rows, context)
        if context.get_response_status(0)[0] != 200:
            raise HandlerFailed(f"The handler answered {answers[0][:300]!r}.")
        return answers

    return handle


class PlainForward(nn.Module):
    """The backbone alone, with the serving graph's inputs and outputs; map and residual are placeholders."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.serving = serving_module(bundle)
        split_attention(self.serving.cam.backbone)

    def forward(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels uint8 (N, S, S, 3), target int64 (N,) to logits (N, K), the target (N, 1, 1), the first logit (N,)."""
        logits = self.serving.cam.backbone(self.serving.images(pixels))
        return logits, target.float()[:, None, None], logits[:, 0]


def plain_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Return a copy of a bundle with the plain forward in place of the serving graph, exported in the same way."""
    shutil.copytree(bundle.path, folder)
    for name in (CONFIG, GRAPH, GRAPH_WEIGHTS):
        (folder / name).unlink()
    export_graph(PlainForward(bundle).eval(), bundle.config, folder)
    return seal(folder, bundle.config)


def worker_start(bundle: Bundle, precision: str) -> tuple[float, float]:
    """Return seconds of a worker's start that are ours, from TorchServe's own imports to a warm model.

    The first value is an archive's first start, which compiles its code; the second is any later start.
    """
    config = yaml.safe_load(model_archive.MODEL_CONFIG.read_text())
    config["handler"]["precision"] = precision
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHONPATH"))}
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        with zipfile.ZipFile(model_archive.build(bundle.path, Path(temporary) / "a.mar", version="1").path) as file:
            file.extractall(folder)
        command = [sys.executable, "-c", START, str(folder), json.dumps(config), str(model_archive.MODEL_CONFIG.parent)]
        for _ in range(2):
            process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if process.returncode:
                raise HandlerFailed(f"The handler did not start:\n{process.stderr.strip()}")
            seconds.append(float(process.stdout.rsplit("SECONDS", 1)[1]))
    return seconds[0], seconds[1]
