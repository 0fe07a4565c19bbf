"""bench_serving.py starts real servers, each with the same network, loads them, and says which aims were reached.

The load's figures are those of a server whose times are known; the verdicts follow from the figures; a server that
answers an error ends the run with a sentence and leaves nothing behind.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from scripts.studies import bench_serving
from scripts.studies.bench_serving import Bench
from scripts.studies.serving_bench import report
from scripts.studies.serving_bench.load import LoadError, ask, form, measure
from tests.models import tiny_bundle

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "scripts" / "bench_serving.py"), "--quick", "--clients", "1", "--seconds", "0.2"]


class Slow(BaseHTTPRequestHandler):
    """Answers 200 after 20 ms, one request at a time, until `broken`."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    broken = False
    seen: list[bytes] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            self.seen.append(body)
            time.sleep(0.02)
        self.send_response(503 if self.server.broken else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args):
        pass


@pytest.fixture
def slow():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    server.broken = False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_load_tells_rate_and_latency(slow):
    """At one request in 20 ms four clients wait for each other: not more than 50 a second, four times the time each."""
    port = slow.server_address[1]
    bodies = [form(b"one", "none"), form(b"two", "grid")]
    for clients in (1, 4):
        load = measure(port, "/", bodies, clients, 0.5)
        assert load.clients == clients and load.requests >= 3 * clients
        assert 0 < load.rps <= 51
        assert 20 * clients * 0.9 <= load.p50 <= load.p95 <= load.p99
        # Little's law: all clients wait all the time.
        assert load.rps * load.p50 / 1e3 == pytest.approx(clients, rel=0.3)
    assert set(Slow.seen) == set(bodies)


def test_an_error_is_not_counted_as_an_answer(slow):
    port = slow.server_address[1]
    slow.broken = True
    with pytest.raises(LoadError, match="503"):
        measure(port, "/", [b"x"], 2, 0.2)
    slow.shutdown()
    slow.server_close()
    with pytest.raises(LoadError, match="No answer"):
        ask(port, "/", b"x")


def results(**changed) -> dict:
    """Results of a run in which the stock handler does 5 requests/s and ours 100."""

    def row(system, answer, clients, rps, p95):
        return {
            "system": system, "precision": "bf16" if "auto" in system else "", "settings": "1×2, 1",
            "image": "600×450", "ready_seconds": 1.0, "answer": answer, "clients": clients, "requests": 9, "rps": rps,
            "p50": p95, "p95": p95, "p99": p95, "client_cores": 0.1, "pace": 1000.0 if clients == 16 else 2000.0,
            "memory": {"python": 900.0, "java": 0.0},
        }  # fmt: skip

    cells = [row("torchserve", "overlay", n, 5.0, 200.0 * n) for n in (1, 4, 16)]
    cells += [row("ours auto", "grid", n, 100.0, 10.0 * n) for n in (1, 4, 16)]
    graph = {"joint": 10.0, "plain": 10.0, "ratio": 1.0}
    found = {
        "command": "python scripts/studies/bench_serving.py", "versions": {},
        "machine": {"cpu": "a", "cores": 2, "load": 0.0, "busy": False},
        "model": {"architecture": "v", "size": 224, "classes": 8, "weights": "untrained"},
        "images": [{"name": "600×450", "bytes": [1]}],
        "agreement": {"ours auto": 1e-3}, "cells": cells, "tried": [], "handler": {}, "peaks": {},
        "flops": {"joint": 8.5, "plain": 9.2}, "start": {"fresh": 1.0, "again": 0.5},
        "graph": {
            "auto": {
                "precision": "bf16", "batches": {"1": graph, "8": graph | {"ratio": 1.1}}, "share": 0.7, "bare": 110.0,
                "images_per_second": {"1": 90.0, "8": 110.0},
            },
        },
    }  # fmt: skip
    return found | changed


def test_verdicts_follow_from_the_figures():
    verdicts = {target.name: target for target in report.targets(results())}
    fast = verdicts["requests/s by the stock handler's, 16 clients, auto"]
    assert (fast.value, fast.reached) == (20.0, True)
    assert verdicts["requests/s by the stock handler's, 16 clients, f32"].reached is None
    assert verdicts["p95 of the stock handler by ours, 1 client"].value == 20.0
    assert verdicts["joint graph by plain forward, batch 1"].reached is True
    assert verdicts["joint graph by plain forward, batch 8"].reached is False
    assert verdicts["served, 16 clients, of what the graph does alone"].value == pytest.approx(100 / 110)
    assert verdicts["the goal: requests/s by the stock handler's, 16 clients, any precision"].reached is False
    text = report.markdown(results())
    assert "| requests/s by the stock handler's, 16 clients, f32 |  | ≥ 10 | not measured |" in text
    assert "| ours auto (bf16) | 1×2, 1 | grid | 16 | 100.0 | 20.0 | 160 | 160 | 160 | 900 | 50 |" in text
    assert {bar.name for bar in report.figure(results()).data} == {"stock handler: overlay", "ours auto (bf16): grid"}


