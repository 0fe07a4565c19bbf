"""The predictor: requests in, predictions out, for the handler, the command line, evaluation and the registered model.

from handlers.predictor import Predictor
predictor = Predictor.load("model_store/skin_vit")
[answer] = predictor.predict([Path("lesion.jpg").read_bytes()])
answer.probabilities["MEL"], answer.grid
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from handlers.bundle import Bundle
from handlers.decoding import DecodedImage, decode, ignore_oddities
from handlers.errors import ImageError
from handlers.overlay import SHOWN_MIN_SIDE, overlay, picture_jpeg
from handlers.picture_statistics import picture_statistics
from handlers.prediction import Prediction
from handlers.request import Request
from handlers.runtimes import golden_difference, start_runtime
from handlers.taxonomy import CODES, UNKNOWN
from handlers.test_time_augmentation import HALF_TURN_VIEWS, VIEWS, AveragedOutputs, averaged_outputs

log = logging.getLogger(__name__)

# Pictures decoded at a time: each may hold 150 MB of pixels, and four are decoded faster than any processor predicts.
MAX_DECODING = 4

A = TypeVar("A")
B = TypeVar("B")


class Predictor:
    """A bundle, ready to answer.

    Args:
        bundle: a verified bundle.
        runtime: "openvino", "torch", or "auto": the exported graph where the bundle has one.
        precision: "f32", "bf16" or "auto": bf16 where it is clearly faster and gives the golden answers.
        threads: threads for one inference; None leaves it to the runtime.
        device: torch's name of the device, such as "cuda:0"; None: a GPU if there is one.
        version: the registry's version, repeated in answers.

    Raises:
        BundleError: an unknown runtime or precision, or a bundle that cannot run this way.
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
        self.bundle = bundle
        self.config = bundle.config
        self._one_at_a_time = threading.Lock()
        self.runtime = start_runtime(bundle, runtime, precision, threads, device)
        # Pillow and OpenCV release Python's lock, so the pictures of a batch are decoded and drawn in parallel.
        at_a_time = min(MAX_DECODING, threads or os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix="pictures")
        ignore_oddities()
        self._model = {
            "name": self.config.name,
            "version": version,
            "architecture": self.config.architecture,
            "digest": bundle.digest,
            "run_id": self.config.evidence.get("run_id"),
            "runtime": self.runtime.name,
            "precision": self.runtime.precision,
        }
        if choices := self.config.metadata.choices:
            self._model["takes"] = choices

    @classmethod
    def load(cls, path: Path | str, **options: Any) -> "Predictor":
        """Load and verify the bundle in folder `path`; options as for the class. Raises BundleError."""
        return cls(Bundle.load(path), **options)

    def golden_difference(self) -> float:
        """Return the largest difference of a probability from the bundle's golden answers; NaN if any is NaN.

        Raises ImageError if a golden picture cannot be decoded.
        """
        return golden_difference(self.bundle, self._run)

    def predict(self, requests: Sequence[Request | bytes]) -> list[Prediction | ImageError]:
        """Answer a batch, in order. A refused request gets its ImageError and does not disturb the others."""
        batch = [request if isinstance(request, Request) else Request(bytes(request)) for request in requests]
        decoded = list(self._map(self._decode, batch))
        accepted = [item for item in decoded if not isinstance(item, ImageError)]
        answers = iter(self._interpret(self._infer(accepted), accepted) if accepted else [])
        return [item if isinstance(item, ImageError) else next(answers) for item in decoded]

    def answer(self, requests: Sequence[Request]) -> list[Prediction | ImageError]:
        """Predict a batch. If it fails as a whole, predict each request alone, so that only the faulty one fails."""
        try:
            return self.predict(requests)
        except Exception:
            log.exception("A batch of %d failed.", len(requests))
            if len(requests) > 1:
                return [answer for request in requests for answer in self.answer([request])]
            return [ImageError(500, "internal_error", "The model failed on this request. See the server's log.")]

    def _map(self, function: Callable[[A], B], items: Sequence[A]) -> Iterable[B]:
        """Apply `function` to each item, in order; a single item needs no thread."""
        return self._threads.map(function, items) if len(items) > 1 else map(function, items)

    def _decode(self, request: Request) -> "_Accepted | ImageError":
        try:
            request = request.checked(self.config)
            pixels, decoded = self.config.preprocessing(request.image)
            is_shown = request.picture or request.gradcam == "overlay"
            shown = decode(request.image, SHOWN_MIN_SIDE).image if is_shown else None
            return _Accepted(request, pixels, decoded, shown)
        except ImageError as error:
            return error

    def _infer(self, accepted: list["_Accepted"]) -> AveragedOutputs:
        classes, requests = self.config.classes, [item.request for item in accepted]
        lesion_classes = len(classes) - (UNKNOWN in classes)
        # UNK has no logit unless the model was trained on it; its map is that of the top class.
        targets = np.array([classes.index(r.target) if r.target in classes else -1 for r in requests])
        metadata = np.stack([self.config.metadata.encode(r.metadata or {}) for r in requests])
        pictures = [item.pixels for item in accepted]
        augmented = [request.tta for request in requests]
        views = HALF_TURN_VIEWS if self.config.options.get("half_turn") else VIEWS
        return averaged_outputs(self._run, pictures, augmented, targets, metadata, lesion_classes, views)

    def _run(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the runtime, one call at a time: parallel calls would swap their answers."""
        with self._one_at_a_time:
            return self.runtime(*inputs)

    def _interpret(self, outputs: AveragedOutputs, accepted: list["_Accepted"]) -> list[Prediction]:
        classes, calibration = self.config.classes, self.config.calibration
        probabilities = calibration.probabilities(outputs.logits, classes, outputs.residuals)
        sets = calibration.conformal_sets(outputs.logits, classes, outputs.residuals)
        familiarity = calibration.familiarity(outputs.logits, classes, outputs.residuals)
        alarms = (calibration.malignant, calibration.melanoma)
        sensitivities = [item.request.sensitivity for item in accepted]
        malignant, melanoma = (calibration.suspicions(a, outputs.logits, classes, sensitivities) for a in alarms)
        # 0 * log 0 is 0
        entropy = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1))).sum(1)
        peaks = outputs.maps.max((1, 2), keepdims=True)
        grids = outputs.maps / np.where(peaks > 0, peaks, 1)

        def answer(row: int) -> Prediction:
            request, pixels, decoded, shown = accepted[row]
            drawn = request.gradcam != "none"
            return Prediction(
                probabilities=dict(zip(CODES, probabilities[row].tolist(), strict=True)),
                grid=np.round(grids[row].astype(float), 4).tolist() if drawn else None,
                target=classes[outputs.targets[row]] if drawn else None,
                overlay_png=overlay(shown, grids[row]) if shown and request.gradcam == "overlay" else None,
                picture_jpeg=picture_jpeg(shown) if shown and request.picture else None,
                entropy=float(entropy[row]),
                malignant=malignant[row] if malignant else None,
                melanoma=melanoma[row] if melanoma else None,
                conformal_set=sets[row] if sets else None,
                confidence_level=calibration.conformal.confidence_level if calibration.conformal else None,
                image=decoded,
                statistics=picture_statistics(pixels) | {"familiarity": float(familiarity[row])},
                model=self._model,
                metadata=request.metadata or {},
            )

        return list(self._map(answer, range(len(accepted))))


class _Accepted(NamedTuple):
    """A request that was accepted, the network's input, the decoded picture, and a larger one to be shown."""

    request: Request
    pixels: np.ndarray
    decoded: DecodedImage
    shown: Image.Image | None
