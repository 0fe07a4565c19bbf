"""The page in headless Chromium, against a stand-in for TorchServe.

What a reader does and sees: upload, nine probabilities, heatmap, another class, opacity; many pictures and their CSV;
trouble told in words. In wide and narrow windows, light and dark, nothing is cut off, the console stays clean, and no
request leaves this machine.

`SCREENSHOT_DIR=DIR` keeps the screenshots. With `SCREENSHOT_PAGE_URL=http://127.0.0.1:8501` they are of that page, and
so of a real model's answers: `SCREENSHOT_DIR=shots pytest tests/test_page_browser.py -k "fits and wide"`.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.chromium import chromium
from tests.fake_torchserve import CLASSES, TAKES, FakeTorchServe, answer_for

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent
WINDOWS = {
    "wide": {"width": 1440, "height": 900},
    "middle": {"width": 1024, "height": 768},
    "narrow": {"width": 420, "height": 860},
}
SECONDS = 60_000  # milliseconds for anything to appear, on a busy machine


@contextmanager
def streamlit(folder: Path, script: str, torchserve: str) -> Iterator[str]:
    """`streamlit run` as a user types it; gives its address. The port is the system's choice, so it is surely free."""
    env = os.environ | {
        "TORCHSERVE_URL": torchserve,
        "PROMOTER_URL": "http://127.0.0.1:9",
        "MLFLOW_PUBLIC_URL": "http://127.0.0.1:5001",
    }
    env.pop("PYTHONPATH", None)  # the project is installed; its root must not be needed on the path
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield wait_for_address(process, log)
        finally:
            process.terminate()
            process.wait(20)


def wait_for_address(process: subprocess.Popen, log: IO[str]) -> str:
    """The address that Streamlit prints, once it answers there."""
    end = time.monotonic() + 60
    while True:
        log.seek(0)
        said = log.read()
        assert process.poll() is None, f"streamlit did not start:\n{said}"
        assert time.monotonic() < end, f"streamlit does not answer:\n{said}"
        if found := re.search(r"URL: (http://\S+)", said):
            with suppress(requests.ConnectionError):
                if requests.get(f"{found[1]}/_stcore/health", timeout=5).ok:
                    return found[1]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[FakeTorchServe]:
    with FakeTorchServe() as fake:
        yield fake


@pytest.fixture
def server(shared_server) -> FakeTorchServe:
    shared_server.mode, shared_server.busy_for, shared_server.version = "ok", 0, "3"
    shared_server.takes = {}
    shared_server.asked.clear()
    shared_server.told.clear()
    return shared_server


@pytest.fixture(scope="module")
def address(shared_server) -> Iterator[str]:
    """The page, started from inside its folder."""
    with streamlit(ROOT / "streamlit_app", "app.py", shared_server.url) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def context(browser) -> Iterator[BrowserContext]:
    """One for all tests, so that Streamlit's scripts are fetched and compiled once."""
    context = browser.new_context(viewport=WINDOWS["wide"], accept_downloads=True)
    yield context
    context.close()


@pytest.fixture
def watched(context) -> Iterator[Page]:
    """A window whose every request and complaint is looked at in the end."""
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    complaints: list[str] = []
    hosts: set[str | None] = set()
    page.on("console", lambda m: complaints.append(f"{m.text} {m.location}") if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname) if r.url.startswith(("http", "ws")) else None)
    page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname))
    yield page
    page.close()
    assert hosts <= {"127.0.0.1"}, f"requests left this machine: {hosts}"
    assert not complaints


@pytest.fixture
def page(watched, server, address) -> Page:
    watched.goto(address)
    expect(watched.locator(".sl-steps")).to_be_visible()
    return watched


@pytest.fixture(scope="module")
def files(tmp_path_factory, drawn_image) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for code in ("MEL", "NV", "BCC"):
        (folder / f"{code.lower()}.jpg").write_bytes(drawn_image(code, 2))
    (folder / "notes.jpg").write_text("no picture at all")
    return {path.stem: path for path in folder.iterdir()}