RATES = {"1×1, 1": (9, 2, 3), "1×2, 1": (5, 4, 3), "2×1, 1": (5, 3, 8), "2×2, 1": (1, 1, 1),
         "2×1, 4, 10 ms": (1, 9, 7), "2×1, 8, 10 ms": (1, 1, 1)}  # fmt: skip


def test_each_baseline_is_shown_at_the_best_of_the_settings_tried(tmp_path, monkeypatch):
    """For each number of clients by itself, and batches beside the workers that were best for the most clients."""
    bench = Bench(tiny_bundle(tmp_path / "bundle"), bench_serving.pictures(quick=True), [1, 4, 16], 1.0, results())

    def cell(own, server, system, settings, image, answer, clients, seconds=None):
        return {"answer": answer, "clients": clients, "rps": RATES[str(settings)][[1, 4, 16].index(clients)]}

    monkeypatch.setattr(Bench, "cell", cell)
    best = bench.search("torchserve", lambda settings: nullcontext(), 2)
    assert {clients: str(best["overlay", clients]) for clients in (1, 4, 16)} == {
        1: "1×1, 1", 4: "2×1, 4, 10 ms", 16: "2×1, 1"
    }  # fmt: skip
    assert len(bench.results["tried"]) == 36


def test_a_server_with_another_network_ends_the_run(tmp_path, monkeypatch):
    bench = Bench(tiny_bundle(tmp_path / "bundle"), bench_serving.pictures(quick=True), [1], 1.0, results())
    server = SimpleNamespace(port=0)
    for moved, fault in ((0.04, None), (0.06, "does not answer what the model does")):
        first = next(iter(bench.expected))
        told = {**bench.expected, first: bench.expected[first] + moved}
        monkeypatch.setattr(bench_serving, "ask", lambda *args, told=told: json.dumps({"probabilities": told}))
        with pytest.raises(LoadError, match=fault) if fault else nullcontext():
            bench.agree(server, "ours auto")


def test_a_busy_machine_is_told():
    busy = {"cpu": "a", "cores": 2, "load": 0.9, "busy": True}
    assert "worth little" in report.markdown(results(machine=busy))
    assert "worth little" not in report.markdown(results())


def test_nothing_measured_is_no_error():
    empty = results(cells=[], graph={}, start={}, agreement={})
    assert {target.value for target in report.targets(empty)} == {None}
    assert "not compared" in report.markdown(empty)
    report.figure(empty)


def test_a_wrong_architecture_is_refused_in_a_sentence():
    done = subprocess.run([*COMMAND, "--architecture", "vit_tinny"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "timm has no model named 'vit_tinny'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.live
@pytest.mark.timeout(300)
def test_it_measures_real_servers(tmp_path):
    systems = ["--system", "onnxruntime", "--system", "fastapi", "--system", "ours", "--precision", "f32"]
    out = tmp_path / "out"
    command = [*COMMAND, *systems, "--bundle", tiny_bundle(tmp_path / "bundle").path, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())
    measured = {(row["system"], row["answer"]) for row in found["cells"]}
    stock = {(system, answer) for system in ("onnxruntime", "fastapi") for answer in ("overlay", "none")}
    assert measured == stock | {("ours f32", answer) for answer in ("grid", "overlay", "none")}
    assert all(row["requests"] >= 3 and row["memory"]["python"] > 100 for row in found["cells"])
    assert {row["system"] for row in found["cells"] if row["memory"]["java"]} == {"onnxruntime", "ours f32"}
    assert len(found["agreement"]) == 3 and max(found["agreement"].values()) < 0.01
    assert all(row["pace"] > 1 for row in found["cells"])
    assert found["graph"]["f32"]["batches"]["8"]["plain"] > 0 and found["peaks"]["f32"]["gflops"] > 1
    assert found["handler"]["600×450"]["f32"]["batches"]["1"]["decode"] > 0 and found["start"]["fresh"] > 0
    assert (out / "README.md").read_text() == report.markdown(found)
    assert "plotly" in (out / "figure.html").read_text()


@pytest.mark.live
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=[pytest.mark.slow]), signal.SIGTERM])
def test_it_ends_its_servers_when_it_is_stopped(tmp_path, how):
    bundle, temporary = tiny_bundle(tmp_path / "bundle"), tmp_path / "temporary"
    temporary.mkdir()
    own = os.environ | {"TMPDIR": str(temporary), "BENCH_MARK": str(tmp_path)}
    running = subprocess.Popen(
        [*COMMAND, "--system", "fastapi", "--bundle", bundle.path],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "FastAPI:" in line:
            break
    else:
        pytest.fail("it ended before it started a server")
    time.sleep(1)  # its server is starting
    running.send_signal(how)
    running.communicate(timeout=60)
    assert running.returncode != 0

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BENCH_MARK") == str(tmp_path):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    assert not left()
    assert not list(temporary.iterdir()), "the temporary folder stayed"
