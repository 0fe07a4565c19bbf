"""A fake TorchServe with the same REST contract, for the tests of the page.

Its answers depend on the uploaded bytes alone, so the same picture always gets the same nine probabilities.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

from streamlit_app.answer_schema import Answer
from tests import http_stub

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens

CLASSES = {
    "MEL": ("Melanoma", True, "Malignant tumour of the pigment cells; early removal decides the outcome."),
    "NV": ("Melanocytic nevus", False, "Common mole: a benign growth of pigment cells."),
    "BCC": ("Basal cell carcinoma", True, "The most common skin cancer; grows locally and rarely spreads."),
    "AK": ("Actinic keratosis", False, "Precancerous sun damage that can progress to squamous cell carcinoma."),
    "BKL": ("Benign keratosis", False, "Seborrheic keratosis, solar lentigo or lichen-planus-like keratosis."),
    "DF": ("Dermatofibroma", False, "Benign firm nodule of fibrous tissue, often on the legs."),
    "VASC": ("Vascular lesion", False, "Angioma, angiokeratoma, pyogenic granuloma or haemorrhage: benign."),
    "SCC": ("Squamous cell carcinoma", True, "Skin cancer of the epidermis that can spread if untreated."),
    "UNK": ("None of the above", False, "The picture looks like no class the model was trained on."),
}
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"RIFF")
# The model server's copy of every picture.
PICTURE = base64.b64encode(cv2.imencode(".jpg", np.full((75, 100, 3), (80, 120, 200), np.uint8))[1]).decode()
PROMISES = [
    {"sensitivity": 0.8, "threshold": 0.6, "benign_flagged": 0.12},
    {"sensitivity": 0.9, "threshold": 0.3, "benign_flagged": 0.27},
    {"sensitivity": 0.99, "threshold": 0.02, "benign_flagged": 0.81},
]
TAKES = {"age": [0, 120], "sex": ["female", "male"], "site": ["anterior torso", "head/neck"]}


def answer_for(
    image: bytes,
    target: str | None = None,
    version: str = "3",
    takes: dict[str, list] | None = None,
    details: dict[str, str] | None = None,
    converted: Sequence[str] = (),
    promises: bool = True,
) -> dict[str, Any]:
    """Return the answer of schema 1 for these bytes and, if the model takes metadata, for these details."""
    digest = hashlib.sha256(image).hexdigest()
    seed = hashlib.sha256(image + json.dumps(details, sort_keys=True).encode()).hexdigest() if details else digest
    rng = np.random.default_rng(int(seed[:12], 16))
    logits = np.append(rng.normal(0, 1, 8), -1.5)
    logits[rng.integers(8)] += 2.5
    p = np.exp(logits) / np.exp(logits).sum()
    probabilities = dict(zip(CLASSES, p.tolist(), strict=True))
    malignant = sum(p for code, p in probabilities.items() if CLASSES[code][1])
    ranking = sorted(probabilities, key=probabilities.__getitem__, reverse=True)
    known = [code for code in ranking if code != "UNK"]
    target = known[0] if target in (None, "UNK") else target
    column, row = np.random.default_rng([int(digest[:12], 16), list(CLASSES).index(target)]).uniform(0.3, 0.7, 2)
    y, x = (np.mgrid[:14, :14] + 0.5) / 14
    heat = np.exp(-(((x - column) / 0.16) ** 2) - ((y - row) / 0.2) ** 2)
    return {
        "schema": 1,
        "model": {
            "name": "skin_vit",
            "version": version,
            "architecture": "vit_small_patch16_224",
            "digest": "sha256:" + hashlib.sha256(version.encode()).hexdigest(),
            "run_id": "0123456789abcdef0123456789abcdef",
            **({"takes": takes} if takes else {}),
        },
        "prediction": {
            "code": ranking[0],
            "name": CLASSES[ranking[0]][0],
            "probability": probabilities[ranking[0]],
            "malignant": CLASSES[ranking[0]][1],
        },
        "probabilities": probabilities,
        "classes": {
            code: {"name": name, "malignant": malignant, "description": description}
            for code, (name, malignant, description) in CLASSES.items()
        },
        "suspicion": {"malignant": malignant, "promises": PROMISES, "sensitivity": 0.9, "melanoma": None}
        | ({"melanoma": {"melanoma": probabilities["MEL"], "promises": PROMISES}} if promises else {"promises": []}),
        "uncertainty": {
            "entropy": float(-(p * np.log(p)).sum()),
            "conformal_set": [code for code in known if probabilities[code] > 0.08],
            "confidence_level": 0.9,
        },
        "gradcam": {"target": target, "grid": np.round(heat / heat.max(), 4).tolist(), "overlay_png": None},
        "image": {"width": 600, "height": 450, "sha256": digest, "converted": converted, "picture_jpeg": PICTURE},
        **({"metadata": {name: (details or {}).get(name) for name in takes}} if takes else {}),
        "disclaimer": "Research use only. Not a medical device.",
    }


def parse(image: bytes = b"x", **changes: Any) -> Answer:
    """Return the checked answer for these bytes, with some fields replaced."""
    return Answer.model_validate(answer_for(image) | changes)


def _form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields of a multipart body."""
    whole = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in whole.iter_parts()
    }


