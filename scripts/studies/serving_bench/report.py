"""From the results of scripts/studies/bench_serving.py to the targets' verdicts, tables, a page in Markdown, and a figure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table as RichTable

NAIVE = "torchserve"
# What a system is called in tables and figures; this project's has its precision for a name.
TITLES = {"torchserve": "stock handler", "onnxruntime": "with ONNX Runtime", "fastapi": "FastAPI"}
HEAD = """# Serving speed

Written by

    {command}

on {machine[cpu]}, {machine[cores]} cores, with {versions}.
The load average before the run was {machine[load]:.1f}{busy}.

{model[architecture]}, {model[size]} px, {model[classes]} classes, {model[weights]}. All servers have the same network
and were sent the same bytes; `python scripts/studies/bench_serving.py --help` tells what is measured and how. The largest
difference of a probability to the eager model's was {agreement}. The client's threads run on the same cores and took
{client:.2f} of one at most.

- *stock handler*: TorchServe with a handler on top of BaseHandler: timm in fp32, torchvision's transforms, the
  `grad-cam` package; *with ONNX Runtime*: the same, with its probabilities; *FastAPI*: the stock handler's code under
  uvicorn; *ours*: this project's archive in TorchServe, with the settings that the repository ships.
- `grid` is this project's default answer, the heatmap as numbers; `overlay` is the heatmap laid over the picture: a PNG
  of up to 640 pixels here, a JPEG of the network's size by the others; `none`: probabilities alone.
- Each of the others is shown at the best of the settings tried for each number of clients and kind of answer. `2×1, 8`
  means two workers of one thread each, batches of eight.
- "× stock" is requests/s by the stock handler's at the same number of clients.
- "pace" is how fast the processor did a fixed matrix product right before and after, in % of its fastest beside any
  figure here. Far below 100 the processor was slower than it can be, and so is what was measured.
- MB is resident memory, of Python's processes and of Java; each process counts what it shares with others.
"""


@dataclass(frozen=True)
class Table:
    """A title, the columns' names, and rows of text."""

    title: str
    headers: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Target:
    """A ratio that was aimed at. `wanted` None: told for comparison. `value` None: this run did not measure it."""

    name: str
    value: float | None
    wanted: float | None
    at_least: bool = True

    @property
    def reached(self) -> bool | None:
        """None without a verdict."""
        if self.value is None or self.wanted is None:
            return None
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


