"""Images to predictions: what the handler, the command line, evaluation and the registered model all call.

from handlers.predictor import Predictor
predictor = Predictor.load("model_store/skin_vit")
[answer] = predictor.predict([Path("lesion.jpg").read_bytes()])
answer.probabilities["MEL"], answer.grid
"""

import base64
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from handlers.bundle import Bundle, BundleError
from handlers.metadata import MetadataError
from handlers.preprocessing import DecodedImage, ImageError, decode, ignore_oddities
from handlers.runtimes import OpenVinoRuntime, Runtime, TorchRuntime
from handlers.taxonomy import BY_CODE, CODES, TAXONOMY, UNKNOWN

DISCLAIMER = "Research use only. Not a medical device."
RUNTIMES = ("auto", "openvino", "torch")
PRECISIONS = ("auto", "bf16", "f32")
GRADCAM_FORMS = ("grid", "overlay", "none")
# How far bf16 may move a probability of a golden answer before "auto" goes back to f32. The golden answers are few:
# among hundreds of pictures one moves several times as far.
LOW_PRECISION_TOLERANCE = 5e-3
OVERLAY_SIDE = 640  # pixels, the longer side; enough for a page, small enough to encode while others wait
OVERLAY_MIN_SIDE = OVERLAY_SIDE * 3 // 4  # the shorter side that is decoded for it: cameras' 4:3
# Pictures decoded at a time: each may hold 150 MB of pixels, and four are read faster than any processor predicts.
MAX_DECODING = 4

A = TypeVar("A")
B = TypeVar("B")

# The views of test-time augmentation: as sent, and its three mirror images.
_VIEWS = (np.s_[:, :], np.s_[:, ::-1], np.s_[::-1, :], np.s_[::-1, ::-1])