def upload(page: Page, *paths: Path) -> None:
    page.set_input_files('[data-testid="stFileUploader"] input[type=file]', [str(path) for path in paths])


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=re.compile(option)).click()


def heat_source(page: Page) -> str:
    source = page.get_by_alt_text(re.compile("^Heatmap for ")).get_attribute("src")
    assert source
    return source


def settled(page: Page) -> None:
    """Wait until Streamlit has run, every picture has arrived, and the chart, where there is one, is drawn."""
    page.wait_for_function(
        """() => document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
        && [...document.images].every(image => image.complete)
        && (!document.querySelector('.st-key-bars') || document.querySelector('.st-key-bars .bartext'))"""
    )


def test_one_picture(page, server, files):
    upload(page, files["mel"])
    top = answer_for(files["mel"].read_bytes())
    name = top["prediction"]["name"]
    expect(page.locator(".sl-verdict h2")).to_contain_text(name)
    for lesion, _, _ in CLASSES.values():
        expect(page.locator(".st-key-bars .ytick").filter(has_text=lesion)).to_have_count(1)
    expect(page.locator(".st-key-bars .ytick").filter(has_text="· malignant")).to_have_count(3)
    expect(page.locator(".st-key-bars .bartext", has_text="%")).to_have_count(9)
    expect(page.get_by_text("The likely classes")).to_be_visible()
    expect(page.get_by_alt_text("The uploaded picture mel.jpg")).to_be_visible()
    expect(page.get_by_alt_text(f"Heatmap for {name}")).to_be_visible()
    run = page.get_by_role("link", name="its training run")
    expect(run).to_have_attribute("href", f"http://127.0.0.1:5001/#/runs/{top['model']['run_id']}")
    expect(run).to_have_attribute("target", "_blank")
    assert server.asked == [None]


def test_picture_and_heatmap_stand_side_by_side_in_the_same_size(page, files):
    upload(page, files["nv"])
    left = page.get_by_alt_text("The uploaded picture nv.jpg")
    right = page.get_by_alt_text(re.compile("^Heatmap for "))
    expect(right).to_be_visible()
    settled(page)
    a, b = left.bounding_box(), right.bounding_box()
    assert a and b
    assert (a["y"], a["width"], a["height"]) == (b["y"], b["width"], b["height"])
    assert a["x"] + a["width"] < b["x"]


def test_hover_explains_a_class(page, files):
    upload(page, files["mel"])
    chart = page.locator(".st-key-bars .nsewdrag")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box
    first = answer_for(files["mel"].read_bytes())["prediction"]["code"]
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] / 18)
    expect(page.locator(".st-key-bars .hovertext")).to_contain_text(CLASSES[first][2][:25])


def test_glossary(page, files):
    upload(page, files["mel"])
    page.get_by_text("What the nine classes mean").click()
    for name, _, description in CLASSES.values():
        expect(page.locator(".sl-glossary dt").filter(has_text=name)).to_be_visible()
        expect(page.locator(".sl-glossary dd").filter(has_text=description)).to_be_visible()


def test_another_class_and_opacity(page, server, files):
    upload(page, files["mel"])
    expect(page.get_by_alt_text(re.compile("^Heatmap for "))).to_be_visible()
    seen = {heat_source(page)}
    choose(page, "Evidence for", "Dermatofibroma")
    expect(page.get_by_alt_text("Heatmap for Dermatofibroma")).to_be_visible()
    settled(page)
    before = heat_source(page)
    seen.add(before)
    thumb = page.get_by_role("slider", name="Opacity of the heatmap")
    thumb.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(thumb).to_have_value("50")
    expect(page.get_by_alt_text("Heatmap for Dermatofibroma")).not_to_have_attribute("src", before)
    settled(page)
    seen.add(heat_source(page))
    assert len(seen) == 3, "the heatmap did not change with the class and the opacity"
    assert server.asked == [None, "DF"], "moving the slider asked the server again"


