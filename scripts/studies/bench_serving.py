"""Measure serving: this project in TorchServe, a stock handler, and the parts of the handler.

All use one network, the same bytes and one machine. First come shares: how near the parts are to what the machine can
do. Then come requests per second and latency through TorchServe, with the heatmap as grid, as overlay and without it,
and the same of a stock handler with the grad-cam package; the stages of the handler; and a worker's start.
"""

import io
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from handlers.backbone import build_backbone
from handlers.bundle import Bundle, BundleConfig
from handlers.calibration import Calibration
from handlers.files import atomic_file
from handlers.graph_export import complete
from handlers.kept_images import kept
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.receipt import Receipt
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import command_line
from mlflow_tracking.command_line import console
from mlflow_tracking.stack_settings import MODEL_NAME
from scripts.studies.idle_machine import BusyOption, require_idle_machine
from scripts.studies.serving_bench import in_process, servers
from scripts.studies.serving_bench.load import Load, LoadError, form, measure, post
from scripts.studies.serving_bench.shares import shares
from training.data.synthetic import draw_lesion
from training.export import export_bundle

TOLERANCE = 0.05  # of a probability between servers, which must serve the same network
HEATMAPS = {"ours": ("grid", "overlay", "none"), "stock handler": ("overlay", "none")}


def random_bundle(out: Path, architecture: str, size: int) -> Bundle:
    """Return an untrained network with seeded weights, its answers spread by a larger head. Raises BackboneError."""
    torch.manual_seed(0)
    backbone: Any = build_backbone(architecture, len(KNOWN_CODES), size)
    with torch.no_grad():
        backbone.get_classifier().weight.normal_(std=backbone.num_features**-0.5)
    config = BundleConfig(MODEL_NAME, architecture, {}, KNOWN_CODES, Preprocessing(size), Calibration())
    return export_bundle(out, backbone.eval(), config, Receipt("", {}))