def targets(results: dict[str, Any]) -> list[Target]:
    """The ratios that were aimed at, and a few for comparison."""

    def cell(system: str, image: str, answer: str, clients: int, figure: str) -> float | None:
        for row in results["cells"]:
            if (row["system"], row["image"], row["answer"], row["clients"]) == (system, image, answer, clients):
                return float(row[figure])
        return None

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    small, *others = _images(results)
    found = []
    for precision, wanted in (("auto", 16.0), ("f32", 10.0)):
        for clients in (4, 16):
            mine = cell(f"ours {precision}", small, "grid", clients, "rps")
            times = ratio(mine, cell(NAIVE, small, "overlay", clients, "rps"))
            found.append(Target(f"requests/s by the stock handler's, {clients} clients, {precision}", times, wanted))
    slow, fast = cell(NAIVE, small, "overlay", 1, "p95"), cell("ours auto", small, "grid", 1, "p95")
    found.append(Target("p95 of the stock handler by ours, 1 client", ratio(slow, fast), 11.0))
    graph = results["graph"].get("auto", {})
    for batch, row in sorted(graph.get("batches", {}).items()):
        found.append(Target(f"joint graph by plain forward, batch {batch}", row.get("ratio"), 1.05, at_least=False))
    served = cell("ours auto", small, "grid", 16, "rps")
    found.append(Target("served, 16 clients, of what the graph does alone", ratio(served, graph.get("bare")), 0.88))
    found.append(Target("share of the processor's peak, batch 8", graph.get("share"), 0.65))
    found.append(Target("our part of a worker's start (s)", results["start"].get("fresh"), 2.0, at_least=False))
    naive = cell(NAIVE, small, "overlay", 16, "rps")
    ours = [system for system in {row["system"] for row in results["cells"]} if system.startswith("ours")]
    rates = [ratio(cell(system, small, "grid", 16, "rps"), naive) for system in ours]
    best = max((rate for rate in rates if rate is not None), default=None)
    found.append(Target("the goal: requests/s by the stock handler's, 16 clients, any precision", best, 25.0))
    for image in (small, *others):
        for answer in ("grid", "overlay") if image != small else ("overlay",):
            times = ratio(cell("ours auto", image, answer, 16, "rps"), cell(NAIVE, image, "overlay", 16, "rps"))
            found.append(Target(f"for comparison: the same at auto, {image}, {answer}", times, None))
    return found


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """All tables, the verdicts first."""
    rows = []
    for target in targets(results):
        wanted = "" if target.wanted is None else f"{'≥' if target.at_least else '≤'} {target.wanted:g}"
        verdict = {True: "reached", False: "not reached", None: "" if target.wanted is None else "not measured"}
        value = "" if target.value is None else f"{target.value:.2f}"
        rows.append([target.name, value, wanted, verdict[target.reached]])
    if results["cells"]:
        yield Table("Targets", ["ratio", "measured", "aim", "verdict"], rows)
    headers = [
        "server",
        "settings",
        "answer",
        "clients",
        "req/s",
        "× stock",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "MB",
        "pace",
    ]
    fastest = max((row["pace"] for row in results["cells"] + results["tried"]), default=1.0)
    for image in _images(results):
        for kind, answers in (("with Grad-CAM", ("grid", "overlay")), ("probabilities alone", ("none",))):
            chosen = [r for r in results["cells"] if r["image"] == image and r["answer"] in answers]
            stock = {row["clients"]: row["rps"] for row in chosen if row["system"] == NAIVE}
            if chosen:
                yield Table(f"{image} JPEG, {kind}", headers, [_cell(row, stock, fastest) for row in chosen])
    if results["tried"]:
        yield Table("Settings tried, 600×450 JPEG", headers, [_cell(row, {}, fastest) for row in results["tried"]])
    yield from _pieces(results)


def _images(results: dict[str, Any]) -> list[str]:
    return [image["name"] for image in results["images"]]


def title(row: dict[str, Any]) -> str:
    """A server's name for people: `ours auto (bf16)`."""
    told = row["precision"] and row["precision"] not in row["system"]
    return TITLES.get(row["system"], row["system"]) + (f" ({row['precision']})" if told else "")


def _cell(row: dict[str, Any], stock: dict[int, float], fastest: float) -> list[str]:
    times = f"{row['rps'] / stock[row['clients']]:.1f}" if row["clients"] in stock else ""
    latency = [f"{row[name]:.0f}" for name in ("p50", "p95", "p99")]
    memory = " + ".join(f"{row['memory'][name]:.0f}" for name in ("python", "java") if row["memory"][name])
    what = [title(row), row["settings"], row["answer"], str(row["clients"])]
    return [*what, f"{row['rps']:.1f}", times, *latency, memory, f"{100 * row['pace'] / fastest:.0f}"]


