"""Measure serving: this project in TorchServe, a stock handler, and the limits of the machine.

All use one network, the same bytes and one machine, in under ten minutes. Through TorchServe: requests per second and
latency at 1, 4 and 16 clients, with the heatmap as grid, as overlay and without it, and a stock handler with the
grad-cam package. In this process: the graph alone, the plain forward pass, the processor's best matrix product, the
stages of the handler, and a worker's start. Each server row shows the pace of the processor at that moment.
"""

import io
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from handlers.backbone import build_backbone
from handlers.bundle import Bundle
from handlers.calibration import Calibration
from handlers.completion import complete
from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.receipt import Receipt
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import command_line
from mlflow_tracking.command_line import console
from scripts.studies.serving_bench import in_process, servers
from scripts.studies.serving_bench.load import Load, LoadError, form, measure, post
from training.data.synthetic import draw_lesion
from training.export import export_bundle

IDLE = 0.3  # load average per core; figures of a busier machine are worth little
TOLERANCE = 0.05  # of a probability between servers, which must serve the same network
HEATMAPS = {"ours": ("grid", "overlay", "none"), "stock handler": ("overlay", "none")}


class BusyMachine(UserError):
    """The machine has other work, so its figures cannot be compared."""


def random_bundle(out: Path, architecture: str, size: int) -> Bundle:
    """Return an untrained network with seeded weights, its answers spread by a larger head. Raises BackboneError."""
    torch.manual_seed(0)
    backbone: Any = build_backbone(architecture, len(KNOWN_CODES), size)
    with torch.no_grad():
        backbone.get_classifier().weight.normal_(std=backbone.num_features**-0.5)
    return export_bundle(
        out,
        backbone=backbone.eval(),
        architecture=architecture,
        options={},
        classes=KNOWN_CODES,
        preprocessing=Preprocessing(size),
        calibration=Calibration(),
        evidence={},
        receipt=Receipt("", {}),
    )


def pictures() -> list[bytes]:
    """Return one JPEG of 600×450 pixels for each class."""
    files = []
    for seed, code in enumerate(KNOWN_CODES):
        draw_lesion(seed, code, size=(600, 450)).save(buffer := io.BytesIO(), "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


@dataclass(frozen=True)
class ServerRow:
    """One server, one kind of heatmap, one number of clients; `pace` in GFLOP/s."""

    server: str
    heatmap: str
    load: Load
    pace: float


@dataclass
class BenchTable:
    """A title, the columns' names, and rows of text."""

    title: str
    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)