def pictures() -> list[bytes]:
    """Return one JPEG of 600×450 pixels for each class."""
    files = []
    for seed, code in enumerate(KNOWN_CODES):
        draw_lesion(seed, code, size=(600, 450)).save(buffer := io.BytesIO(), "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


class ServerRow(NamedTuple):
    """One server and one kind of heatmap under one load, and how many of its pictures were kept for review."""

    server: str
    heatmap: str
    load: Load
    kept: int = 0


class BenchTable(NamedTuple):
    """A title, the columns' names, and rows of text."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def tables(
    bundle: Bundle, precision: str, clients: list[int], seconds: float, folder: Path, keep: bool
) -> Iterator[BenchTable]:
    """Measure a bundle in one precision, and yield each table when it is complete.

    Args:
        seconds: for each figure.
        folder: an empty folder for a bundle with the plain forward pass.
        keep: keep pictures for review; each request has a new one.

    Raises:
        LoadError, BenchServerError, HandlerFailed: a server or the handler does not answer as it should.
    """
    files, predictor = pictures(), Predictor(bundle, precision=precision)
    precision = predictor.runtime.precision
    plain = Predictor(in_process.plain_bundle(bundle, folder / "plain"), precision=precision)
    rows = [list(share) for share in shares(bundle, predictor, plain, files, seconds)]
    yield BenchTable(f"Shares of what this machine can do, {precision}", ["", "figure", "of", "share", "aim"], rows)
    yield server_table(list(serve(bundle, precision, files, clients, seconds, keep)))
    stages_ms = in_process.stages(bundle, precision, files, seconds / 2)
    rows = [[str(batch), *(f"{value:.2f}" for value in row.values())] for batch, row in stages_ms.items()]
    # The handler's total is less than the sum where stages overlap.
    yield BenchTable("Stages of the handler, ms an image (overlay only on request)", ["batch", *stages_ms[1]], rows)
    fresh, later = in_process.worker_start(bundle, precision)
    rows = [["first start of an archive", f"{fresh:.2f}"], ["later starts", f"{later:.2f}"]]
    yield BenchTable("Our part of a worker's start", ["", "seconds"], rows)


def serve(
    bundle: Bundle, precision: str, files: list[bytes], clients: list[int], seconds: float, keep: bool = False
) -> Iterator[ServerRow]:
    """Start each server in turn and load it. Raises LoadError, BenchServerError."""
    expected = expected_probabilities(bundle, files[0])
    for server in HEATMAPS:
        with servers.ours(bundle, precision, keep) if server == "ours" else servers.stock(bundle) as running:
            check_answer(running.port, files[0], expected[server], server)
            for heatmap in HEATMAPS[server]:
                bodies = [form(file, heatmap) for file in files]
                for number in clients:
                    before = len(kept(running.kept))
                    load = measure(running.port, servers.PATH, bodies, number, seconds, keep)
                    yield ServerRow(server, heatmap, load, len(kept(running.kept)) - before)


def expected_probabilities(bundle: Bundle, image: bytes) -> dict[str, dict[str, float]]:
    """Return each server's probabilities for a picture, from the eager model."""
    predictor = Predictor(bundle, runtime="torch")
    [prediction] = predictor.predict([image])
    assert isinstance(prediction, Prediction), prediction
    pixels, _ = bundle.config.preprocessing(image)
    logits, *_ = predictor.runtime(pixels[None], np.array([-1]))
    softmax = Calibration().known_probabilities(logits)[0].tolist()  # the stock handler calibrates nothing
    plain = dict(zip(bundle.config.classes, softmax, strict=True))
    return {"ours": prediction.probabilities, "stock handler": plain}


def check_answer(port: int, image: bytes, expected: dict[str, float], server: str) -> None:
    """Raise LoadError unless a server's answer is the eager model's."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        probabilities = json.loads(post(connection, servers.PATH, form(image, "overlay")))["probabilities"]
    difference = max(abs(probabilities[code] - p) for code, p in expected.items())
    if not difference <= TOLERANCE:  # so that NaN differs
        raise LoadError(f"A probability of the server '{server}' differs by {difference:.2f} from the model's.")


def server_table(measured: list[ServerRow]) -> BenchTable:
    """Return requests per second and latency; `× stock` compares grid and overlay with the stock handler's overlay."""
    stock = {(row.heatmap, row.load.clients): row.load.rps for row in measured if row.server == "stock handler"}
    rows = []
    for server, heatmap, load, pictures_kept in measured:
        ratio = load.rps / stock["none" if heatmap == "none" else "overlay", load.clients]
        figures = [f"{load.rps:.1f}", f"{load.p50:.0f}", f"{load.p95:.0f}", f"{ratio:.1f}"]
        answered = load.requests + load.clients  # each client's first is no part of the rate
        rows.append([server, heatmap, str(load.clients), *figures, f"{pictures_kept} of {answered}"])
    headers = ["server", "heatmap", "clients", "req/s", "p50 ms", "p95 ms", "× stock", "kept for review"]
    if not any(row.kept for row in measured):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    return BenchTable("Through TorchServe, a JPEG of 600×450", headers, rows)


def markdown(measured: list[BenchTable], heading: str) -> str:
    """Return the page."""
    text = f"# Serving speed\n\n{heading}\n"
    for table in measured:
        text += f"\n## {table.title}\n\n{command_line.markdown_table(table.headers, table.rows)}\n"
    return text


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the page serving.md.")] = None,
    architecture: Annotated[
        str, typer.Option(help="A timm model, untrained, with seeded weights.")
    ] = "vit_small_patch16_224",
    size: Annotated[int, typer.Option(min=32, help="Side of its input, pixels.")] = 224,
    bundle: Annotated[Path | None, typer.Option(help="A bundle instead, such as model_store/skin_vit.")] = None,
    precision: Annotated[str, typer.Option(help="Of this project's handler: auto, f32 or bf16.")] = "auto",
    clients: Annotated[list[int], typer.Option(min=1, help="Concurrent clients. Repeat for more.")] = [1, 4, 16],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="For each figure.")] = 2.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep pictures for review; each request has a new one.")] = False,
    busy: BusyOption = False,
) -> None:
    """Measure serving, a stock handler and the parts of the handler. The machine must be idle."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the servers on the way out
    load = os.getloadavg()[0]
    require_idle_machine(busy)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        folder = Path(temporary)
        place = folder / "bundle"
        network = complete(Bundle.load(bundle), place) if bundle else random_bundle(place, architecture, size)
        measured = []
        for table in tables(network, precision, clients, seconds, folder, keep):
            grid = command_line.table(table.title, table.headers)
            for row in table.rows:
                grid.add_row(*row)
            console.print(grid)
            measured.append(table)
    if out:
        command = shlex.join(["python", "scripts/studies/bench_serving.py", *sys.argv[1:]])
        model = f"{network.config.architecture}, {network.config.preprocessing.image_size} px"
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "serving.md") as file:
            file.write(markdown(measured, f"`{command}`\n\n{os.cpu_count()} cores, load {load:.1f}; {model}").encode())
        console.print(f"Written: {out / 'serving.md'}.")


if __name__ == "__main__":
    command_line.run(
        main,
        examples=[
            "python scripts/studies/bench_serving.py --out runs/serving",
            "python scripts/studies/bench_serving.py --bundle model_store/skin_vit --precision f32",
            "python scripts/studies/bench_serving.py --clients 1 --seconds 0.5 --busy",
        ],
    )