class RequestError(ImageError):
    """A request whose options are wrong; status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "invalid_request", message)


@dataclass(frozen=True)
class Request:
    """One picture and what is wanted of it.

    `gradcam` is "grid", "overlay" (a PNG as well) or "none"; `target` is the class code whose map is wanted (default:
    the most probable); `tta` averages the logits over the picture and its mirror images; `metadata` are the patient's
    age in years, sex, and site of the lesion, any of them missing, for a model that takes them (handlers.metadata).
    """

    image: bytes
    gradcam: str = "grid"
    target: str | None = None
    tta: bool = False
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Prediction:
    """One answer. `probabilities` has nine entries summing to 1; `grid` holds rows of values in [0, 1].

    `metadata` are the values that were used, None for those missing; empty for a model that takes none.
    """

    probabilities: dict[str, float]
    grid: list[list[float]] | None
    target: str | None
    overlay_png: bytes | None
    entropy: float
    conformal_set: list[str] | None
    confidence_level: float | None
    image: DecodedImage
    model: dict[str, Any]
    metadata: Mapping[str, float | str | None]

    @property
    def code(self) -> str:
        """The most probable of the nine."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """The REST answer (schema 1)."""
        top = BY_CODE[self.code]
        return {
            "schema": 1,
            "model": self.model,
            "prediction": {
                "code": top.code,
                "name": top.name,
                "probability": self.probabilities[top.code],
                "malignant": top.malignant,
            },
            "probabilities": self.probabilities,
            "classes": {
                c.code: {"name": c.name, "malignant": c.malignant, "description": c.description} for c in TAXONOMY
            },
            "uncertainty": {
                "entropy": self.entropy,
                "conformal_set": self.conformal_set,
                "confidence_level": self.confidence_level,
            },
            "gradcam": None
            if self.grid is None
            else {
                "target": self.target,
                "grid": self.grid,
                "overlay_png": base64.b64encode(self.overlay_png).decode() if self.overlay_png else None,
            },
            "image": {"width": self.image.width, "height": self.image.height, "sha256": self.image.sha256},
            **({"metadata": dict(self.metadata)} if self.metadata else {}),
            "disclaimer": DISCLAIMER,
        }


class Predictor:
    """A bundle, ready to answer.

    Args:
        bundle: a verified bundle.
        runtime: "openvino", "torch", or "auto": the exported graph where the bundle has one.
        precision: "f32", "bf16" or "auto": bf16 where the processor computes in it and the golden answers survive it.
        threads: threads for one inference; None leaves it to the runtime.
        device: torch's name of where its runtime computes, such as "cuda:0"; None: a GPU if there is one.
        version: the registry's version, repeated in answers.

    Raises:
        BundleError: the bundle cannot run this way, or there is no such way.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        version: str | None = None,
        device: str | None = None,
    ) -> None:
        for word, known in ((runtime, RUNTIMES), (precision, PRECISIONS)):
            if word not in known:
                raise BundleError(f"A model runs with one of {', '.join(known)}, not {word!r}.")
        if runtime == "auto":
            runtime = "openvino" if bundle.has_graph else "torch"
        if runtime == "openvino" and not bundle.has_graph:
            raise BundleError(f"The bundle {bundle.path} has no serving graph for OpenVINO; torch can run it.")
        self.bundle = bundle
        self.config = bundle.config
        self._one_at_a_time = threading.Lock()
        self.runtime = self._start(runtime, precision, threads, device)
        # Pillow and OpenCV let go of Python's lock, so the pictures of a batch are read and drawn side by side.
        at_a_time = min(MAX_DECODING, threads or os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix="pictures")
        ignore_oddities()
        self._model = {
            "name": self.config.name,
            "version": version,
            "architecture": self.config.architecture,
            "digest": bundle.digest,
            "run_id": self.config.evidence.get("run_id"),
            "runtime": runtime,
            "precision": self.runtime.precision,
        }
        if takes := self.config.metadata.choices:
            self._model["takes"] = takes

    @classmethod
    def load(cls, path: Path | str, **options: Any) -> "Predictor":
        """Verify the bundle in folder `path` and make a predictor of it; options as for the class."""
        return cls(Bundle.load(path), **options)

    def _start(self, runtime: str, precision: str, threads: int | None, device: str | None) -> Runtime:
        """Start the runtime and warm it up, since the first call allocates and no request should wait for that.

        Asked for "auto", low precision must earn its place: it is kept only if it gives the golden answers.
        """
        kind = TorchRuntime if runtime == "torch" else OpenVinoRuntime
        make = partial(TorchRuntime, device=device) if runtime == "torch" else OpenVinoRuntime
        if precision == "auto":
            if kind.has_bf16():
                low = make(self.bundle, "bf16", threads)
                if self.golden_difference(low) <= LOW_PRECISION_TOLERANCE:
                    return low
            precision = "f32"
        started = make(self.bundle, precision, threads)
        size = self.config.preprocessing.image_size
        started(np.zeros((1, size, size, 3), np.uint8), np.array([-1]))
        return started

    def golden_difference(self, runtime: Runtime | None = None) -> float:
        """The largest difference of a probability from the bundle's golden answers; not a number if one is none, or
        there are no golden pictures.

        `runtime`: another than the predictor's own. Raises ImageError for a golden picture that cannot be read.
        """
        if not (cases := self.bundle.golden()):
            return math.nan
        pixels = np.stack([self.config.preprocessing(case.image)[0] for case in cases])
        metadata = np.stack([self.config.metadata.encode(case.metadata or {}) for case in cases])
        logits, _, residuals = self._run(pixels, np.full(len(cases), -1), metadata, runtime=runtime)
        probabilities = self.config.calibration.probabilities(logits, self.config.classes, residuals)
        expected = [[case.probabilities[code] for code in CODES] for case in cases]
        return float(np.abs(probabilities - expected).max())

    def predict(self, requests: Sequence[Request | bytes]) -> list[Prediction | ImageError]:
        """Answer a batch, in order; a refused request gets its ImageError and does not disturb the others."""
        asked = [request if isinstance(request, Request) else Request(bytes(request)) for request in requests]
        read = list(self._map(self._read, asked))
        accepted = [one for one in read if not isinstance(one, ImageError)]
        answers = iter(self._interpret(*self._infer(accepted), accepted) if accepted else [])
        return [one if isinstance(one, ImageError) else next(answers) for one in read]

    def _map(self, function: Callable[[A], B], items: Sequence[A]) -> Iterable[B]:
        """`function` of each, in order; one alone needs no thread."""
        return self._threads.map(function, items) if len(items) > 1 else map(function, items)

    def _read(self, request: Request) -> "_Read | ImageError":
        try:
            request = self._checked(request)
            pixels, decoded = self.config.preprocessing(request.image)
            shown = decode(request.image, OVERLAY_MIN_SIDE).image if request.gradcam == "overlay" else None
            return _Read(request, pixels, decoded, shown)
        except ImageError as error:
            return error

    def _checked(self, request: Request) -> Request:
        """The request with its metadata parsed. Raises RequestError."""
        if request.gradcam not in GRADCAM_FORMS:
            raise RequestError(f"gradcam must be one of {', '.join(GRADCAM_FORMS)}, not {request.gradcam!r}.")
        if request.target is not None and request.target not in CODES:
            raise RequestError(f"target must be one of {', '.join(CODES)}, not {request.target!r}.")
        if request.target not in (None, UNKNOWN, *self.config.classes):
            raise RequestError(
                f"This model was not trained on {request.target}; it knows {', '.join(self.config.classes)}."
            )
        try:
            return replace(request, metadata=self.config.metadata.parse(request.metadata or {}))
        except MetadataError as error:
            raise RequestError(str(error)) from error

    def _infer(self, accepted: list["_Read"]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Logits (R, K), residuals (R,), Grad-CAM maps (R, h, w), their class indices (R,) for R requests, in one call.

        With test-time augmentation logits and residuals are means over the views, the map that of the picture as sent;
        only if the views move the top class is the graph called again for the map.
        """
        classes, requests = self.config.classes, [one.request for one in accepted]
        # UNK has no logit unless it was trained on: its map is that of the best known class.
        wanted = np.array([classes.index(r.target) if r.target in classes else -1 for r in requests])
        views = [[one.pixels[view] for view in (_VIEWS if one.request.tta else _VIEWS[:1])] for one in accepted]
        counts = [len(of_request) for of_request in views]
        starts = np.cumsum([0, *counts[:-1]])
        rows = np.stack([view for of_request in views for view in of_request])
        metadata = np.stack([self.config.metadata.encode(r.metadata or {}) for r in requests])
        row_logits, row_maps, row_residuals = self._run(
            rows, np.repeat(wanted, counts), np.repeat(metadata, counts, axis=0)
        )
        logits = np.add.reduceat(row_logits, starts) / np.array(counts)[:, None]
        residuals = np.add.reduceat(row_residuals, starts) / np.array(counts)
        maps = np.array(row_maps[starts])
        targets = np.where(wanted < 0, logits.argmax(1), wanted)
        shown = np.where(wanted < 0, row_logits[starts].argmax(1), wanted)
        moved = np.flatnonzero(shown != targets)
        if len(moved):
            maps[moved] = self._run(rows[starts[moved]], targets[moved], metadata[moved])[1]
        return logits, residuals, maps, targets

    def _run(self, *inputs: np.ndarray, runtime: Runtime | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The runtime's outputs. It holds one request at a time: two threads would get each other's."""
        with self._one_at_a_time:
            return (runtime or self.runtime)(*inputs)

    def _interpret(
        self,
        logits: np.ndarray,
        residuals: np.ndarray,
        maps: np.ndarray,
        targets: np.ndarray,
        accepted: list["_Read"],
    ) -> list[Prediction]:
        classes, calibration = self.config.classes, self.config.calibration
        probabilities = calibration.probabilities(logits, classes, residuals)
        sets = calibration.conformal_sets(logits, classes, residuals)
        # 0 * log 0 is 0
        entropy = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1))).sum(1)
        peaks = maps.max((1, 2), keepdims=True)
        grids = maps / np.where(peaks > 0, peaks, 1)

        def answer(row: int) -> Prediction:
            request, _, decoded, shown = accepted[row]
            drawn = request.gradcam != "none"
            return Prediction(
                probabilities=dict(zip(CODES, probabilities[row].tolist(), strict=True)),
                grid=np.round(grids[row].astype(float), 4).tolist() if drawn else None,
                target=classes[targets[row]] if drawn else None,
                overlay_png=overlay(shown, grids[row]) if shown else None,
                entropy=float(entropy[row]),
                conformal_set=sets[row] if sets else None,
                confidence_level=calibration.conformal.confidence_level if calibration.conformal else None,
                image=decoded,
                model=self._model,
                metadata=request.metadata or {},
            )

        return list(self._map(answer, range(len(accepted))))


class _Read(NamedTuple):
    """A request that was accepted, its picture as the network takes it and as it was decoded for that, and the picture
    to draw the heatmap on where that is wanted."""

    request: Request
    pixels: np.ndarray
    decoded: DecodedImage
    shown: Image.Image | None


def overlay(image: Image.Image, grid: np.ndarray) -> bytes:
    """The picture with the Grad-CAM grid (h, w) in [0, 1] laid over it, as a PNG of at most OVERLAY_SIDE pixels."""
    import cv2

    picture = image.copy()
    picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
    pixels = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
    heat = cv2.resize(grid.astype(np.float32), picture.size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    # Where there is no heat the skin stays as it is.
    alpha = 0.6 * heat
    blended = cv2.blendLinear(pixels, colours, 1 - alpha, alpha)
    return cv2.imencode(".png", blended)[1].tobytes()
