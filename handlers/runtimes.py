"""Runtimes: run a bundle's serving graph with torch or with OpenVINO.

The graph (handlers/serving_graph.py) takes uint8 pixels, target classes and, where the model uses them, encoded
metadata. It returns logits, Grad-CAM maps and residuals. A residual is the length of the features outside the space
that known lesions span (handlers/unknown_class.py); it is 0 in a bundle without such a space.
"""

import functools
import math
import timeit
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from handlers.bundle import GRAPH, Bundle, BundleError
from handlers.taxonomy import CODES

if TYPE_CHECKING:
    import openvino

RUNTIMES = ("auto", "openvino", "torch")
PRECISIONS = ("auto", "bf16", "f32")
# How far bf16 may move a probability of a golden answer before "auto" falls back to f32. The golden answers are few;
# other pictures move several times as far.
LOW_PRECISION_TOLERANCE = 5e-3
# A product of matrices of this side is timed in both precisions. Matrix units compute it several times faster in bf16,
# other processors twice as slowly, so every start on one machine decides alike.
TIMED_SIDE, TIMED_CALLS, WORTHWHILE_SHARE = 1024, 5, 0.8


@functools.cache
def core() -> "openvino.Core":
    """Return OpenVINO's core, one for the process.

    On processors with AMX each core gives its thread a signal stack and frees it while it is in use. The next signal
    with a handler in Python, such as Ctrl-C, then ends in a segmentation fault.
    """
    import openvino

    return openvino.Core()


