"""predict.py and explain.py: answers on stdout, errors as sentences on stderr, and the documented exit codes."""

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
def test_predict_names_what_is_missing(image, code, options):
    done = run("predict.py", image, *options)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "." in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bundle", "/nowhere", "--version", "1"), "Use one or the other"),
        (("--bundle", "/nowhere", "--url", "http://127.0.0.1:9"), "Use one or the other"),
        (("--url", "127.0.0.1:8080"), "--url is '127.0.0.1:8080'. Use an address"),
    ],
)
def test_predict_rejects_options_that_exclude_each_other(image, options, message):
    done = run("predict.py", image, *options)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "suffix", "hint"),
    [
        (413, b"", "", "too large"),
        (405, b"<html>", "/predictions/skin_vit", "Check that TorchServe runs at http://127.0.0.1:"),
    ],
)
def test_predict_continues_after_an_answer_without_json(image, status, body, suffix, hint):
    """TorchServe answers a too large request with an empty 413. --url may be the whole prediction address."""

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
    assert "BCC" in done.stdout
    assert output.read_bytes().startswith(b"\x89PNG")


def test_explain_prints_brackets_in_names(bundle, tmp_path):
    absent = tmp_path / "[red]mole.jpg"
    done = run("explain.py", "--image", absent, "--output", tmp_path / "o.png", "--bundle", bundle)
    assert done.returncode == 1
    assert done.stderr == f"{absent}: No such file or directory.\n"


def test_explain_rejects_in_a_sentence(bundle, image, tmp_path):
    for change in (("--image", tmp_path / "absent.jpg"), ("--target", "XYZ"), ("--bundle", tmp_path)):
        done = run("explain.py", "--image", image, "--output", tmp_path / "o.png", "--bundle", bundle, *change)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("output", [".", "heatmap.jpg"])
def test_explain_writes_only_png_files(bundle, image, tmp_path, output):
    done = run("explain.py", "--image", image, "--output", tmp_path / output, "--bundle", bundle)
    assert done.returncode == 2
    assert "ends in .png" in done.stderr
    assert list(tmp_path.iterdir()) == [image]
