"""Runtimes: run a bundle's serving graph with torch or with OpenVINO.

The graph takes uint8 pixels, target classes and, where the model uses them, encoded metadata. It returns logits,
Grad-CAM maps and residuals. A residual is the length of the features outside the space that known lesions span
(handlers.calibration.Rejection); it is 0 in a bundle without such a space.
"""

import functools
from typing import TYPE_CHECKING, Protocol

import numpy as np

from handlers.bundle import GRAPH, Bundle

if TYPE_CHECKING:
    import openvino


@functools.cache
def core() -> "openvino.Core":
    """OpenVINO's core, one for the process.

    On processors with AMX each new one gives its thread a signal stack and, in the end, frees it while it is in use:
    the next signal with a handler in Python, such as Ctrl-C, is then a segmentation fault.
    """
    import openvino

    return openvino.Core()


class Runtime(Protocol):
    """Something that runs a bundle's graph."""

    precision: str

    @staticmethod
    def has_bf16() -> bool:
        """Whether it would gain from bf16 where it runs."""
        ...

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray, metadata: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels uint8 (N, S, S, 3), wanted classes int64 (N,) or -1, to float32 logits (N, K), maps (N, h, w) and
        residuals (N,). Encoded metadata (N, D) count where the model takes them; None: nothing is known."""
        ...


class OpenVinoRuntime:
    """The exported graph on the CPU, computing in `precision` "bf16" or "f32"."""

    @staticmethod
    def has_bf16() -> bool:
        """Whether this processor multiplies in bf16."""
        return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def __init__(self, bundle: Bundle, precision: str = "f32", threads: int | None = None) -> None:
        # Unless told, OpenVINO chooses the precision by itself and says nothing.
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self.precision = precision
        self._width = len(bundle.config.metadata.columns)
        self._request = core().compile_model(str(bundle.path / GRAPH), "CPU", options).create_infer_request()

    def __call__(
        self, pixels: np.ndarray, target: np.ndarray, metadata: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = [pixels, target]
        if self._width:
            inputs.append(np.zeros((len(pixels), self._width), np.float32) if metadata is None else metadata)
        results = self._request.infer(inputs, share_inputs=True)
        return results[0], results[1], results[2]


class TorchRuntime:
    """The eager model: on a GPU, where there is one, and for bundles without a graph; the reference for all others.

    It computes in `precision` "bf16", by autocast, or "f32".
    """

    @staticmethod
    def has_bf16() -> bool:
        """Whether there is a GPU that multiplies in bf16; on CPUs this is the reference."""
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
