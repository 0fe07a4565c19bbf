"""What is timed without a server, on all cores, one after the other.

The handler's pieces, the joint graph against the plain forward, the processor's best matrix product; and, in processes
of its own, the part of a worker's start that is ours.
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
import openvino
import torch
import yaml
from openvino import opset13 as ops
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ts.context import Context, RequestProcessor

from handlers.backbone import split_attention
from handlers.bundle import CONFIG, GRAPH, GRAPH_WEIGHTS, Bundle, seal
from handlers.completion import export_graph
from handlers.decoding import decode
from handlers.errors import UserError
from handlers.overlay import OVERLAY_MIN_SIDE, overlay
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.runtimes import OpenVinoRuntime, core
from handlers.serving_graph import serving_module
from handlers.skin_lesion_handler import SkinLesionHandler
from mlflow_tracking.promotion import archive
from mlflow_tracking.settings import MODEL_NAME

BATCHES = (1, 8)
ROUNDS = 6  # of joint graph and plain forward in turn
SIZES = (1024, 2048, 4096)  # of the matrix products that the peak is the best of
PACE_SIZE = 2048
PACE_SECONDS = 0.1
# In a fresh interpreter: what TorchServe's worker does after it has imported torch and itself.
START = """
import importlib, json, sys, time
import torch
from ts.context import Context
import ts.model_loader
folder, config = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
began = time.perf_counter()
handler = importlib.import_module("skin_lesion_handler").SkinLesionHandler()
handler.initialize(Context("m", folder, json.load(open(folder + "/MAR-INF/MANIFEST.json")), 1, None, "0",
                           model_yaml_config=config))
seconds = time.perf_counter() - began
import handlers
assert handlers.__file__.startswith(folder), handlers.__file__
print("SECONDS", seconds)
"""


class PieceError(UserError):
    """The handler does not start or refuses a picture; says why."""


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, for `seconds` and twice at least, after one that is not timed."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e3)
    return took


def stages(bundle: Bundle, precision: str, images: list[bytes], seconds: float) -> dict[str, Any]:
    """Median ms an image: decode, graph, encode and overlay, each by itself, and the handler's whole answer.

    Returns {"precision": what was computed in, "batches": {"1": {"decode": ..., ...}, "8": ...}}. `rest` is what
    the handler takes beyond decode, graph and encode: less than nothing where it does two of them at a time.
    """
    predictor = Predictor(bundle, precision=precision)
    handler = _handler(bundle, precision)
    table: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        files = [images[index % len(images)] for index in range(batch)]
        pixels = np.stack([predictor.config.preprocessing(file)[0] for file in files])
        target = np.full(batch, -1)
        predictions = [answer for answer in predictor.predict(files) if isinstance(answer, Prediction)]
        grids = [np.asarray(prediction.grid) for prediction in predictions]
        rows = [{"data": bytearray(file)} for file in files]
        calls: dict[str, Callable[[], object]] = {
            "decode": partial(_each, predictor.config.preprocessing, files),
            "graph": partial(predictor.runtime, pixels, target),
            "encode": partial(_each, _encode, predictions),
            "overlay": partial(_each, _draw, list(zip(files, grids, strict=True))),
            "handler": partial(handler, rows),
        }
        row = {name: statistics.median(timed(call, seconds)) / batch for name, call in calls.items()}
        row["rest"] = row["handler"] - row["decode"] - row["graph"] - row["encode"]
        table[str(batch)] = row
    return {"precision": predictor.runtime.precision, "batches": table}


def _each(call: Callable[[Any], object], values: list[Any]) -> None:
    for value in values:
        call(value)


def _encode(prediction: Prediction) -> bytes:
    return json.dumps(prediction.to_dict(), separators=(",", ":"), ensure_ascii=False).encode()


def _draw(picture: tuple[bytes, np.ndarray]) -> bytes:
    file, grid = picture
    return overlay(decode(file, OVERLAY_MIN_SIDE).image, grid)


def _handler(bundle: Bundle, precision: str) -> Callable[[list[dict[str, bytearray]]], list[bytes]]:
    """The handler as TorchServe's worker calls it, without TorchServe. Raises PieceError if it refuses a picture."""
    config = yaml.safe_load(archive.MODEL_CONFIG.read_text())
    config["handler"]["precision"] = precision
    manifest = {"model": {"modelName": MODEL_NAME, "modelVersion": "1"}}
    handler = SkinLesionHandler()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / archive.BUNDLE_FOLDER).symlink_to(bundle.path.resolve())
        context = Context(MODEL_NAME, folder, manifest, max(BATCHES), None, "0", model_yaml_config=config)
        handler.initialize(context)

    def handle(rows: list[dict[str, bytearray]]) -> list[bytes]:
        context.request_ids = {index: str(index) for index in range(len(rows))}
        context.request_processor = [RequestProcessor({}) for _ in rows]
        answers = handler.handle(rows, context)
        if context.get_response_status(0)[0] != 200:
            raise PieceError(f"The handler answered {answers[0][:300]!r}.")
        return answers

    return handle


class PlainForward(nn.Module):
    """The backbone alone in a graph of the serving graph's shape: what stands for map and residual costs nothing."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.serving = serving_module(bundle)
        split_attention(self.serving.cam.backbone)

    def forward(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels uint8 (N, S, S, 3), target int64 (N,) to logits (N, K), the target (N, 1, 1), the first logit (N,)."""
        logits = self.serving.cam.backbone(self.serving.images(pixels))
        return logits, target.float()[:, None, None], logits[:, 0]