class Bench:
    """Measures one bundle in one precision.

    Args:
        judge: False leaves out ratios and shares, as on a busy machine.
    """

    def __init__(self, bundle: Bundle, precision: str, clients: list[int], seconds: float, judge: bool) -> None:
        self.bundle, self.clients, self.seconds, self.judge = bundle, clients, seconds, judge
        self.files = pictures()
        self.predictor = Predictor(bundle, precision=precision)
        self.precision = precision

    def expected(self) -> dict[str, dict[str, float]]:
        """Return each server's probabilities for the first picture, from the eager model."""
        predictor = Predictor(self.bundle, runtime="torch")
        [prediction] = predictor.predict(self.files[:1])
        assert isinstance(prediction, Prediction), prediction
        pixels, _ = self.bundle.config.preprocessing(self.files[0])
        logits, *_ = predictor.runtime(pixels[None], np.array([-1]))
        softmax = Calibration().known_probabilities(logits)[0].tolist()  # the stock handler calibrates nothing
        plain = dict(zip(self.bundle.config.classes, softmax, strict=True))
        return {"ours": prediction.probabilities, "stock handler": plain}

    def serve(self) -> Iterator[ServerRow]:
        """Start each server in turn and load it. Raises LoadError, BenchServerError."""
        expected = self.expected()
        for server in HEATMAPS:
            opened = servers.ours(self.bundle, self.precision) if server == "ours" else servers.stock(self.bundle)
            with opened as port:
                check_answer(port, self.files[0], expected[server], server)
                for heatmap in HEATMAPS[server]:
                    bodies = [form(file, heatmap) for file in self.files]
                    for clients in self.clients:
                        before = in_process.pace()
                        load = measure(port, servers.PATH, bodies, clients, self.seconds)
                        yield ServerRow(server, heatmap, load, (before + in_process.pace()) / 2)

    def tables(self, folder: Path) -> Iterator[BenchTable]:
        """Measure, and yield each table when it is complete."""
        precision = self.predictor.runtime.precision
        plain = Predictor(in_process.plain_bundle(self.bundle, folder / "plain"), precision=precision)
        calls_ms = in_process.graphs(self.predictor, plain, self.files, 2 * self.seconds)
        best, product = in_process.peak(precision, self.seconds / 8)
        gflop = in_process.gflop(self.bundle)
        headers = ["batch", "graph ms", "plain forward ms", "ratio", "images/s", "GFLOP/s", "% of best product"]
        graph = BenchTable(f"The graph alone, {precision}; best matrix product {best:.0f} GFLOP/s ({product})", headers)
        for batch, row in calls_ms.items():
            rate = 1e3 * batch / row["joint"]
            shares = [f"{row['joint'] / row['plain']:.3f}", f"{rate:.1f}", f"{rate * gflop:.0f}"]
            cells = [
                str(batch),
                f"{row['joint']:.2f}",
                f"{row['plain']:.2f}",
                *shares,
                f"{100 * rate * gflop / best:.0f}",
            ]
            graph.rows.append(self.cells(cells, 3, 6))
        yield graph
        alone = 1e3 * max(calls_ms) / calls_ms[max(calls_ms)]["joint"]
        yield self.stage_table()
        fresh, later = in_process.worker_start(self.bundle, self.precision)
        rows = [["first start of an archive", f"{fresh:.2f}"], ["later starts", f"{later:.2f}"]]
        yield BenchTable("Our part of a worker's start", ["", "seconds"], rows)
        yield self.server_table(list(self.serve()), alone)

    def stage_table(self) -> BenchTable:
        """Return the handler's stages; its total is less than their sum where two of them overlap."""
        stages_ms = in_process.stages(self.bundle, self.precision, self.files, self.seconds / 2)
        table = BenchTable("Stages of the handler, ms an image (overlay only on request)", ["batch", *stages_ms[1]])
        for batch, row in stages_ms.items():
            table.rows.append([str(batch), *(f"{value:.2f}" for value in row.values())])
        return table

    def server_table(self, measured: list[ServerRow], alone: float) -> BenchTable:
        """Return requests per second and latency.

        `× stock` compares grid and overlay with the stock handler's overlay; `% graph` with `alone`, the graph's images
        per second without a server; `pace` is in percent of the fastest row's.
        """
        headers = ["server", "heatmap", "clients", "req/s", "p50 ms", "p95 ms", "× stock", "% graph", "pace"]
        table = BenchTable("Through TorchServe, a JPEG of 600×450", headers)
        heat = {
            row.load.clients: row.load.rps
            for row in measured
            if (row.server, row.heatmap) == ("stock handler", "overlay")
        }
        none = {
            row.load.clients: row.load.rps for row in measured if (row.server, row.heatmap) == ("stock handler", "none")
        }
        fastest = max(row.pace for row in measured)
        for row in measured:
            load = row.load
            times = load.rps / (none if row.heatmap == "none" else heat)[load.clients]
            figures = [
                f"{load.rps:.1f}",
                f"{load.p50:.0f}",
                f"{load.p95:.0f}",
                f"{times:.1f}",
                f"{100 * load.rps / alone:.0f}",
            ]
            cells = [row.server, row.heatmap, str(load.clients), *figures, f"{100 * row.pace / fastest:.0f}"]
            table.rows.append(self.cells(cells, 6, 7))
        return table

    def cells(self, cells: list[str], *shares: int) -> list[str]:
        """Return the row without its ratios and shares unless they may be judged."""
        return [cell if self.judge or index not in shares else "" for index, cell in enumerate(cells)]


def check_answer(port: int, image: bytes, expected: dict[str, float], server: str) -> None:
    """Raise LoadError unless a server's answer is the eager model's."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        probabilities = json.loads(post(connection, servers.PATH, form(image, "overlay")))["probabilities"]
    difference = max(abs(probabilities[code] - p) for code, p in expected.items())
    if not difference <= TOLERANCE:  # so that NaN differs
        raise LoadError(f"A probability of the server '{server}' differs by {difference:.2f} from the model's.")


def markdown(tables: list[BenchTable], heading: str) -> str:
    """Return the page."""
    text = f"# Serving speed\n\n{heading}\n"
    for table in tables:
        text += f"\n## {table.title}\n\n| {' | '.join(table.headers)} |\n|{' --- |' * len(table.headers)}\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in table.rows)
    return text


def processor() -> str:
    """Return the processor's name and its number of cores."""
    path, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if path.exists():
        names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


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
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure on a busy machine too, without ratios and shares.")
    ] = False,
) -> None:
    """Measure serving, a stock handler and the limits of the machine. The machine must be idle."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the servers on the way out
    load = os.getloadavg()[0]
    judge = load <= IDLE * (os.cpu_count() or 1)
    if not judge and not busy:
        raise BusyMachine(f"The load average is {load:.1f}. Wait until the machine is idle, or use --busy.")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        folder = Path(temporary)
        place = folder / "bundle"
        network = complete(Bundle.load(bundle), place) if bundle else random_bundle(place, architecture, size)
        tables = []
        for table in Bench(network, precision, clients, seconds, judge).tables(folder):
            grid = command_line.table(table.title, table.headers)
            for row in table.rows:
                grid.add_row(*row)
            console.print(grid)
            tables.append(table)
    if out:
        command = shlex.join(["python", "scripts/studies/bench_serving.py", *sys.argv[1:]])
        model = f"{network.config.architecture}, {network.config.preprocessing.image_size} px"
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "serving.md") as file:
            file.write(markdown(tables, f"`{command}`\n\n{processor()}, load {load:.1f}; {model}").encode())
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
