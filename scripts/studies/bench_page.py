"""Measure the page in Chromium: uploads against the requests that it sends, and the opening of Monitoring.

The stack must run on this machine (make up), and Chromium must be installed. The pictures are drawn. What the page
sends enters the prediction log; the requests that it is compared with do not.
"""

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import requests
import typer
from playwright.sync_api import Browser, Page, sync_playwright

from handlers.errors import UserError
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import command_line
from mlflow_tracking.command_line import console
from scripts.studies.idle_machine import BusyOption, require_idle_machine
from training.data.synthetic import draw_lesion

PATIENCE_MS = 120_000
OPENINGS = 5  # of Monitoring after the first, for the median
CLIENTS = 16  # of the requests that many pictures are compared with
UPLOADER = '[data-testid="stFileUploader"] input[type=file]'


class PageBenchError(UserError):
    """The page or TorchServe does not answer, or there is no Chromium."""


def pictures(folder: Path, count: int, first: int) -> list[Path]:
    """Draw `count` JPEGs of 600×450 pixels, different for each seed from `first` on."""
    paths = []
    for seed in range(first, first + count):
        draw_lesion(seed, KNOWN_CODES[seed % len(KNOWN_CODES)], size=(600, 450)).save(data := io.BytesIO(), "JPEG")
        paths.append(folder / f"lesion_{seed}.jpg")
        paths[-1].write_bytes(data.getvalue())
    return paths


def request(session: requests.Session, torchserve: str, path: Path) -> float:
    """Send what the page sends for a picture. Returns the seconds until the whole answer has arrived."""
    files = {"data": ("image", path.read_bytes(), "application/octet-stream")}
    began = time.perf_counter()
    try:
        answer = session.post(f"{torchserve}/predictions/skin_vit", data={"picture": "true"}, files=files,
                              headers={"X-Record": "no"}, timeout=60)  # fmt: skip
        answer.raise_for_status()
    except requests.RequestException as error:
        raise PageBenchError(f"{torchserve} gave no answer ({error}). Run `make up` first.") from error
    return time.perf_counter() - began


def all_at_once(torchserve: str, paths: list[Path]) -> float:
    """Return the seconds that CLIENTS clients take for these pictures."""
    with requests.Session() as session, ThreadPoolExecutor(CLIENTS) as pool:
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CLIENTS))
        began = time.perf_counter()
        list(pool.map(lambda path: request(session, torchserve, path), paths))
        return time.perf_counter() - began


def shown(page: Page) -> None:
    """Wait for the heatmap of a picture."""
    page.wait_for_function(
        "() => [...document.images].some(image => image.alt.startsWith('Heatmap for') && image.complete)",
        timeout=PATIENCE_MS,
    )


def listed(page: Page) -> None:
    """Wait for a table: of many pictures, or of the latest predictions."""
    page.get_by_test_id("stDataFrame").first.wait_for(timeout=PATIENCE_MS)


def in_the_page(browser: Browser, address: str, paths: list[Path], wait: Callable[[Page], None]) -> float:
    """Return the seconds from the choice of files to their result, in a new session of the page."""
    page = browser.new_page()
    try:
        page.goto(address, timeout=PATIENCE_MS)
        page.locator(UPLOADER).wait_for(state="attached", timeout=PATIENCE_MS)
        page.wait_for_timeout(1000)  # the page is idle
        began = time.perf_counter()
        page.set_input_files(UPLOADER, [str(path) for path in paths])
        wait(page)
        return time.perf_counter() - began
    finally:
        page.close()


def monitoring(browser: Browser, address: str) -> list[float]:
    """Return the seconds from the address of Monitoring to its charts and the latest predictions, several times.

    The first time, the browser has none of the page's files.
    """
    page, seconds = browser.new_page(), []
    try:
        for _ in range(1 + OPENINGS):
            began = time.perf_counter()
            page.goto(f"{address}/monitoring", timeout=PATIENCE_MS)
            page.wait_for_function(
                "() => [...document.querySelectorAll('.js-plotly-plot')].filter(chart => chart._fullData).length >= 4",
                timeout=PATIENCE_MS,
            )
            listed(page)
            seconds.append(time.perf_counter() - began)
        return seconds
    finally:
        page.close()


def main(
    page: Annotated[str, typer.Option(help="Address of the page.")] = "http://127.0.0.1:8501",
    torchserve: Annotated[str, typer.Option(help="Address of TorchServe.")] = "http://127.0.0.1:8080",
    busy: BusyOption = False,
    count: Annotated[int, typer.Option(min=2, help="Pictures at once; a fifth as many one by one.")] = 50,
) -> None:
    """Measure from upload to picture, many pictures at once, and the opening of Monitoring.

    For Monitoring with a million predictions, fill a database with bench_monitor.py --folder, and start the stack with
    MONITOR_DATABASE.
    """
    require_idle_machine(busy)
    program = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if not program:
        raise PageBenchError("Chromium is not installed. Install it, or set CHROMIUM to its path.")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright, requests.Session() as session:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        single = pictures(Path(temporary), max(3, count // 5), 1000)
        several = pictures(Path(temporary), count, 2000)
        in_the_page(browser, page, single[:1], shown)  # warm
        alone = statistics.median(request(session, torchserve, path) for path in single)
        uploaded = statistics.median(in_the_page(browser, page, [path], shown) for path in single)
        together = all_at_once(torchserve, several)
        table = in_the_page(browser, page, several, listed)
        first, *later = monitoring(browser, page)
        browser.close()
    grid = command_line.table("The page in Chromium", ["", "request", "page", "page / request"])
    grid.add_row("one picture, ms", f"{1e3 * alone:.0f}", f"{1e3 * uploaded:.0f}", f"{uploaded / alone:.1f}")
    grid.add_row(f"{count} at once, s", f"{together:.2f}", f"{table:.2f}", f"{table / together:.1f}")
    grid.add_row("Monitoring in a new browser, to its charts, s", "", f"{first:.2f}", "")
    grid.add_row("Monitoring later, to its charts, s", "", f"{statistics.median(later):.2f}", "")
    console.print(grid)


if __name__ == "__main__":
    command_line.run(main, examples=["make up && python scripts/studies/bench_page.py"])
