"""How fast is serving? This project beside what one would write first, in one run, same network, same bytes.

Four servers are started one after the other and loaded by 1, 4 and 16
clients: TorchServe with a stock handler (torch in fp32, the grad-cam
package); the same with ONNX Runtime for the probabilities; FastAPI with
the stock handler's code; and this project's archive in TorchServe, in
each precision asked for. The first three are shown at the best of the
settings tried: 1 and 2 workers, 1 thread and all, batches of 1, 4 and 8.
Pictures are a drawn lesion of 600×450 and one of 12 megapixels, with the
heatmap and without. Beside that, in this process: the handler's pieces,
the joint graph against the plain forward, the processor's best matrix
product, and our part of a worker's start.

Leave the machine alone meanwhile: figures of a busy one are worth
nothing, and each has beside it how fast the processor was just then.
The default takes half an hour on two cores, --quick two minutes, --tune
four. Slowness is reported, not an error.
"""

import io
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image

from handlers.backbone import BackboneError, build_backbone
from handlers.bundle import Bundle, BundleError
from handlers.calibration import Calibration
from handlers.completion import complete
from handlers.files import atomic_file, write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.receipt import Receipt
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking.command_line import console, errors
from scripts.studies.serving_bench import naive_model, pieces, report, servers
from scripts.studies.serving_bench.load import LoadError, ask, form, measure
from scripts.studies.serving_bench.pieces import PieceError
from scripts.studies.serving_bench.servers import Server, ServerError, Settings
from training.data.synthetic import draw_lesion
from training.export import export_bundle