def plain_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bundle in which the plain forward has the serving graph's place, exported in the same way."""
    shutil.copytree(bundle.path, folder)
    (folder / CONFIG).unlink()
    for name in (GRAPH, GRAPH_WEIGHTS):
        (folder / name).unlink()
    export_graph(PlainForward(bundle).eval(), bundle.config, folder)
    return seal(folder, bundle.config)


def graphs(bundle: Bundle, plain: Bundle, precision: str, images: list[bytes], seconds: float) -> dict[str, Any]:
    """The joint graph against the plain forward in the same runtime, and what it does alone.

    Returns {"precision", "batches": {"1": {"joint": ms, "plain": ms, "ratio"}, "8": ...}, "images_per_second":
    {"1": ..., "8": ...}}: ms of a whole call, medians of rounds that alternate.
    """
    joint = Predictor(bundle, precision=precision).runtime
    other = Predictor(plain, precision=joint.precision).runtime
    pixels = [bundle.config.preprocessing(image)[0] for image in images]
    table: dict[str, dict[str, float]] = {}
    rates: dict[str, float] = {}
    for batch in BATCHES:
        inputs = np.stack([pixels[index % len(pixels)] for index in range(batch)]), np.full(batch, -1)
        took: dict[str, list[float]] = {"joint": [], "plain": []}
        for _ in range(ROUNDS):
            took["joint"] += timed(partial(joint, *inputs), seconds / ROUNDS)
            took["plain"] += timed(partial(other, *inputs), seconds / ROUNDS)
        table[str(batch)] = {name: statistics.median(values) for name, values in took.items()}
        table[str(batch)]["ratio"] = table[str(batch)]["joint"] / table[str(batch)]["plain"]
        rates[str(batch)] = 1e3 * batch / statistics.mean(took["joint"])
    return {"precision": joint.precision, "batches": table, "images_per_second": rates}


def flops(bundle: Bundle) -> dict[str, float]:
    """GFLOP an image, two for each multiply-add, of the products and convolutions: the plain forward, the joint graph.

    The joint graph can need fewer: of a class-token ViT's last block it computes what the class token needs.
    """
    module, plain = serving_module(bundle), PlainForward(bundle).eval()
    size = bundle.config.preprocessing.image_size
    inputs = (torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.tensor([-1]))
    counted = {}
    for name, each in (("plain", plain), ("joint", module)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            each(*inputs)
        counted[name] = counter.get_total_flops() / 1e9
    return counted


def peaks(seconds: float, sizes: tuple[int, ...] = SIZES) -> dict[str, dict[str, Any]]:
    """GFLOP/s of the best square matrix product by precision, of torch's and OpenVINO's, and which one that was.

    bf16 only where the processor multiplies in it; elsewhere it is emulated.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    found: dict[str, dict[str, Any]] = {}
    for precision in ("f32", "bf16") if OpenVinoRuntime.has_bf16() else ("f32",):
        tried: dict[str, float] = {}
        for size in sizes:
            for name, make in (("torch", _torch_product), ("OpenVINO", _graph_product)):
                call = make(size, precision)
                tried[f"{name} {size}"] = 2 * size**3 / (min(timed(call, seconds)) * 1e6)
        best = max(tried, key=tried.__getitem__)
        found[precision] = {"gflops": tried[best], "by": best, "tried": tried}
    return found


def pace() -> float:
    """GFLOP/s of one fixed matrix product: how much of the processor is there just now.

    On a shared machine that changes within minutes, and with it every figure.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    call = _torch_product(PACE_SIZE, "bf16" if OpenVinoRuntime.has_bf16() else "f32")
    return 2 * PACE_SIZE**3 / (float(np.median(timed(call, PACE_SECONDS))) * 1e6)


def _torch_product(size: int, precision: str) -> Callable[[], object]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    out = torch.empty(size, size, dtype=kind)
    return lambda: torch.mm(one, other, out=out)


def _graph_product(size: int, precision: str) -> Callable[[], object]:
    """As in a network: activations come in, weights are constant."""
    rng = np.random.default_rng(0)
    given = ops.parameter([size, size], np.float32)
    weights = ops.constant(rng.standard_normal((size, size), np.float32))
    model = openvino.Model([ops.matmul(given, weights, False, True)], [given])
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core().compile_model(model, "CPU", options).create_infer_request()
    values = rng.standard_normal((size, size), np.float32)
    return lambda: request.infer([values], share_inputs=True, share_outputs=True)


def worker_start(bundle: Bundle, precision: str, times: int) -> dict[str, float]:
    """Median seconds of a worker's start that are ours: from after TorchServe's own imports to a warm model.

    `fresh` is the first start of an archive, whose code is compiled then, `again` the next one.
    """
    config = yaml.safe_load(archive.MODEL_CONFIG.read_text())
    config["handler"]["precision"] = precision
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHONPATH"))}
    fresh: list[float] = []
    again: list[float] = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            with zipfile.ZipFile(archive.build(bundle.path, Path(temporary) / "a.mar", version="1").path) as file:
                file.extractall(folder)
            for seconds in (fresh, again):
                done = subprocess.run(
                    [sys.executable, "-c", START, str(folder), json.dumps(config)],
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise PieceError(f"The handler did not start: {done.stderr.strip()}")
                seconds.append(float(done.stdout.rsplit("SECONDS", 1)[1]))
    return {"fresh": statistics.median(fresh), "again": statistics.median(again)}
