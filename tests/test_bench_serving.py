"""bench_serving.py starts real servers with the same network, loads them, and compares them."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from scripts.studies import bench_serving
from scripts.studies.bench_serving import ServerRow
from scripts.studies.serving_bench.load import Load, LoadError, form, measure, post
from tests.http_stub import Answer, serve
from tests.models import tiny_bundle
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, ROOT / "scripts/studies/bench_serving.py", "--clients", "1", "--seconds", "0.2"]


class Slow:
    """Answers 200 after 20 ms, one request at a time; 503 once `broken`."""

    def __init__(self):
        self.broken, self.lock, self.seen = False, threading.Lock(), []

    def answer(self, request, body):
        with self.lock:
            self.seen.append(body)
            time.sleep(0.02)
        return Answer(503 if self.broken else 200, b"ok")


@pytest.fixture
def slow():
    slow = Slow()
    with serve(slow.answer) as url:
        slow.port = int(url.rpartition(":")[2])
        yield slow


def test_load_measures_rate_and_latency(slow):
    """At one request per 20 ms, four clients wait for each other: at most 50 a second, four times the latency."""
    bodies = [form(b"one", "none"), form(b"two", "grid")]
    for clients in (1, 4):
        load = measure(slow.port, "/", bodies, clients, 0.5)
        assert load.clients == clients and load.requests >= 3 * clients
        assert 0 < load.rps <= 51
        assert 20 * clients * 0.9 <= load.p50 <= load.p95
        # Little's law: all clients wait all the time.
        assert load.rps * load.p50 / 1e3 == pytest.approx(clients, rel=0.3)
    assert set(slow.seen) == set(bodies)


def test_no_two_requests_have_the_same_file_if_pictures_are_kept(slow):
    measure(slow.port, "/", [form(b"one", "none"), form(b"two", "grid")], 2, 0.2, new_files=True)
    assert len(set(slow.seen)) == len(slow.seen) > 6
    assert all(body.endswith(form(b"", "none")[-10:]) for body in slow.seen)


def test_an_error_ends_the_load(slow):
    slow.broken = True
    with pytest.raises(LoadError, match="503"):
        measure(slow.port, "/", [b"x"], 2, 0.2)
    with pytest.raises(LoadError, match="No response"):
        post(HTTPConnection("127.0.0.1", 9), "/", b"x")


def test_ratios_follow_from_the_figures():
    rows = [
        ServerRow("ours", "grid", Load(16, 9, 100.0, 150.0, 160.0)),
        ServerRow("stock handler", "overlay", Load(16, 9, 5.0, 3000.0, 3200.0)),
    ]
    table = bench_serving.server_table(rows)
    assert table.rows[0] == ["ours", "grid", "16", "100.0", "150", "160", "20.0"] and table.headers[-1] == "× stock"
    table = bench_serving.server_table([rows[0]._replace(kept=20), rows[1]])
    assert table.headers[-1] == "kept for review" and [row[-1] for row in table.rows] == ["20 of 25", "0 of 25"]


@pytest.mark.parametrize(("moved", "same"), [(0.04, True), (0.06, False), (float("nan"), False)])
def test_a_server_with_another_network_ends_the_run(monkeypatch, moved, same):
    answer = json.dumps({"probabilities": {"MEL": 0.5 + moved}})
    monkeypatch.setattr(bench_serving, "post", lambda *_: answer)
    if same:
        bench_serving.check_answer(9, b"", {"MEL": 0.5}, "ours")
    else:
        with pytest.raises(LoadError, match="differs by"):
            bench_serving.check_answer(9, b"", {"MEL": 0.5}, "ours")


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "The load average is 99.0. Wait"), (("--busy", "--architecture", "vit_tinny"), "no model named 'vit_tinny'")],
)
def test_a_run_that_cannot_start_ends_with_a_sentence(options, message):
    code = "import os, runpy, sys; os.getloadavg = lambda: (99.0, 0, 0); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, COMMAND[1:]), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(300)
def test_it_measures_real_servers(tmp_path):
    out = tmp_path / "out"
    bundle = tiny_bundle(tmp_path / "bundle").path
    command = [*COMMAND, "--busy", "--precision", "f32", "--keep", "--bundle", bundle, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in (out / "serving.md").read_text().splitlines()]
    served = {(row[0], row[1]): row for row in rows if row[0] in ("ours", "stock handler")}
    expected = {("ours", heatmap) for heatmap in ("grid", "overlay", "none")}
    assert set(served) == expected | {("stock handler", heatmap) for heatmap in ("overlay", "none")}
    assert all(float(row[3]) > 0 and float(row[4]) <= float(row[5]) for row in served.values())
    assert all((int(row[-1].split(" of ")[0]) > 0) == (row[0] == "ours") for row in served.values())  # kept pictures
    assert "first start of an archive" in done.stdout and "decode" in done.stdout
    shares = {row[0]: row for row in rows if row[0].count(" / ")}
    assert set(shares) == {"graph / matrix product", "heatmap / plain forward", "TorchServe / graph"}
    assert all(0 < float(row[3]) < 10 for row in shares.values())
    costs = [row for row in rows if row[0].startswith("a request costs")]
    assert len(costs) == 3 and all(float(row[1].split()[0]) > 0 for row in costs)


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(180)
def test_sigterm_ends_its_servers(tmp_path):
    before = set(Path("/tmp").glob("bench-*"))
    command = [*COMMAND, "--busy", "--bundle", tiny_bundle(tmp_path / "bundle").path]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def folder() -> Path | None:
        return next(iter(set(Path("/tmp").glob("bench-*")) - before - set(Path("/tmp").glob("bench-serving-*"))), None)

    def servers() -> list[str]:
        lines = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return [line for line in lines if f"{place}/" in line]

    place = eventually(folder, 120)
    eventually(servers, 60)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 143
    assert not servers()
    assert not place.exists()
