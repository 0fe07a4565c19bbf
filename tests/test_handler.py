"""The TorchServe handler with a fake context: raw, form and JSON requests, each with its own answer."""

import base64
import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch

from handlers import skin_lesion_handler
from handlers.bundle import BundleError
from handlers.reference import drift_values
from handlers.skin_lesion_handler import SkinLesionHandler
from handlers.taxonomy import CODES
from tests.models import tiny_bundle
from tests.test_privacy import traces


class FakeContext:
    """The part of ts.context.Context that the handler uses."""

    def __init__(self, folder, explain=False):
        self.system_properties = {"model_dir": str(folder)}
        self.manifest = {"model": {"modelName": "skin_vit", "modelVersion": "3"}}
        self.model_yaml_config = {"handler": {"precision": "f32", "threads": 1}}
        self.explain = explain
        self.statuses = {}
        self.types = {}

    def get_request_header(self, index, key):
        return "True" if self.explain and key == "explain" else None

    def get_request_id(self, index):
        return f"request-{index}"

    def set_response_status(self, code=200, phrase="", idx=0):
        self.statuses[idx] = code

    def set_response_content_type(self, idx, value):
        self.types[idx] = value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model_dir")
    tiny_bundle(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def handler(folder):
    handler = SkinLesionHandler()
    handler.initialize(FakeContext(folder))
    return handler


@pytest.fixture
def ask(handler, folder):
    def ask(*rows, explain=False):
        context = FakeContext(folder, explain)
        answers = [json.loads(answer) for answer in handler.handle(list(rows), context)]
        assert set(context.types.values()) == {"application/json"}
        return [(context.statuses.get(index, 200), answer) for index, answer in enumerate(answers)]

    return ask


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_torchserve_finds_exactly_one_class():
    # as ts.utils.util.list_classes_from_module looks for it
    classes = [value for value in vars(skin_lesion_handler).values() if isinstance(value, type)]
    assert [value for value in classes if value.__module__ == skin_lesion_handler.__name__] == [SkinLesionHandler]


def test_raw_form_and_json_give_the_same_answer(ask, sample_images):
    image = sample_images[0]
    answers = ask(
        {"body": bytearray(image)},
        {"data": bytearray(image)},
        {"file": bytearray(image)},
        {"image": bytearray(image), "gradcam": bytearray(b"grid"), "tta": bytearray(b"false")},
        {"body": {"image": encoded(image)}},
        {"body": {"data": encoded(image), "gradcam": "grid", "tta": False}},
    )
    for status, answer in answers:
        assert status == 200
        assert answer["model"]["version"] == "3"
        assert list(answer["probabilities"]) == list(CODES)
        assert answer["probabilities"] == pytest.approx(answers[0][1]["probabilities"], abs=1e-6)


def test_options_reach_the_predictor(ask, sample_images):
    image = bytearray(sample_images[0])
    form, as_json, plain = ask(
        {"data": image, "gradcam": bytearray(b"overlay"), "target": bytearray(b"BCC")},
        {"body": {"image": encoded(bytes(image)), "target": "DF", "tta": True}},
        {"data": image, "gradcam": bytearray(b"none"), "picture": bytearray(b"true")},
    )
    assert base64.b64decode(plain[1]["image"]["picture_jpeg"]).startswith(b"\xff\xd8\xff")
    assert form[1]["gradcam"]["target"] == "BCC"
    assert base64.b64decode(form[1]["gradcam"]["overlay_png"]).startswith(b"\x89PNG")
    assert as_json[1]["gradcam"]["target"] == "DF"
    assert plain[1]["gradcam"] is None


def test_explanations_come_with_the_overlay(ask, sample_images):
    [(status, answer)] = ask({"body": bytearray(sample_images[0])}, explain=True)
    assert status == 200
    assert answer["gradcam"]["overlay_png"]


@pytest.mark.parametrize(
    ("row", "status", "code", "words"),
    [
        ({"body": bytearray(b"")}, 400, "empty_image", "no image"),
        ({"body": bytearray(b"\xff\xd8\xff" + bytes(32 << 20))}, 413, "image_too_large", "33,554,432 bytes"),
        ({"body": bytearray(b"BM" + bytes(150 << 20))}, 413, "image_too_large", "157,286,400 bytes"),
        ({"body": bytearray(b"BM" + bytes(33 << 20))}, 400, "invalid_image", "damaged"),
        ({"body": bytearray(b"{'broken json")}, 415, "unsupported_media_type", "looks like JSON"),
        ({"body": "some text"}, 415, "unsupported_media_type", "text"),
        ({"data": "some text"}, 415, "unsupported_media_type", "holds text"),
        ({"body": ["list"]}, 400, "invalid_request", "is not an object"),
        ({"body": None}, 400, "invalid_request", "is not an object"),
        ({"body": {}}, 400, "invalid_request", "has no image"),
        ({"body": {"image": 5}}, 400, "invalid_request", "not valid base64"),
        ({"body": {"image": ["aGk="]}}, 400, "invalid_request", "must be a string"),
        ({"body": {"image": "!!"}}, 400, "invalid_request", "not valid base64"),
        ({"body": {"image": ""}}, 400, "empty_image", "no image"),
        ({"body": {"image": "aGk=", "file": "aGk="}}, 400, "invalid_request", "Send one image"),
        ({"gradcam": bytearray(b"grid")}, 400, "invalid_request", "has no image"),
        ({"data": bytearray(b"x"), "tta": bytearray(b"maybe")}, 400, "invalid_request", "true or false"),
        ({"data": bytearray(b"x"), "target": bytearray(b"\xff\xfe")}, 400, "invalid_request", "plain ASCII text"),
        ({"data": bytearray(b"x"), "target": {"a": 1}}, 400, "invalid_request", "plain ASCII text"),
        ({"data": bytearray(b"x"), "body": bytearray(b"x")}, 400, "invalid_request", "not an option"),
        ({"data": bytearray(b"x"), "colour": bytearray(b"red")}, 400, "invalid_request", "not an option"),
        ({"data": bytearray(b"x"), "age": bytearray(b"55")}, 400, "invalid_request", "takes no age"),
        (
            {"data": bytearray(b"x"), "target": bytearray(b"XYZ")},
            400,
            "invalid_request",
            "'XYZ': it must be one of MEL",
        ),
    ],
)
def test_a_refused_request_does_not_affect_the_others(ask, sample_images, row, status, code, words):
    good = {"body": bytearray(sample_images[0])}
    before, refused, after = ask(good, row, good)
    assert (before[0], after[0]) == (200, 200)
    assert refused[0] == status
    assert refused[1]["error"]["code"] == code
    assert words in refused[1]["error"]["message"]


def test_a_prediction_and_a_refusal_are_one_line_each_for_the_log(folder, sample_images, monkeypatch, caplog):
    monkeypatch.setenv("LOG_PREDICTIONS", "1")
    handler = SkinLesionHandler()
    context = FakeContext(folder)
    handler.initialize(context)
    with caplog.at_level("INFO"):
        _, answer = handler.handle([{"body": bytearray(b"bad")}, {"body": bytearray(sample_images[0])}], context)
    [line] = [record.message for record in caplog.records if record.message.startswith("prediction {")]
    row, body = json.loads(line.removeprefix("prediction ")), json.loads(answer)
    assert row["request_id"] == "request-1"
    assert row["image_sha256"] == body["image"]["sha256"]
    assert (row["model"], row["version"], row["digest"]) == ("skin_vit", "3", body["model"]["digest"])
    assert row["probabilities"] == pytest.approx(body["probabilities"], abs=1e-6)
    assert row["milliseconds"] > 0
    assert datetime.fromisoformat(row["time"]).tzinfo
    assert row["metadata_sent"] == {}
    assert (row["width"], row["height"]) == (body["image"]["width"], body["image"]["height"])
    assert row["entropy"] == pytest.approx(body["uncertainty"]["entropy"], abs=1e-6)
    assert row["set"] == body["uncertainty"]["conformal_set"]
    assert row["flagged"] == (body["suspicion"] or {}).get("flagged")
    values = drift_values(row["width"], row["height"], row["statistics"], list(row["probabilities"].values()))
    assert np.isfinite(values).all()
    assert len(row["statistics"]) == 6
    assert len(row) == 15, "nothing else about the picture or its sender"
    [line] = [record.message for record in caplog.records if record.message.startswith("refusal {")]
    refusal = json.loads(line.removeprefix("refusal "))
    assert datetime.fromisoformat(refusal.pop("time")).tzinfo
    assert refusal == {"request_id": "request-0", "version": "3", "code": "unsupported_media_type", "status": 415}

    caplog.clear()
    monkeypatch.delenv("LOG_PREDICTIONS")
    silent = SkinLesionHandler()
    silent.initialize(context)
    silent.handle([{"body": bytearray(sample_images[0])}], context)
    assert "prediction {" not in caplog.text
    assert "refusal {" not in caplog.text


def test_torch_uses_the_gpu_that_torchserve_assigns(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(skin_lesion_handler.Predictor, "load", lambda path, **options: seen.append(options))
    context = FakeContext(folder)
    for number, usable, expected in (
        (None, True, ("auto", None)),
        (1, True, ("torch", "cuda:1")),
        (0, False, ("auto", None)),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        context.system_properties["gpu_id"] = number
        SkinLesionHandler().initialize(context)
        assert (seen[-1]["runtime"], seen[-1]["device"]) == expected


def test_an_exception_inside_is_answered_and_logged_without_content(
    handler, folder, sample_images, monkeypatch, caplog
):
    def fail(requests):
        raise RuntimeError("boom")

    monkeypatch.setattr(handler.predictor, "predict", fail)
    context = FakeContext(folder)
    [answer] = handler.handle([{"body": bytearray(sample_images[0])}], context)
    assert context.statuses == {0: 500}
    assert json.loads(answer)["error"]["code"] == "internal_error"
    assert "boom" in caplog.text
    assert traces(caplog.text.encode(), sample_images[0]) == []


def test_a_request_that_makes_the_model_fail_fails_alone(handler, folder, sample_images, monkeypatch):
    predict_all = handler.predictor.predict

    def predict(requests):
        if any(request.target == "DF" for request in requests):
            raise RuntimeError("boom")
        return predict_all(requests)

    monkeypatch.setattr(handler.predictor, "predict", predict)
    context, good = FakeContext(folder), {"data": bytearray(sample_images[0])}
    answers = handler.handle([good, good | {"target": bytearray(b"DF")}, good], context)
    assert context.statuses == {1: 500}
    assert [b"probabilities" in answer for answer in answers] == [True, False, True]


def test_a_long_option_is_refused_without_being_quoted(ask, sample_images):
    for value in (bytearray(b"x" * 5_000_000), "x" * 5_000_000):
        [(status, answer)] = ask({"data": bytearray(sample_images[0]), "target": value})
        assert status == 400
        assert len(answer["error"]["message"]) < 100


def test_a_damaged_bundle_stops_the_worker(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "bundle" / "graph.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="is damaged"):
        SkinLesionHandler().initialize(FakeContext(copy))