def test_many_pictures_and_their_csv(page, files, tmp_path):
    upload(page, files["mel"], files["nv"], files["bcc"], files["notes"])
    expect(page.locator(".sl-counts")).to_contain_text("3 read")
    expect(page.locator(".sl-counts")).to_contain_text("1 refused")
    expect(page.locator(".sl-problem")).to_contain_text("notes.jpg This is not a JPEG or PNG image.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    download.value.save_as(tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["mel.jpg", "nv.jpg", "bcc.jpg", "notes.jpg"]
    expected = answer_for(files["bcc"].read_bytes())["probabilities"]
    assert {code: float(rows["bcc.jpg"][code]) for code in CLASSES} == pytest.approx(expected)
    assert rows["notes.jpg"]["problem"] == "This is not a JPEG or PNG image."


def test_what_is_known_of_each_patient(page, server, files, tmp_path):
    server.takes = TAKES
    upload(page, files["mel"], files["nv"])
    age = page.get_by_role("spinbutton", name="Age in years")
    age.fill("71")
    age.press("Enter")
    choose(page, "Sex", "female")
    told = {"age": "71", "sex": "female"}
    mel = answer_for(files["mel"].read_bytes(), takes=TAKES, told=told)
    expect(page.get_by_alt_text(f"Heatmap for {mel['prediction']['name']}")).to_be_visible()
    expect(page.locator(".sl-verdict")).to_contain_text(mel["prediction"]["name"])
    settled(page)
    if folder := os.environ.get("SCREENSHOT_DIR"):
        page.screenshot(path=Path(folder) / "patient.png")

    def open_row(number: int, name: str) -> None:
        table = page.get_by_test_id("stDataFrame").bounding_box()
        assert table
        page.mouse.click(table["x"] + 17, table["y"] + 35 + 52 * number + 26)
        expect(page.locator(".sl-verdict")).to_contain_text(name)
        settled(page)

    open_row(1, "nv.jpg")
    expect(age).to_have_value("")
    open_row(0, "mel.jpg")
    expect(age).to_have_value("71")
    expect(page.locator(".sl-verdict")).to_contain_text(mel["prediction"]["name"])
    assert told in server.told
    assert len(server.told) == 4, "two pictures, and two fields of one of them"


def test_a_row_of_the_table_shows_its_picture(page, files):
    upload(page, files["mel"], files["nv"], files["bcc"])
    expect(page.locator(".sl-verdict")).to_contain_text("mel.jpg")
    table = page.get_by_test_id("stDataFrame").bounding_box()
    assert table
    page.mouse.click(table["x"] + 17, table["y"] + 35 + 52 * 2 + 26)  # the third row's mark
    expect(page.locator(".sl-verdict")).to_contain_text("bcc.jpg")
    expect(page.get_by_alt_text("The uploaded picture bcc.jpg")).to_be_visible()


def test_a_picture_taken_away_again(page, files):
    upload(page, files["mel"])
    expect(page.locator(".sl-verdict")).to_be_visible()
    page.get_by_test_id("stFileUploader").get_by_role("button", name=re.compile("Remove")).click()
    expect(page.locator(".sl-verdict")).to_have_count(0)
    expect(page.locator(".sl-steps")).to_be_visible()


def test_refused_and_too_large(page, server, files):
    upload(page, files["notes"])
    expect(page.get_by_role("alert").filter(has_text="This picture was refused")).to_contain_text("not a JPEG or PNG")
    server.mode = "too_large"
    upload(page, files["nv"])
    expect(page.get_by_text("The image is larger than the model server accepts.")).to_be_visible()


def test_server_away_and_back(page, server, files):
    server.mode = "no_model"
    upload(page, files["mel"])
    expect(page.get_by_role("alert")).to_contain_text("No model is being served yet")
    server.mode = "ok"
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".sl-verdict")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_nothing_listens_and_started_from_the_root(watched, files):
    """`streamlit run streamlit_app/app.py` in the repository's root, with no server behind it."""
    with streamlit(ROOT, "streamlit_app/app.py", "http://127.0.0.1:9") as address:
        watched.goto(address)
        upload(watched, files["mel"])
        expect(watched.get_by_role("alert")).to_contain_text("The model server is away")
        expect(watched.get_by_role("button", name="Try again")).to_be_visible()
        watched.goto("about:blank")  # or it would complain that its server goes away