@functools.cache
def _multiplies_faster_in_bf16() -> bool:
    import openvino
    from openvino import opset13 as ops

    matrix = np.ones((TIMED_SIDE, TIMED_SIDE), np.float32)
    factor = ops.parameter(matrix.shape, np.float32)
    product = openvino.Model([ops.matmul(factor, ops.constant(matrix), False, False)], [factor])
    seconds = {}
    for precision in ("bf16", "f32"):
        request = core().compile_model(product, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
        request.infer([matrix])
        seconds[precision] = min(timeit.repeat(partial(request.infer, [matrix]), number=1, repeat=TIMED_CALLS))
    return seconds["bf16"] <= WORTHWHILE_SHARE * seconds["f32"]


class Runtime(Protocol):
    """A way to run a bundle's graph."""

    name: str
    precision: str

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray, metadata: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run a batch. Returns float32 logits (N, K), maps (N, h, w) and residuals (N,).

        Args:
            pixels: uint8 (N, S, S, 3).
            target: int64 (N,), the class of each map; -1 for the top class.
            metadata: encoded metadata (N, D) for a model that takes them; None if nothing is known.
        """
        ...


class OpenVinoRuntime:
    """The exported graph on the CPU, computing in `precision` "bf16" or "f32".

    A single picture gets all threads. Of several, each thread computes one at a time: threads that share pictures wait
    for each other, and one picture's values stay in the processor's caches (docs/lab-notes.md, "Streams").
    """

    name = "openvino"

    @staticmethod
    def gains_by_bf16() -> bool:
        """Return whether this processor multiplies in bf16, and clearly faster than in f32."""
        return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") and _multiplies_faster_in_bf16()

    def __init__(self, bundle: Bundle, precision: str = "f32", threads: int | None = None) -> None:
        self.precision = precision
        self._width = len(bundle.config.metadata.columns)
        # Without a hint, OpenVINO silently chooses the precision itself.
        options = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": "1"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self._single = _queue(bundle, options)
        self._threads = int(self._single[0].get_compiled_model().get_property("INFERENCE_NUM_THREADS"))
        self._several = (
            _queue(bundle, options | {"NUM_STREAMS": str(self._threads)}) if self._threads > 1 else self._single
        )

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray, metadata: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = [pixels, target]
        if self._width:
            inputs.append(np.zeros((len(pixels), self._width), np.float32) if metadata is None else metadata)
        # With fewer pictures than threads, one thread a picture would leave some idle.
        is_many = len(pixels) >= self._threads
        queue, size = (self._several, 1) if is_many else (self._single, len(pixels))
        outputs: dict[int, list[np.ndarray]] = {}
        queue.set_callback(
            lambda request, start: outputs.update({start: [tensor.data.copy() for tensor in request.output_tensors]})
        )
        starts = range(0, len(pixels), size)
        for start in starts:
            queue.start_async([values[start : start + size] for values in inputs], start)
        queue.wait_all()
        logits, maps, residuals = (np.concatenate([outputs[start][place] for start in starts]) for place in range(3))
        return logits, maps, residuals


def _queue(bundle: Bundle, options: dict[str, str]) -> "openvino.AsyncInferQueue":
    """Return a queue of as many requests as the options have streams."""
    import openvino

    return openvino.AsyncInferQueue(
        core().compile_model(str(bundle.path / GRAPH), "CPU", options), int(options["NUM_STREAMS"])
    )


class TorchRuntime:
    """The eager model, for GPUs and for bundles without a graph; in f32 it is the reference for all others.

    `precision` is "bf16" (by autocast) or "f32".
    """

    name = "torch"

    @staticmethod
    def gains_by_bf16() -> bool:
        """Return whether there is a GPU that multiplies in bf16."""
        import torch

        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)

    def __init__(
        self, bundle: Bundle, precision: str = "f32", threads: int | None = None, device: str | None = None
    ) -> None:
        import torch

        from handlers.serving_graph import serving_module

        if threads:
            torch.set_num_threads(threads)
        self.precision = precision
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = serving_module(bundle).to(self._device)

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray, metadata: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        inputs = [pixels, target] if metadata is None else [pixels, target, metadata]
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), autocast:
            outputs = self.module(*(torch.tensor(array, device=self._device) for array in inputs))
        logits, maps, residuals = (output.float().cpu().numpy() for output in outputs)
        return logits, maps, residuals


def start_runtime(bundle: Bundle, runtime: str, precision: str, threads: int | None, device: str | None) -> Runtime:
    """Start a runtime and warm it up, so that no request waits for the allocations of the first call.

    Arguments and errors as for handlers.predictor.Predictor. With precision "auto", bf16 is taken only if the
    processor gains by it and it gives the golden answers.
    """
    if runtime not in RUNTIMES:
        raise BundleError(f"The runtime is {runtime!r}: it must be one of {', '.join(RUNTIMES)}.")
    if precision not in PRECISIONS:
        raise BundleError(f"The precision is {precision!r}: it must be one of {', '.join(PRECISIONS)}.")
    if runtime == "openvino" and not bundle.has_graph:
        raise BundleError(f"The bundle {bundle.path} has no serving graph for OpenVINO. Run it with torch.")
    kind: type[OpenVinoRuntime | TorchRuntime] = OpenVinoRuntime
    make: Callable[[Bundle, str, int | None], Runtime] = OpenVinoRuntime
    if runtime == "torch" or not bundle.has_graph:
        kind, make = TorchRuntime, partial(TorchRuntime, device=device)
    if precision == "auto" and kind.gains_by_bf16():
        low = make(bundle, "bf16", threads)
        if golden_difference(bundle, low) <= LOW_PRECISION_TOLERANCE:
            return low
    started = make(bundle, "bf16" if precision == "bf16" else "f32", threads)
    size = bundle.config.preprocessing.image_size
    started(np.zeros((1, size, size, 3), np.uint8), np.array([-1]))
    return started


def golden_difference(bundle: Bundle, run: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Return the largest difference of a probability from the bundle's golden answers.

    NaN if any probability is NaN, or if there are no golden cases. `run` is a runtime. Raises ImageError if a golden
    picture cannot be decoded.
    """
    if not (cases := bundle.golden()):
        return math.nan
    config = bundle.config
    pixels = np.stack([config.preprocessing(case.image)[0] for case in cases])
    metadata = np.stack([config.metadata.encode(case.metadata) for case in cases])
    logits, _, residuals = run(pixels, np.full(len(cases), -1), metadata)
    probabilities = config.calibration.probabilities(logits, config.classes, residuals)
    expected = [[case.probabilities[code] for code in CODES] for case in cases]
    return float(np.abs(probabilities - expected).max())
