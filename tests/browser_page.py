"""Helpers for tests of the page in Chromium: a running page, and checks of how it looks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Page

from scripts import child_processes
from tests.fake_torchserve import NOWHERE
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent
WINDOWS = {
    "wide": {"width": 1440, "height": 900},
    "middle": {"width": 1024, "height": 768},
    "narrow": {"width": 390, "height": 844},
}
MLFLOW = "http://127.0.0.1:5001"
PATIENCE = 60_000  # milliseconds for anything to appear, on a busy machine


@contextmanager
def streamlit(folder: Path, script: str, torchserve: str, monitor: str = NOWHERE) -> Iterator[str]:
    """Run `streamlit run` as a user types it, and yield its address."""
    env = os.environ | {"TORCHSERVE_URL": torchserve, "PROMOTER_URL": NOWHERE, "MLFLOW_PUBLIC_URL": MLFLOW}
    env |= {"MONITOR_URL": monitor}
    env.pop("PYTHONPATH", None)  # the project is installed; the page must not need its root on the path
    [port] = child_processes.free_ports(1)
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port)]
    process = child_processes.start(command, env, Path(os.devnull), folder)
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: httpx.get(f"{address}/_stcore/health").is_success, state=process.poll)
        yield address
    finally:
        child_processes.end(process)


def settle(page: Page) -> None:
    """Wait until Streamlit has run, every picture has arrived, and the chart, if there is one, is drawn."""
    page.wait_for_function(
        """() => document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
        && [...document.images].every(image => image.complete)
        && (!document.querySelector('.st-key-bars') || document.querySelector('.st-key-bars .bartext'))"""
    )


def check(page: Page, windows: list[str], state: str, theme: str) -> None:
    """Check the page in each window; with SCREENSHOT_DIR, keep a screenshot."""
    for name in windows:
        page.set_viewport_size(WINDOWS[name])
        page.wait_for_timeout(300)  # Streamlit's layout follows
        settle(page)
        main = page.get_by_test_id("stMain")
        assert main.evaluate("e => e.scrollWidth") <= WINDOWS[name]["width"], "the page scrolls sideways"
        assert page.evaluate(PALE) == []
        assert page.evaluate(CUT_OFF) == []
        button = page.get_by_test_id("stExpandSidebarButton").bounding_box()
        logo = page.locator(".sl-brand i").bounding_box()
        assert button["x"] + button["width"] <= logo["x"], "the sidebar's button covers the logo"
        if folder := os.environ.get("SCREENSHOT_DIR"):
            screenshot(page, Path(folder) / f"{state}-{name}-{theme}.png")


def screenshot(page: Page, path: Path) -> None:
    """Keep a picture of the whole page, however long."""
    size = page.viewport_size
    height = page.get_by_test_id("stMain").evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": max(size["height"], height + 10)})
    settle(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)  # chart and table fade in
    page.screenshot(path=path)
    page.set_viewport_size(size)


# Texts of the chart that are cut off at its edge.
CUT_OFF = """() => {
  const chart = document.querySelector('.st-key-bars')?.getBoundingClientRect();
  return [...document.querySelectorAll('.st-key-bars :is(.bartext, .ytick text)')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1;
  }).map(text => text.textContent);
}"""

# Texts whose contrast with the nearest opaque background is below the minimum of WCAG 2.1 (4.5).
PALE = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => rgba(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = element => {
    let ground = element;
    while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] < 250) ground = ground.parentElement;
    const below = ground ? getComputedStyle(ground).backgroundColor : 'white';
    const pair = [light(getComputedStyle(element).color), light(below)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const texts = [...document.querySelectorAll('[data-testid=stHtml] *')].filter(e => e.innerText?.trim());
  if (texts.length < 10) return ['no text found'];
  return texts.filter(e => contrast(e) < 4.5).map(e => `${e.innerText}: ${contrast(e).toFixed(1)}`);
}"""