def test_hostile_file_name_is_only_text(page, tmp_path, drawn_image):
    name = "<img src=x onerror=alert(1)>**b**[x](javascript:0).jpg"
    (tmp_path / name).write_bytes(drawn_image("NV", 3))
    upload(page, tmp_path / name)
    expect(page.locator(".sl-verdict .sl-file")).to_have_text(name)
    assert page.locator("img[src=x]").count() == 0


def test_notice_stays_in_sight(page, files):
    upload(page, files["mel"])
    expect(page.locator(".sl-provenance")).to_be_visible()
    settled(page)
    page.locator(".sl-provenance").scroll_into_view_if_needed()
    expect(page.locator(".sl-notice")).to_be_in_viewport(ratio=1)
    box = page.locator(".sl-notice").bounding_box()
    assert box
    on_top = page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('.sl-notice') !== null",
                           [box["x"] + 20, box["y"] + 8])  # fmt: skip
    assert on_top, "something covers the notice"


@pytest.mark.parametrize(("theme", "windows"), [("light", ["wide", "middle", "narrow"]), ("dark", ["narrow", "wide"])])
def test_fits_and_can_be_read(watched, server, address, files, theme, windows):
    """No sideways scrolling, text that stands out from its ground, in both themes; with SCREENSHOT_DIR, pictures."""
    watched.set_viewport_size(WINDOWS[windows[0]])
    watched.emulate_media(color_scheme=theme)
    watched.goto(os.environ.get("SCREENSHOT_PAGE_URL", address))
    expect(watched.locator(".sl-steps")).to_be_visible()
    check(watched, windows, "empty", theme)
    upload(watched, files["mel"])
    expect(watched.locator(".sl-provenance")).to_be_visible()
    check(watched, windows, "one", theme)
    upload(watched, files["nv"], files["bcc"], files["notes"])
    expect(watched.locator(".sl-counts")).to_be_visible()
    check(watched, windows, "many", theme)


def check(page: Page, windows: list[str], what: str, theme: str) -> None:
    for window in windows:
        page.set_viewport_size(WINDOWS[window])
        page.wait_for_timeout(300)  # Streamlit lays out anew
        fits(page)
        if folder := os.environ.get("SCREENSHOT_DIR"):
            screenshot(page, Path(folder) / f"{what}-{window}-{theme}.png")


def fits(page: Page) -> None:
    settled(page)
    main = page.get_by_test_id("stMain")
    assert main.evaluate("e => e.scrollWidth") <= page.viewport_size["width"], "the page scrolls sideways"
    assert page.evaluate(PALE) == []
    assert page.evaluate(CUT_OFF) == []
    button = page.get_by_test_id("stExpandSidebarButton").bounding_box()
    logo = page.locator(".sl-brand i").bounding_box()
    assert button
    assert logo
    assert button["x"] + button["width"] <= logo["x"], "the sidebar's button stands on the logo"


def screenshot(page: Page, path: Path) -> None:
    """The whole page, however long."""
    window = page.viewport_size
    height = page.get_by_test_id("stMain").evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": window["width"], "height": max(window["height"], height + 10)})
    settled(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)  # Plotly and the table fade in
    page.screenshot(path=path)
    page.set_viewport_size(window)


# Texts of the chart that reach beyond it.
CUT_OFF = """() => {
  const chart = document.querySelector('.st-key-bars')?.getBoundingClientRect();
  return [...document.querySelectorAll('.st-key-bars :is(.bartext, .ytick text)')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < chart.left - 1 || box.right > chart.right + 1;
  }).map(text => text.textContent);
}"""

# Texts whose contrast with the nearest painted ground is below what WCAG 2.1 asks for (4.5).
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
