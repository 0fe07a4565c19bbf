"""Speed as shares of what the machine can do, measured in one run and in turn.

A ratio to another program depends on the processor. A share of the best matrix product, or of the graph alone at that
moment, says how much is lost on the way:

    graph / matrix product    operations a second of the graph at batches of 8, of those of a large product
    heatmap / plain forward   time of the graph with heatmap, of that of a plain forward pass
    overlay                   time to draw and pack one of 600×450 pixels
    TorchServe / graph        requests a second at 16 clients, of the pictures of the graph alone, timed in between
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from handlers.bundle import Bundle
from handlers.decoding import decode
from handlers.overlay import SHOWN_MIN_SIDE, overlay
from handlers.predictor import Predictor
from handlers.serving_graph import serving_module
from scripts.studies.serving_bench import servers
from scripts.studies.serving_bench.in_process import timed
from scripts.studies.serving_bench.load import form, measure

BATCH, CLIENTS, ROUNDS = 8, 16, 3
MATRIX_SIDE = 1536
# The least, or for times and memory the most, that each row should have.
GRAPH_SHARE, SERVED_SHARE, SMALL_SERVED_SHARE = 0.85, 0.92, 0.80
HEATMAP_RATIO, OVERLAY_MS, WORKER_MB = 1.0, 3.0, 600
SMALL_MS = 10  # of the graph for one picture; for a smaller network, TorchServe's own work weighs more


class Share(NamedTuple):
    """A figure, what it is a share of, and the share with its aim."""

    name: str
    figure: str
    whole: str
    share: str
    aim: str


def shares(bundle: Bundle, predictor: Predictor, plain: Predictor, files: list[bytes], seconds: float) -> list[Share]:
    """Measure every share.

    Args:
        bundle: with a graph for OpenVINO.
        predictor: of this bundle.
        plain: of the plain forward pass, in the same precision (in_process.plain_bundle).
        files: JPEGs.
        seconds: for each figure of a round.

    Raises:
        LoadError, BenchServerError: TorchServe does not answer as it should.
    """
    pixels = np.stack([predictor.config.preprocessing(file)[0] for file in files[:BATCH]])
    inputs = pixels, np.full(len(pixels), -1)
    calls: dict[str, Callable[[], object]] = {
        "product": _matrix_product(predictor.runtime.precision),
        "graph": partial(predictor.runtime, *inputs),
        "plain": partial(plain.runtime, *inputs),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            took[name] += timed(call, seconds / ROUNDS)
    product, graph, forward = (statistics.median(took[name]) for name in calls)  # ms
    best = 2 * MATRIX_SIDE**3 / product / 1e6
    reached = operations(bundle) * len(pixels) / graph / 1e6
    drawn = statistics.median(timed(partial(overlay, *_picture(files[0])), seconds))
    return [
        _share("graph / matrix product", reached, best, "GFLOP/s", GRAPH_SHARE),
        _share("heatmap / plain forward", graph, forward, "ms", HEATMAP_RATIO, "≤"),
        Share("overlay", f"{drawn:.1f} ms", "", "", f"≤ {OVERLAY_MS:.0f} ms"),
        *_served(bundle, predictor, inputs, files, seconds),
    ]


def operations(bundle: Bundle) -> float:
    """Return the floating-point operations of a plain forward pass for one picture: two for each multiplication."""
    module, size = serving_module(bundle), bundle.config.preprocessing.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module.cam.backbone(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


def _served(
    bundle: Bundle, predictor: Predictor, inputs: tuple[np.ndarray, np.ndarray], files: list[bytes], seconds: float
) -> list[Share]:
    """Return requests per second as a share of the graph's pictures, and what they cost in time and memory."""
    run = partial(predictor.runtime, *inputs)
    with servers.ours(bundle, predictor.runtime.precision) as server:
        bodies = [form(file, "grid") for file in files]
        measure(server.port, servers.PATH, bodies, CLIENTS, seconds)
        worker, java, client = _worker(server.pid), psutil.Process(server.pid), psutil.Process()
        requests, rates, paces, used = 0, [], [_pace(run, inputs, seconds)], dict.fromkeys((worker, java, client), 0.0)
        for _ in range(ROUNDS):
            before = {process: _processor_seconds(process) for process in used}
            load = measure(server.port, servers.PATH, bodies, CLIENTS, seconds)
            for process in used:
                used[process] += _processor_seconds(process) - before[process]
            requests += load.requests + CLIENTS  # and the first of each client
            rates.append(load.rps)
            paces.append(_pace(run, inputs, seconds))
        megabytes = worker.memory_info().rss / 1e6
    rate, pace = statistics.mean(rates), statistics.mean(paces)
    aim = SMALL_SERVED_SHARE if 1e3 / pace < SMALL_MS else SERVED_SHARE
    return [
        _share("TorchServe / graph", rate, pace, "/s", aim),
        *(
            Share(f"a request costs {name}", f"{1e3 * used[process] / requests:.1f} ms of a core", "", "", "")
            for name, process in (("the worker", worker), ("Java", java), ("the client", client))
        ),
        Share("worker's memory", f"{megabytes:.0f} MB", "", "", f"≤ {WORKER_MB} MB"),
    ]


def _pace(run: Callable[[], object], inputs: tuple[np.ndarray, np.ndarray], seconds: float) -> float:
    """Return pictures a second of the graph alone."""
    return 1e3 * len(inputs[0]) / statistics.median(timed(run, seconds / ROUNDS))


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _matrix_product(precision: str) -> Callable[[], object]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.rand(MATRIX_SIDE, MATRIX_SIDE).to(dtype)
    return partial(torch.mm, matrix, matrix)


def _picture(file: bytes) -> tuple[Image.Image, np.ndarray]:
    return decode(file, SHOWN_MIN_SIDE).image, np.linspace(0, 1, 100).reshape(10, 10)


def _worker(pid: int) -> psutil.Process:
    """Return TorchServe's worker, a child of the process `pid`."""
    children = psutil.Process(pid).children(recursive=True)
    return next(child for child in children if any("model_service_worker" in word for word in child.cmdline()))


def _share(name: str, figure: float, whole: float, unit: str, aim: float, limit: str = "≥") -> Share:
    return Share(name, f"{figure:.1f} {unit}", f"{whole:.1f} {unit}", f"{figure / whole:.2f}", f"{limit} {aim:.2f}")
