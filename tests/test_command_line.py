"""predict.py and explain.py: answers on stdout, errors as sentences on stderr, and the documented exit codes."""

import json
import sys

import pytest

from handlers.taxonomy import CODES
from mlflow_tracking import command_line
from scripts import explain, predict
from tests.http_stub import Answer, serve
from tests.models import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path


@pytest.fixture
def image(tmp_path, sample_images):
    path = tmp_path / "lesion.jpg"
    path.write_bytes(sample_images[0])
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process; return its exit code, stdout and stderr."""

    def run(command, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            command_line.run(command.main)
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_predict_from_a_bundle_in_json(run, bundle, image, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    code, output, _ = run(predict, image, text, tmp_path / "absent.jpg", "--bundle", bundle, "--json")
    good, refused, absent = map(json.loads, output.splitlines())
    assert code == 1
    assert list(good["probabilities"]) == list(CODES)
    assert refused["error"]["code"] == "unsupported_media_type"
    assert "No such file" in absent["error"]["message"]


def test_predict_prints_a_table(run, bundle, image):
    code, output, _ = run(predict, image, "--bundle", bundle)
    assert code == 0
    assert "lesion.jpg" in output
    assert "Research use only" in output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--bundle", "/nowhere"), 1, "/nowhere is not a bundle"),
        (("--url", "http://127.0.0.1:9"), 3, "TorchServe does not answer"),
        (("--bundle", "/nowhere", "--version", "1"), 2, "Use one or the other"),
        (("--bundle", "/nowhere", "--url", "http://127.0.0.1:9"), 2, "Use one or the other"),
        (("--url", "127.0.0.1:8080"), 2, "--url is '127.0.0.1:8080'. Use an address"),
    ],
)
def test_predict_ends_with_a_sentence(run, image, options, code, message):
    ended, _, errors = run(predict, image, *options)
    assert ended == code
    assert message in errors


@pytest.mark.parametrize(
    ("status", "body", "suffix", "hint"),
    [
        (413, b"", "", "too large"),
        (405, b"<html>", "/predictions/skin_vit", "Check that TorchServe runs at http://127.0.0.1:"),
    ],
)
def test_predict_continues_after_an_answer_without_json(run, image, status, body, suffix, hint):
    """TorchServe answers a too large request with an empty 413. --url may be the whole prediction address."""

    def answer(request, _):
        return Answer(status if request.path == "/predictions/skin_vit" else 404, body)

    with serve(answer) as url:
        code, output, _ = run(predict, image, image, "--json", "--url", url + suffix)
    assert code == 1
    answers = [json.loads(line) for line in output.splitlines()]
    assert [str(status) in answer["error"]["message"] for answer in answers] == [True, True]
    assert all(hint in answer["error"]["message"] for answer in answers)


def test_explain_writes_the_overlay(run, bundle, image, tmp_path):
    output = tmp_path / "new" / "overlay.png"
    code, text, _ = run(explain, "--image", image, "--output", output, "--bundle", bundle, "--target", "BCC")
    assert code == 0
    assert "BCC" in text
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "code", "message"),
    [
        ("--image", "[red]mole.jpg", 1, "[red]mole.jpg: No such file or directory.\n"),
        ("--target", "XYZ", 1, "target is 'XYZ': it must be one of"),
        ("--bundle", ".", 1, "is not a bundle"),
        ("--output", ".", 2, "ends in .png"),
        ("--output", "heatmap.jpg", 2, "ends in .png"),
    ],
)
def test_explain_ends_with_a_sentence_and_writes_nothing(run, bundle, image, tmp_path, option, value, code, message):
    options = {"--image": image, "--output": tmp_path / "o.png", "--bundle": bundle}
    options[option] = value if option == "--target" else tmp_path / value
    ended, _, errors = run(explain, *(word for pair in options.items() for word in pair))
    assert ended == code
    assert message in errors
    assert list(tmp_path.iterdir()) == [image]
