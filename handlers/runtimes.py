"""Runtimes: run a bundle's serving graph with torch or with OpenVINO.

The graph takes uint8 pixels, target classes and, where the model uses them, encoded metadata. It returns logits,
Grad-CAM maps and residuals. A residual is the length of the features outside the space that known lesions span
(handlers.calibration.Rejection); it is 0 in a bundle without such a space.
"""

import functools
from typing import TYPE_CHECKING, Protocol

import numpy as np

from handlers.bundle import GRAPH, WEIGHTS, Bundle, BundleError
from handlers.weights import BASIS, load_weights, read_weights

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
        # A graph from before there were residuals has none.
        return results[0], results[1], results[2] if len(results) > 2 else np.zeros(len(pixels), np.float32)


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


def serving_module(bundle: Bundle):  # type: ignore[no-untyped-def]  # torch is imported only when it is needed
    """The eager torch module of a bundle: normalisation, backbone, Grad-CAM; in eval mode, fp32.

    Raises:
        BundleError: the network cannot be built, the weights are not those of its architecture, or they lack the known
            space that its rejection needs.
    """
    import torch
    from torch import Tensor, nn

    from handlers.backbone import BackboneError, build_backbone
    from handlers.gradcam import grad_cam

    config = bundle.config
    try:
        backbone = build_backbone(
            config.architecture,
            len(config.classes),
            config.preprocessing.image_size,
            options=config.options,
            metadata_width=len(config.metadata.columns),
        )
    except BackboneError as error:
        raise BundleError(f"The bundle's network cannot be built: {error}") from error
    weights = read_weights(bundle)
    if config.calibration.rejection and config.calibration.rejection.residual_weight and weights.basis is None:
        raise BundleError(f"The bundle's rejection needs {BASIS} in {WEIGHTS}, which is not there.")
    try:
        load_weights(backbone, weights.network)
    except ValueError as error:
        raise BundleError(f"The weights do not fit {config.architecture}: {error}.") from error

    class ServingModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cam = grad_cam(backbone.eval())
            # Inside the graph it is free.
            scale, offset = config.preprocessing.standardisation
            self.scale, self.offset = (nn.Buffer(torch.tensor(each)[:, None, None]) for each in (scale, offset))

            self.origin, self.basis = (None if t is None else nn.Buffer(t) for t in (weights.origin, weights.basis))

        def images(self, pixels: Tensor) -> Tensor:
            """Pixels uint8 (N, S, S, 3) to the backbone's input (N, 3, S, S)."""
            return pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset

        def forward(
            self, pixels: Tensor, target: Tensor, metadata: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, maps, features = self.cam(self.images(pixels), target, metadata)
            if self.basis is None:
                return logits, maps, torch.zeros_like(logits[:, 0])
            # Not a matrix product: in bf16 its error, weighed, would move the ninth probability.
            outside = ((features - self.origin).unsqueeze(-1) * self.basis).sum(1)
            return logits, maps, (outside * outside).sum(-1).sqrt()

    return ServingModule().eval()
