"""TorchServe's door to the predictor: requests in, JSON and status codes out.

A request is the image's bytes as the body; or a multipart form with the file in `data`, `file` or `image` and options
as fields; or JSON with the image in base64 under `image` and options beside it. See README.md for the contract.

Every prediction is one line on standard output, `prediction {...}`, which TorchServe keeps in a file of its own
(torchserve/log4j2.xml): when, request id, the picture's SHA-256, which of age, sex and site were told, version and
digest, probabilities, milliseconds in here; neither pixels nor names. Where LOG_PREDICTIONS is not set there is none.

TorchServe takes the one class in this module; keep it one.
"""

import base64
import binascii
import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.metadata import FIELDS
from handlers.predictor import Prediction, Predictor, Request, RequestError
from handlers.preprocessing import MAX_BYTES, ImageError

log = logging.getLogger(__name__)

IMAGE_FIELDS = ("data", "file", "image")
OPTIONS = ("gradcam", "target", "tta")
# Characters. A refusal quotes what was sent, and an answer larger than TorchServe's max_response_size costs the worker.
LONGEST_OPTION = 40


class SkinLesionHandler:
    """Answers a batch: `initialize` once at worker start, then `handle` for every batch."""

    def __init__(self) -> None:
        self.predictor: Predictor | None = None
        self.logs_predictions = "LOG_PREDICTIONS" in os.environ

    def initialize(self, context: Any) -> None:
        """Load and verify the bundle that lies in the archive. Raises BundleError, which stops the worker."""
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
        """Answer each request of the batch by itself; one bad request disturbs no other, and nothing escapes."""
        assert self.predictor is not None, "TorchServe calls initialize first"
        began = time.perf_counter()
        answers: list[Any] = []
        for index, row in enumerate(data):
            try:
                answers.append(_parse(row, explain=context.get_request_header(index, "explain") == "True"))
            except ImageError as error:
                answers.append(error)
        positions = [index for index, answer in enumerate(answers) if isinstance(answer, Request)]
        predictions = self._predict([answers[index] for index in positions])
        for index, prediction in zip(positions, predictions, strict=True):
            answers[index] = prediction
        responses = [_respond(answer, context, index) for index, answer in enumerate(answers)]
        if self.logs_predictions:
            milliseconds = round(1000 * (time.perf_counter() - began), 1)
            for index, answer in enumerate(answers):
                if isinstance(answer, Prediction):
                    log.info("prediction %s", _line(answer, context.get_request_id(index), milliseconds))
        return responses

    def _predict(self, requests: list[Request]) -> list[Prediction | ImageError]:
        """Predictions of a batch; if it fails as a whole, of each request by itself, as one alone may be to blame."""
        assert self.predictor is not None
        try:
            return self.predictor.predict(requests)
        except Exception:
            # Without this, one request that cannot be computed would take its whole batch with it.
            log.exception("a batch of %d failed", len(requests))
            if len(requests) > 1:
                return [answer for request in requests for answer in self._predict([request])]
            return [ImageError(500, "internal_error", "The model failed on this request; see its log.")]


def _gpu(number: int | None) -> str | None:
    """torch's name of the GPU that TorchServe gave this worker, if it did and this torch can use it."""
    if number is None:
        return None
    import torch

    return f"cuda:{number}" if torch.cuda.is_available() else None


def _respond(answer: Any, context: Any, index: int) -> bytes:
    context.set_response_content_type(index, "application/json")
    if isinstance(answer, ImageError):
        context.set_response_status(answer.status, answer.code, index)
        body: dict[str, Any] = {"error": {"code": answer.code, "message": str(answer)}}
    else:
        body = answer.to_dict()
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def _line(answer: Prediction, request_id: str | None, milliseconds: float) -> str:
    """The prediction log's line; `milliseconds` are those of the whole batch, which every request in it waits for."""
    row = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "image_sha256": answer.image.sha256,
        "told": [name for name, value in answer.metadata.items() if value is not None],
        "model": answer.model["name"],
        "version": answer.model["version"],
        "digest": answer.model["digest"],
        "probabilities": {code: round(probability, 6) for code, probability in answer.probabilities.items()},
        "milliseconds": milliseconds,
    }
    return json.dumps(row, separators=(",", ":"))