def _pieces(results: dict[str, Any]) -> Iterator[Table]:
    names = ["decode", "graph", "encode", "rest", "handler", "overlay"]
    if results["handler"]:
        rows = []
        for image in _images(results):
            for precision, row in sorted(results["handler"].get(image, {}).items()):
                for batch, figures in sorted(row["batches"].items()):
                    times = [f"{figures[name]:.2f}" for name in names]
                    rows.append([image, f"{precision} ({row['precision']})", batch, *times])
        what = "Inside the handler, ms an image (overlay only where it is asked for)"
        yield Table(what, ["image", "precision", "batch", *names], rows)
    if results["graph"]:
        rows = []
        for precision, row in sorted(results["graph"].items()):
            for batch, figures in sorted(row["batches"].items()):
                rate = f"{row['images_per_second'][batch]:.1f}"
                gflops = row["images_per_second"][batch] * results["flops"]["joint"]
                compared = [f"{figures['joint']:.2f}", f"{figures['plain']:.2f}", f"{figures['ratio']:.3f}"]
                times = [*compared, rate, f"{gflops:.0f}"]
                rows.append([f"{precision} ({row['precision']})", batch, *times])
        headers = ["precision", "batch", "joint graph ms", "plain forward ms", "ratio", "images/s", "GFLOP/s"]
        work = results["flops"]
        what = f"The graph alone ({work['joint']:.2f} GFLOP an image, the plain forward {work['plain']:.2f})"
        yield Table(what, headers, rows)
    if results["peaks"]:
        rows = [[kind, f"{peak['gflops']:.0f}", peak["by"]] for kind, peak in sorted(results["peaks"].items())]
        yield Table("The best matrix product", ["precision", "GFLOP/s", "by, and its side"], rows)
    if results["start"]:
        start = results["start"]
        rows = [["an archive's first start", f"{start['fresh']:.2f}"], ["any later start", f"{start['again']:.2f}"]]
        yield Table("Our part of a worker's start", ["", "seconds"], rows)


def show(console: Console, results: dict[str, Any]) -> None:
    """Print the tables."""
    for table in tables(results):
        drawn = RichTable(title=table.title, title_justify="left")
        for index, header in enumerate(table.headers):
            text = index == 0 or header in ("answer", "settings", "image", "verdict")
            drawn.add_column(header, justify="left" if text else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def markdown(results: dict[str, Any]) -> str:
    """The page, with all tables."""
    agreement = max(results["agreement"].values(), default=None)
    text = HEAD.format(
        command=results["command"],
        machine=results["machine"],
        busy=": too much, these figures are worth little" if results["machine"]["busy"] else "",
        model=results["model"],
        versions=", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items())),
        agreement="not compared" if agreement is None else f"{agreement:.1g}",
        client=max((row["client_cores"] for row in results["cells"] + results["tried"]), default=0.0),
    )
    for table in tables(results):
        text += f"\n## {table.title}\n\n| {' | '.join(table.headers)} |\n|{' --- |' * len(table.headers)}\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in table.rows)
    return text


def figure(results: dict[str, Any]) -> go.Figure:
    """Requests per second and p95 by number of clients: a row for each picture, with and without Grad-CAM."""
    kinds = [("with Grad-CAM", ("grid", "overlay")), ("probabilities alone", ("none",))]
    rows = [(image, *kind) for image in _images(results) for kind in kinds]
    titles = [f"{image}, {kind}: {what}" for image, kind, _ in rows for what in ("requests/s", "p95 ms")]
    drawn = make_subplots(rows=len(rows), cols=2, subplot_titles=titles)
    names = sorted({(title(row), row["answer"]) for row in results["cells"]})
    colours = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac", "#eeca3b"]
    shown = set()
    for number, (image, _, answers) in enumerate(rows, start=1):
        for index, (system, answer) in enumerate(names):
            cells = [r for r in results["cells"] if (title(r), r["answer"], r["image"]) == (system, answer, image)]
            if answer not in answers or not cells:
                continue
            name = f"{system}: {answer}"
            for column, value in ((1, "rps"), (2, "p95")):
                bar = go.Bar(
                    x=[f"{cell['clients']} clients" for cell in cells],
                    y=[cell[value] for cell in cells],
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    marker_color=colours[index % len(colours)],
                )
                drawn.add_trace(bar, row=number, col=column)
                shown.add(name)
    drawn.update_yaxes(type="log")  # from 4 to over 100 requests/s
    what = f"{results['model']['architecture']} on {results['machine']['cpu']}, {results['machine']['cores']} cores"
    drawn.update_layout(title=what, barmode="group", height=380 * max(1, len(rows)), template="plotly_white")
    return drawn
