"""predict.py and explain.py: answers to stdout, refusals as sentences, exit codes a script can rely on."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from handlers.taxonomy import CODES
from tests.models import tiny_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path


@pytest.fixture
def image(tmp_path, sample_images):
    path = tmp_path / "lesion.jpg"
    path.write_bytes(sample_images[0])
    return path


def run(script, *args):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, args)], capture_output=True, text=True, timeout=60
    )


def test_predict_from_a_bundle_in_json(bundle, image, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    done = run("predict.py", image, text, tmp_path / "absent.jpg", "--bundle", bundle, "--json")
    good, refused, absent = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert list(good["probabilities"]) == list(CODES)
    assert refused["error"]["code"] == "unsupported_media_type"
    assert "No such file" in absent["error"]["message"]


def test_predict_prints_a_table(bundle, image):
    done = run("predict.py", image, "--bundle", bundle)
    assert done.returncode == 0
    assert "lesion.jpg" in done.stdout
    assert "Research use only" in done.stdout


@pytest.mark.parametrize(("code", "options"), [(1, ("--bundle", "/nowhere")), (3, ("--url", "http://127.0.0.1:9"))])
def test_predict_says_in_a_sentence_what_is_missing(image, code, options):
    done = run("predict.py", image, *options)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "." in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bundle", "/nowhere", "--version", "1"), "Give one of them"),
        (("--bundle", "/nowhere", "--url", "http://127.0.0.1:9"), "Give one of them"),
        (("--url", "127.0.0.1:8080"), "--url must be an address"),
    ],
)
def test_predict_refuses_options_that_do_not_go_together(image, options, message):
    done = run("predict.py", image, *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("status", "body", "suffix", "hint"),
    [
        (413, b"", "", "too large"),
        (405, b"<html>", "/predictions/skin_vit", "is TorchServe at http://127.0.0.1:"),
    ],
)
def test_predict_goes_on_after_an_answer_that_is_no_json(image, status, body, suffix, hint):
    """TorchServe refuses more than its max_request_size with an empty 413. Its address may be that of README's curl."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status if self.path == "/predictions/skin_vit" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run(
            "predict.py", image, image, "--json", "--url", f"http://127.0.0.1:{server.server_address[1]}{suffix}"
        )
        server.shutdown()
    assert done.returncode == 1
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [str(status) in answer["error"]["message"] for answer in answers] == [True, True]
    assert all(hint in answer["error"]["message"] for answer in answers)


def test_explain_writes_the_overlay(bundle, image, tmp_path):
    output = tmp_path / "new" / "overlay.png"
    done = run("explain.py", "--image", image, "--output", output, "--bundle", bundle, "--target", "BCC")
    assert done.returncode == 0, done.stderr
    assert "BCC" in done.stderr
    assert output.read_bytes().startswith(b"\x89PNG")


def test_explain_says_names_with_brackets_as_they_are(bundle, tmp_path):
    absent = tmp_path / "[red]mole.jpg"
    done = run("explain.py", "--image", absent, "--output", tmp_path / "o.png", "--bundle", bundle)
    assert done.returncode == 1
    assert done.stderr == f"{absent}: No such file or directory\n"


def test_explain_refuses_in_a_sentence(bundle, image, tmp_path):
    for change in (("--image", tmp_path / "absent.jpg"), ("--target", "XYZ"), ("--bundle", tmp_path)):
        done = run("explain.py", "--image", image, "--output", tmp_path / "o.png", "--bundle", bundle, *change)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("output", [".", "heatmap.jpg"])
def test_explain_writes_png_files_alone(bundle, image, tmp_path, output):
    done = run("explain.py", "--image", image, "--output", tmp_path / output, "--bundle", bundle)
    assert done.returncode == 2
    assert "ends in .png" in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == [image]