EPILOG = """
Examples:

  python scripts/studies/bench_serving.py --out runs/serving

  python scripts/studies/bench_serving.py --quick --system torchserve --system ours

  python scripts/studies/bench_serving.py --architecture resnet18 --precision auto

  python scripts/studies/bench_serving.py --tune
"""
SMALL, LARGE = "600×450", "12 MP"
BASELINES = ("torchserve", "onnxruntime", "fastapi")
SYSTEMS = (*BASELINES, "ours")
BASELINE_ANSWERS = ("overlay", "none")
IDLE = 0.3  # load average for each core; figures of a busier machine are worth little
BATCH_DELAY = 10  # ms; what the others' batches wait: their clients are back sooner
TOLERANCE = 0.05  # of a probability between servers: they must be serving the same network
PACKAGES = ("torch", "timm", "openvino", "onnxruntime", "torchserve", "grad-cam", "fastapi", "uvicorn")
Opens = Callable[[Settings], AbstractContextManager[Server]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def random_bundle(out: Path, architecture: str, size: int) -> Bundle:
    """An untrained network with seeded weights, its answers spread by a larger head. Raises BackboneError."""
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


def pictures(quick: bool) -> dict[str, list[bytes]]:
    """JPEG files by kind. The large ones are enlarged and given a sensor's noise: smooth ones decode faster."""
    found = {SMALL: [_jpeg(draw_lesion(seed, code, size=(600, 450))) for seed, code in enumerate(KNOWN_CODES)]}
    if quick:
        return found
    found[LARGE] = []
    for seed, code in enumerate(KNOWN_CODES[:2]):
        large = np.asarray(draw_lesion(seed, code, size=(1000, 750)).resize((4000, 3000), Image.Resampling.BICUBIC))
        noise = np.random.default_rng(seed).normal(0, 3, large.shape).astype(np.float32)
        found[LARGE].append(_jpeg(Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))))
    return found


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Bench:
    """One run: what is measured, and the figures so far."""

    bundle: Bundle
    images: dict[str, list[bytes]]
    clients: list[int]
    seconds: float
    results: dict[str, Any]
    # The eager model's probabilities for the first picture: ours, and without temperature and rejection the others'.
    expected: dict[str, float] = field(init=False)
    expected_plain: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        predictor, picture = Predictor(self.bundle, runtime="torch"), self.images[SMALL][0]
        [answer] = predictor.predict([picture])
        if not isinstance(answer, Prediction):
            raise answer
        self.expected = answer.probabilities
        pixels, _ = self.bundle.config.preprocessing(picture)
        logits, *_ = predictor.runtime(pixels[None], np.array([-1]))
        softmax = Calibration().known_probabilities(logits)[0]
        self.expected_plain = dict(zip(self.bundle.config.classes, softmax.tolist(), strict=True))

    def cell(
        self,
        server: Server,
        system: str,
        settings: Settings,
        image: str,
        answer: str,
        clients: int,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Load a running server in one way; the row for the results, and a line for who waits."""
        bodies = [form(file, answer) for file in self.images[image]]
        before = pieces.pace()
        load = measure(server.port, servers.PATH, bodies, clients, seconds or self.seconds)
        pace = (before + pieces.pace()) / 2
        row: dict[str, Any] = {"system": system, "precision": "", "settings": str(settings), "image": image}
        row |= {
            "pace": pace,
            "answer": answer,
            "memory": server.memory(),
            "ready_seconds": server.ready_seconds,
            **asdict(load),
        }
        console.print(f"  {image}, {answer}, {clients} clients: {load.rps:.1f} requests/s, p95 {load.p95:.0f} ms")
        return row

    def agree(self, server: Server, system: str) -> dict[str, Any]:
        """A server's first answer, which must be the eager model's. Raises LoadError if it is not."""
        picture = self.images[SMALL][0]
        answer: dict[str, Any] = json.loads(ask(server.port, servers.PATH, form(picture, "overlay")))
        expected = self.expected if system.startswith("ours") else self.expected_plain
        difference = max(abs(answer["probabilities"][code] - p) for code, p in expected.items())
        self.results["agreement"][system] = difference
        if difference > TOLERANCE:
            raise LoadError(f"{system} does not answer what the model does: a probability is off by {difference:.2f}.")
        return answer

    def baseline(self, system: str, model: Path, quick: bool) -> None:
        """Try settings, then measure everything at the best of each."""
        cores = os.cpu_count() or 1
        opens: Opens = {
            "torchserve": lambda settings: servers.stock(model, "torch", settings),
            "onnxruntime": lambda settings: servers.stock(model, "onnxruntime", settings),
            "fastapi": lambda settings: servers.fastapi(model, settings),
        }[system]
        cases = [(answer, clients) for answer in BASELINE_ANSWERS for clients in self.clients]
        best = dict.fromkeys(cases, Settings(1, cores)) if quick else self.search(system, opens, cores)
        rows = []
        for settings in dict.fromkeys(best.values()):
            console.print(f"{report.TITLES[system]}: {settings}")
            with opens(settings) as server:
                self.agree(server, system)
                for image in self.images:
                    for answer, clients in cases:
                        if best[answer, clients] == settings:
                            rows.append(self.cell(server, system, settings, image, answer, clients))
        self.results["cells"] += sorted(rows, key=lambda row: (row["answer"] == "none", row["clients"]))

    def search(self, system: str, opens: Opens, cores: int) -> dict[tuple[str, int], Settings]:
        """The best settings for each answer and number of clients, by requests/s."""
        tried: list[tuple[Settings, dict[str, Any]]] = []

        def attempt(settings: Settings) -> None:
            console.print(f"{report.TITLES[system]}, trying {settings}")
            with opens(settings) as server:
                for answer in BASELINE_ANSWERS:
                    for clients in self.clients:
                        row = self.cell(server, system, settings, SMALL, answer, clients, self.seconds / 2)
                        tried.append((settings, row))

        def best(answer: str, clients: int) -> Settings:
            rows = [each for each in tried if (each[1]["answer"], each[1]["clients"]) == (answer, clients)]
            return max(rows, key=lambda each: float(each[1]["rps"]))[0]

        for workers in (1, 2):
            for threads in sorted({1, cores}):
                attempt(Settings(workers, threads))
        if system != "fastapi":  # which has no batches
            chosen = best("overlay", max(self.clients))
            for batch in (4, 8):
                attempt(Settings(chosen.workers, chosen.threads, batch, BATCH_DELAY))
        self.results["tried"] += [row for _, row in tried]
        return {(answer, clients): best(answer, clients) for answer in BASELINE_ANSWERS for clients in self.clients}

    def ours(self, precision: str, settings: Settings, answers: tuple[str, ...], into: str) -> None:
        """Measure this project's server, its rows going `into` "cells" or "tried" (the small picture alone)."""
        system = f"ours {precision}"
        console.print(f"{system}: {settings}")
        with servers.ours(self.bundle, precision, settings) as server:
            computed = self.agree(server, system)["model"]["precision"]
            for image in self.images if into == "cells" else [SMALL]:
                for answer in answers:
                    for clients in self.clients:
                        row = self.cell(server, system, settings, image, answer, clients)
                        self.results[into].append(row | {"precision": computed})

    def pieces(self, precisions: list[str], folder: Path, quick: bool) -> None:
        """What is timed without a server."""
        console.print("The handler's pieces, the graph, the processor's peak, a worker's start")
        seconds, found = (0.2 if quick else 1.0), self.results
        for image in self.images:
            found["handler"][image] = {
                each: pieces.stages(self.bundle, each, self.images[image], seconds / 2) for each in precisions
            }
        found["flops"] = pieces.flops(self.bundle)
        found["peaks"] = pieces.peaks(seconds / 4, pieces.SIZES[:1] if quick else pieces.SIZES)
        if self.bundle.has_graph:
            plain = pieces.plain_bundle(self.bundle, folder / "plain")
            for precision in precisions:
                row = pieces.graphs(self.bundle, plain, precision, self.images[SMALL], 2 * seconds)
                peak = found["peaks"].get(row["precision"], found["peaks"]["f32"])
                rate = row["images_per_second"][str(pieces.BATCHES[-1])]
                row["share"] = rate * found["flops"]["joint"] / peak["gflops"]
                row["bare"] = rate
                found["graph"][precision] = row
        found["start"] = pieces.worker_start(self.bundle, precisions[0], 1 if quick else 3)


def tuning() -> list[Settings]:
    """What --tune tries: batch size and delay for one worker, and two workers that share the cores."""
    cores = os.cpu_count() or 1
    # TorchServe takes a delay of 0 for its default, 100 ms.
    found = [Settings(1, 0, batch, delay) for batch in (4, 8, 16) for delay in (1, 2, 5)]
    found += [Settings(2, threads, 8, delay) for threads in sorted({max(1, cores // 2), cores}) for delay in (1, 5)]
    return [*found, Settings(1, 0, 1, 0)]


def machine() -> dict[str, Any]:
    """The processor, and how busy the machine was before, which is too busy over IDLE for each core."""
    cpu = platform.processor() or platform.machine()
    if (path := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    return {"cpu": cpu, "cores": cores, "load": load, "busy": load > IDLE * cores, "system": platform.platform()}


def versions() -> dict[str, str]:
    """The packages that were measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@app.command(help=__doc__, epilog=EPILOG)
def bench(
    out: Path | None = typer.Option(None, help="Folder for results.json, README.md, figure.html; none is kept else."),
    architecture: str = typer.Option("vit_small_patch16_224", help="A timm model, untrained, with seeded weights."),
    size: int = typer.Option(224, min=32, help="Its input's side, pixels."),
    bundle: Path | None = typer.Option(None, help="A bundle instead, such as model_store/skin_vit."),
    system: list[str] = typer.Option([], help="torchserve, onnxruntime, fastapi, ours; repeat for more. Default: all."),
    precision: list[str] = typer.Option(
        ["auto", "f32"], help="Of this project's handler; repeat for more (--tune: the first)."
    ),
    clients: list[int] = typer.Option([1, 4, 16], min=1, help="Clients at once; repeat for more."),
    seconds: float = typer.Option(2.0, min=0.1, help="For each figure; slow servers take three answers a client."),
    quick: bool = typer.Option(False, help="Two minutes: small picture, 1 and 4 clients, half a second, one setting."),
    tune: bool = typer.Option(False, help="Try batch sizes, delays and workers of this project's server, that alone."),
) -> None:
    # Servers are ended on the way out, whoever sends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if unknown := [name for name in system if name not in SYSTEMS]:
        raise typer.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(SYSTEMS)}.", param_hint="--system")
    if quick:
        clients, seconds = [n for n in clients if n <= 4] or clients[:1], min(seconds, 0.5)
    before = machine()
    if before["busy"]:
        errors.print(f"The machine is busy (load {before['load']:.1f}): these figures will be worth little.")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
            folder = Path(temporary)
            console.print("Making the model")
            place = folder / "bundle"
            made = complete(Bundle.load(bundle), place) if bundle else random_bundle(place, architecture, size)
            images = pictures(quick or tune)
            run = Bench(made, images, clients, seconds, _empty(made, images, before, bundle is not None))
            if tune:
                for settings in tuning():
                    run.ours(precision[0], settings, ("grid",), "tried")
            else:
                wanted = system or list(SYSTEMS)
                if "ours" in wanted:
                    run.pieces(precision, folder, quick)
                model = folder / "model"
                model.mkdir()
                if set(wanted) & set(BASELINES):
                    naive_model.export(made, model, onnx="onnxruntime" in wanted)
                for name in BASELINES:
                    if name in wanted:
                        run.baseline(name, model, quick)
                if "ours" in wanted:
                    for each in precision:
                        run.ours(each, servers.shipped(), ("grid", "overlay", "none"), "cells")
    except (BackboneError, BundleError, LoadError, PieceError, ServerError, OSError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None
    report.show(console, run.results)
    if out:
        keep(run.results, out)


def _empty(bundle: Bundle, images: dict[str, list[bytes]], before: dict[str, Any], given: bool) -> dict[str, Any]:
    """Results with nothing measured yet; `given` if the bundle is not an untrained one of ours."""
    config = bundle.config
    model: dict[str, Any] = {"architecture": config.architecture, "size": config.preprocessing.image_size}
    model |= {"classes": len(config.classes), "weights": "its own weights" if given else "untrained, seeded weights"}
    parts: dict[str, Any] = {name: {} for name in ("agreement", "handler", "graph", "flops", "peaks", "start")}
    return parts | {
        "command": shlex.join(["python", "scripts/studies/bench_serving.py", *sys.argv[1:]]),
        "machine": before,
        "versions": versions(),
        "model": model,
        "images": [{"name": name, "bytes": [len(file) for file in files]} for name, files in images.items()],
        "cells": [],
        "tried": [],
    }


def keep(results: dict[str, Any], out: Path) -> None:
    """Write results.json, README.md and figure.html to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    for name, text in (
        ("README.md", report.markdown(results)),
        ("figure.html", report.figure(results).to_html(include_plotlyjs=True)),
    ):
        with atomic_file(out / name) as file:
            file.write(text.encode())
    console.print(f"{out}: results.json, README.md, figure.html")


if __name__ == "__main__":
    app()
