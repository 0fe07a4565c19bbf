"""The TorchServe handler: batches of requests in, JSON and status codes out.

A request is the image's bytes as the body, a multipart form, or JSON with the image in base64; docs/api.md has the
contract. Every prediction is logged as one line, `prediction {...}`, and every refusal as `refusal {...}`, which
TorchServe writes to a file of its own (torchserve/log4j2.xml). They hold age, sex and site if the client sent them and
the model takes them, but neither pixels nor names. Without LOG_PREDICTIONS in the environment there is no log. With
KEPT_IMAGES, a folder, copies of answered pictures are kept there for review (handlers/kept_image_writer.py). A request
with the header `X-Record: no` is neither logged nor kept.

TorchServe uses the only class defined in this module, so keep it the only one.
"""

import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.errors import ImageError
from handlers.kept_image_writer import ImageKeeper
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.request_parsing import parse_request

log = logging.getLogger(__name__)


class SkinLesionHandler:
    """Call `initialize` once when the worker starts, then `handle` for every batch."""

    def __init__(self) -> None:
        self.predictor: Predictor | None = None
        self.logs_predictions = "LOG_PREDICTIONS" in os.environ
        kept_images = os.environ.get("KEPT_IMAGES")
        self.keeper = ImageKeeper(Path(kept_images)) if kept_images else None

    def initialize(self, context: Any) -> None:
        """Load and verify the bundle in the archive. Raises BundleError, which stops the worker."""
        settings = (context.model_yaml_config or {}).get("handler", {})
        device = _gpu(context.system_properties.get("gpu_id"))
        self.predictor = Predictor.load(
            Path(context.system_properties["model_dir"]) / "bundle",
            runtime="torch" if device else "auto",
            device=device,
            precision=settings.get("precision", "auto"),
            threads=settings.get("threads"),
            version=context.manifest["model"]["modelVersion"],
        )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request of the batch. A bad request gets its own error and does not disturb the others."""
        began = time.perf_counter()
        answers: list[Any] = []
        for index, row in enumerate(data):
            try:
                answers.append(parse_request(row, explain=context.get_request_header(index, "explain") == "True"))
            except ImageError as error:
                answers.append(error)
        positions = [index for index, answer in enumerate(answers) if isinstance(answer, Request)]
        requests = [answers[index] for index in positions]
        assert self.predictor is not None, "TorchServe calls initialize first"
        predictions = self.predictor.answer(requests)
        for index, prediction in zip(positions, predictions, strict=True):
            answers[index] = prediction
        responses = [_respond(answer, context, index) for index, answer in enumerate(answers)]
        recorded = [index for index in range(len(answers)) if _is_recorded(context, index)]
        if self.keeper:
            for index, request in zip(positions, requests, strict=True):
                if index in recorded and isinstance(answers[index], Prediction):
                    self.keeper.keep(answers[index].image.sha256, request.image)
        if self.logs_predictions:
            milliseconds = round(1000 * (time.perf_counter() - began), 1)
            for index in recorded:
                answer = answers[index]
                request = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
                request |= {"request_id": context.get_request_id(index)}
                if isinstance(answer, Prediction):
                    log.info("prediction %s", _json(request | _prediction_fields(answer, milliseconds)))
                else:
                    version = context.manifest["model"]["modelVersion"]
                    refusal = {"version": version, "code": answer.code, "status": answer.status}
                    log.info("refusal %s", _json(request | refusal))
        return responses


def _gpu(number: int | None) -> str | None:
    """Return torch's name of the GPU that TorchServe assigned to this worker; None without one that torch can use."""
    if number is None:
        return None
    import torch

    return f"cuda:{number}" if torch.cuda.is_available() else None


def _is_recorded(context: Any, index: int) -> bool:
    """Return whether a request may be logged and its picture kept. TorchServe leaves the names of headers as sent."""
    return all(context.get_request_header(index, name) != "no" for name in ("X-Record", "x-record"))


def _respond(answer: Prediction | ImageError, context: Any, index: int) -> bytes:
    context.set_response_content_type(index, "application/json")
    if isinstance(answer, ImageError):
        context.set_response_status(answer.status, answer.code, index)
        body: dict[str, Any] = {"error": {"code": answer.code, "message": str(answer)}}
    else:
        body = answer.to_dict()
    return _json(body).encode()


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False)


def _prediction_fields(answer: Prediction, milliseconds: float) -> dict[str, Any]:
    """Return what the log keeps of a prediction. `milliseconds` is the time of the batch, the same for each request."""
    return {
        "image_sha256": answer.image.sha256,
        "metadata_sent": {name: value for name, value in answer.metadata.items() if value is not None},
        "model": answer.model["name"],
        "version": answer.model["version"],
        "digest": answer.model["digest"],
        "probabilities": {code: round(probability, 6) for code, probability in answer.probabilities.items()},
        "entropy": round(answer.entropy, 6),
        "set": answer.conformal_set,
        "flagged": None if answer.malignant is None else answer.malignant.flagged,
        "width": answer.image.width,
        "height": answer.image.height,
        "statistics": {name: round(value, 4) for name, value in answer.statistics.items()},
        "milliseconds": milliseconds,
    }