class FakeTorchServe:
    """A fake server on a free port of the loopback: `with FakeTorchServe() as server:`.

    `mode` decides about every prediction: "ok", "refuse", "too_large", "no_model", "busy", "broken", "redirect",
    "garbage" or "hang".
    """

    def __init__(self, port: int = 0) -> None:
        self.reset()
        self._ended = threading.Event()
        self._httpd = ThreadingHTTPServer(("127.0.0.1", port), http_stub.handler(self._answer, keep_alive=True))

    def reset(self) -> None:
        """Return to the behaviour of a new server."""
        self.mode, self.version = "ok", "3"
        self.busy_for = 0  # this many requests find no worker
        self.dies_for = 0  # this many requests kill the worker, and TorchServe itself answers
        self.fails_on: bytes | None = None  # the handler fails on this picture
        self.refuse_target: str | None = None  # a class that the model was not trained on
        self.converted: list[str] = []  # what the model server changed in every picture
        self.takes: dict[str, list] = {}  # the patient's details that the model takes
        self.targets: list[str | None] = []  # of every prediction, in order of arrival
        self.details: list[dict[str, str]] = []  # of every prediction, in order of arrival
        self.recorded: list[bool] = []  # whether the real server would log it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_address[1]}"

    def __enter__(self) -> "FakeTorchServe":
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def reply(self, image: bytes, target: str | None, details: dict[str, str]) -> tuple[int, Any]:
        """Return the status and body of one prediction."""
        self.targets.append(target)
        self.details.append(details)
        if self.mode == "hang":
            self._ended.wait(60)
        if self.busy_for > 0 or self.mode == "busy":
            self.busy_for -= 1
            return 503, _torchserve(503, "ServiceUnavailableException", 'Model "skin_vit" has no worker to serve.')
        if self.dies_for > 0:
            self.dies_for -= 1
            return 500, _torchserve(500, "InternalServerException", "Worker died.")
        if image == self.fails_on:
            return 500, {"error": {"code": "internal_error", "message": "The model failed on this request."}}
        if self.mode == "no_model":
            return 404, _torchserve(404, "ModelNotFoundException", "Model not found: skin_vit")
        if self.mode == "too_large":
            return 413, _torchserve(413, "TooLongFrameException", "content length exceeded 6553500 bytes.")
        if self.mode == "redirect":
            return 302, {}
        if self.mode == "broken":
            return 500, _torchserve(500, "InternalServerException", "Worker died.")
        if self.mode == "garbage":
            return 200, ["<html>"]
        if self.mode == "refuse":
            return 400, {"error": {"code": "invalid_image", "message": "The image is damaged and cannot be decoded."}}
        if not image.startswith(SIGNATURES):
            return 415, {"error": {"code": "unsupported_media_type", "message": "This is not a JPEG or PNG image."}}
        if target is not None and (target not in CLASSES or target == self.refuse_target):
            return 400, {"error": {"code": "invalid_request", "message": f"The model was not trained on {target}."}}
        if extra := set(details) - set(self.takes):
            return 400, {"error": {"code": "invalid_request", "message": f"This model takes no {min(extra)}."}}
        return 200, answer_for(image, target, self.version, self.takes, details, self.converted)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> http_stub.Answer:
        if request.command == "GET":
            status, value = (200, {"status": "Healthy"}) if request.path == "/ping" else (404, {})
        else:
            kind = request.headers["Content-Type"]
            fields = _form(kind, body) if kind.startswith("multipart/form-data") else {"data": body}
            image = fields.pop("data")
            details = {name: value.decode() for name, value in fields.items()}
            details.pop("picture", None)
            self.recorded.append(request.headers.get("X-Record") != "no")
            status, value = self.reply(image, details.pop("target", None), details)
        headers = {"Content-Type": "application/json"} | ({"Location": "/ping"} if status == 302 else {})
        return http_stub.Answer(status, json.dumps(value).encode(), headers)


def _torchserve(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"code": status, "type": kind, "message": message}


if __name__ == "__main__":  # by hand: python -m tests.fake_torchserve, then TORCHSERVE_URL=… streamlit run …
    with FakeTorchServe() as server:
        print(server.url, flush=True)
        time.sleep(86400)