def _parse(row: dict[str, Any], explain: bool) -> Request:
    """TorchServe's row for one request to a Request. Raises RequestError or ImageError."""
    # Not a form with a field of that name, whose other fields would be passed over.
    body = row["body"] if row.keys() == {"body"} else row
    if isinstance(body, str):  # TorchServe decodes text/* bodies
        raise ImageError(415, "unsupported_media_type", "The body is text; send image bytes, a form or JSON.")
    if isinstance(body, bytes | bytearray):
        if body[:1] in (b"{", b"["):  # TorchServe parses JSON that is called so, and hands over as bytes what it cannot
            message = "The body is no image; it begins as JSON does, but is not valid JSON, or is not called so."
            raise ImageError(415, "unsupported_media_type", message)
        fields: dict[str, Any] = {"image": bytes(body)}
    elif isinstance(body, dict):
        fields = {str(name): value for name, value in body.items()}
        if body is not row:
            fields = _from_json(fields)
    else:
        raise RequestError('A JSON body must be an object such as {"image": "<base64>"}.')
    image = _image(fields)
    options = {name: _text(name, value) for name, value in fields.items()}
    for name in options:
        if name not in (*OPTIONS, *FIELDS):
            raise RequestError(f"{name[:40]!r} is not an option; there are {', '.join((*OPTIONS, *FIELDS))}.")
    default = "overlay" if explain else "grid"
    return Request(
        image,
        options.get("gradcam", default),
        options.get("target"),
        _flag(options.get("tta", "false")),
        {name: options[name] for name in FIELDS if name in options},
    )


def _from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """The image out of its base64; true, false, an age and a null that stands for one as form fields have them."""
    for name, value in fields.items():
        if isinstance(value, bool):
            fields[name] = str(value).lower()
        elif name in FIELDS and (value is None or isinstance(value, int | float)):
            fields[name] = "" if value is None else str(value)
        elif not isinstance(value, str):
            other = "number" if name in FIELDS else "boolean"
            raise RequestError(f"{name[:40]!r} in JSON must be a string or a {other}.")
    for name in IMAGE_FIELDS:
        if name in fields:
            encoded = fields[name]
            if len(encoded) > MAX_BYTES * 4 // 3 + 4:
                raise ImageError(413, "image_too_large", f"The image is larger than {MAX_BYTES:,} bytes.")
            try:
                fields[name] = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise RequestError(f"{name!r} is not base64 (without line breaks or a data: prefix).") from error
    return fields


def _image(fields: dict[str, Any]) -> bytes:
    """Take the one image out of the fields, leaving the options."""
    given = [name for name in IMAGE_FIELDS if name in fields]
    if not given:
        raise RequestError(f"No image: send it as the body or in one of the fields {', '.join(IMAGE_FIELDS)}.")
    if len(given) > 1:
        raise RequestError(f"One image a request, please; there are {' and '.join(given)}.")
    image = fields.pop(given[0])
    if not isinstance(image, bytes | bytearray):  # TorchServe decodes parts that call themselves text
        raise ImageError(415, "unsupported_media_type", f"{given[0]!r} holds text; send image bytes.")
    return bytes(image)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        value = bytes(value).decode("ascii", errors="replace")
    if not isinstance(value, str) or not value.isascii():  # TorchServe parses parts that call themselves JSON
        raise RequestError(f"The option {name[:40]!r} is not plain text.")
    if len(value) > LONGEST_OPTION:
        raise RequestError(f"The option {name[:40]!r} is longer than any value it takes.")
    return value.strip()


def _flag(value: str) -> bool:
    if value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise RequestError(f"tta must be true or false, not {value[:40]!r}.")
