"""Request parsing: TorchServe's row for one HTTP request to a Request.

A row is the body under "body", or the fields of a multipart form. TorchServe decodes bodies and parts that call
themselves text or JSON before they arrive here.
"""

import base64
import binascii
from typing import Any

from handlers.errors import ImageError
from handlers.file_limits import MAX_BYTES, MAX_UNCOMPRESSED_BYTES
from handlers.image_formats import image_format
from handlers.metadata import FIELDS
from handlers.request import Request, RequestError

UNCOMPRESSED = ("BMP", "TIFF", "DICOM")
IMAGE_FIELDS = ("data", "file", "image")
OPTIONS = ("gradcam", "target", "tta", "picture", "sensitivity", *FIELDS)
# Characters. A refusal quotes the value, and a response larger than TorchServe's max_response_size kills the worker.
LONGEST_OPTION = 40


def parse_request(row: dict[str, Any], explain: bool) -> Request:
    """Parse one row; `explain` requests the overlay by default. Raises RequestError or ImageError."""
    # A form with a field named "body" has other keys as well, unless that is its only field.
    body = row["body"] if row.keys() == {"body"} else row
    if isinstance(body, str):
        raise ImageError(
            415, "unsupported_media_type", "The body is text. Send the image's bytes, a multipart form or JSON."
        )
    if isinstance(body, bytes | bytearray):
        if body[:1] in (b"{", b"["):  # TorchServe passes JSON on as bytes if it is invalid or not labelled as JSON
            raise ImageError(
                415,
                "unsupported_media_type",
                "The body looks like JSON. Send valid JSON with `Content-Type: application/json`.",
            )
        fields: dict[str, Any] = {"image": bytes(body)}
    elif isinstance(body, dict):
        fields = {str(name): value for name, value in body.items()}
        if body is not row:
            fields = _from_json(fields)
    else:
        raise RequestError('The JSON body is not an object. Send an object such as {"image": "<base64>"}.')
    image = _take_image(fields)
    options = {name: _text(name, value) for name, value in fields.items()}
    for name in options:
        if name not in OPTIONS:
            raise RequestError(f"{name[:40]!r} is not an option. The options are {', '.join(OPTIONS)}.")
    return Request(
        image,
        options.get("gradcam", "overlay" if explain else "grid"),
        options.get("target"),
        _flag("tta", options),
        {name: options[name] for name in FIELDS if name in options},
        _flag("picture", options),
        _sensitivity(options),
    )


def _from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Decode the image's base64, and turn booleans, numbers and null into the texts of form fields."""
    for name, value in fields.items():
        if value is None or isinstance(value, bool | int | float):
            fields[name] = "" if value is None else str(value).lower()
        elif not isinstance(value, str):
            raise RequestError(f"{name[:40]!r} has the wrong type in JSON: it must be a string, number or boolean.")
    for name in IMAGE_FIELDS:
        if name in fields:
            encoded = fields[name]
            try:
                fields[name] = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise RequestError(
                    f"{name!r} is not valid base64. Encode the image without line breaks and without a data: prefix."
                ) from error
    return fields


def _take_image(fields: dict[str, Any]) -> bytes:
    """Remove the one image from the fields and return it."""
    names = [name for name in IMAGE_FIELDS if name in fields]
    if not names:
        raise RequestError(
            f"The request has no image. Send it as the body or in one of the fields {', '.join(IMAGE_FIELDS)}."
        )
    if len(names) > 1:
        raise RequestError(f"The request has several images ({', '.join(names)}). Send one image per request.")
    image = fields.pop(names[0])
    if not isinstance(image, bytes | bytearray):
        raise ImageError(
            415, "unsupported_media_type", f"The field {names[0]!r} holds text. Send the image's bytes as a file."
        )
    image = bytes(image)
    if len(image) > MAX_BYTES:
        limit = MAX_UNCOMPRESSED_BYTES if image_format(image) in UNCOMPRESSED else MAX_BYTES
        if len(image) > limit:
            raise ImageError(
                413, "image_too_large", f"The image has {len(image):,} bytes; the limit is {limit:,} bytes."
            )
    return image


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        value = bytes(value).decode("ascii", errors="replace")
    if not isinstance(value, str) or not value.isascii():
        raise RequestError(f"The option {name[:40]!r} must be plain ASCII text.")
    if len(value) > LONGEST_OPTION:
        raise RequestError(f"The option {name[:40]!r} may have at most {LONGEST_OPTION} characters.")
    return value.strip()


def _sensitivity(options: dict[str, str]) -> float | None:
    text = options.get("sensitivity", "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"sensitivity is {text!r}: it must be a number such as 0.9.") from None


def _flag(name: str, options: dict[str, str]) -> bool:
    value = options.get(name, "false")
    if value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise RequestError(f"{name} is {value!r}: it must be true or false.")
