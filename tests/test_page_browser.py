"""The page in headless Chromium, with a fake TorchServe.

A reader uploads pictures, reads nine probabilities and a heatmap, chooses a class, downloads the CSV, and meets every
problem as a sentence. In wide and narrow windows, light and dark, nothing is cut off, the console stays clean, and no
request leaves this machine.

`SCREENSHOT_DIR=DIR` keeps screenshots. `SCREENSHOT_PAGE_URL=http://127.0.0.1:8501` takes them of a running page, and so
of a real model's answers: `SCREENSHOT_DIR=shots pytest tests/test_page_browser.py -k "fits and light"`.
"""

import csv
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, TimeoutError, expect

from tests.browser_page import MLFLOW, ROOT, WINDOWS, check, settle, streamlit
from tests.fake_torchserve import CLASSES, NOWHERE, TAKES, answer_for
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_page", "tests.fixtures_browser"]
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
HOSTILE = "<img src=x onerror=alert(1)>**b**[x](javascript:0).jpg"
HEATMAP = re.compile("^Heatmap for ")


@pytest.fixture(scope="module")
def address(fake_server) -> Iterator[str]:
    """The page, started from its own folder."""
    with streamlit(ROOT / "streamlit_app", "app.py", fake_server.url) as address:
        yield address


@pytest.fixture
def page(window, server, address) -> Page:
    window.goto(address)
    expect(window.locator(".sl-steps")).to_be_visible()
    return window


@pytest.fixture(scope="module")
def files(tmp_path_factory, drawn_image) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for code in ("MEL", "NV", "BCC"):
        (folder / f"{code.lower()}.jpg").write_bytes(drawn_image(code, 2))
    (folder / HOSTILE).write_bytes(drawn_image("AK", 2))
    (folder / "notes.txt").write_text("no picture at all")
    (folder / "large").write_bytes(b"\xff\xd8\xff" + bytes(21 * 1024 * 1024))
    return {path.stem: path for path in folder.iterdir()}


def upload(page: Page, *paths: Path) -> None:
    page.set_input_files('[data-testid="stFileUploader"] input[type=file]', [str(path) for path in paths])


def choose(page: Page, label: str, option: str) -> None:
    listed = page.get_by_role("option", name=re.compile(option))

    def opened() -> bool:
        page.get_by_role("combobox", name=label).click()
        with suppress(TimeoutError):
            listed.click(timeout=3000)
            return True
        return False  # a redraw has closed the list

    settle(page)
    eventually(opened)


def open_row(page: Page, number: int, name: str) -> None:
    """Select a row of the table, which is drawn on a canvas."""
    table = page.get_by_test_id("stDataFrame").bounding_box()
    page.mouse.click(table["x"] + 17, table["y"] + 35 + 52 * number + 26)
    expect(page.locator(".sl-verdict")).to_contain_text(name)
    settle(page)


def test_one_picture(page, server, files):
    upload(page, files["mel"])
    answer = answer_for(files["mel"].read_bytes())
    name, code = answer["prediction"]["name"], answer["prediction"]["code"]
    expect(page.locator(".sl-verdict h2")).to_contain_text(name)
    expect(page.locator(".sl-verdict")).to_contain_text("not a diagnosis")
    expect(page.get_by_test_id("stDataFrame")).to_have_count(0)
    expect(page.get_by_role("spinbutton")).to_have_count(0)  # this model takes no details
    for lesion, _, _ in CLASSES.values():
        expect(page.locator(".st-key-bars .ytick").filter(has_text=lesion)).to_have_count(1)
    expect(page.locator(".st-key-bars .ytick").filter(has_text="· malignant")).to_have_count(3)
    expect(page.locator(".st-key-bars .bartext", has_text="%")).to_have_count(9)
    expect(page.get_by_text("Likely classes", exact=True)).to_be_visible()
    run = page.get_by_role("link", name="training run")
    expect(run).to_have_attribute("href", f"{MLFLOW}/#/runs/{answer['model']['run_id']}")
    expect(run).to_have_attribute("target", "_blank")
    expect(page.get_by_test_id("stSidebarNav")).to_have_count(0)

    left, right = page.get_by_alt_text("The uploaded picture mel.jpg"), page.get_by_alt_text(f"Heatmap for {name}")
    expect(left).to_be_visible()
    expect(right).to_be_visible()
    settle(page)
    a, b = left.bounding_box(), right.bounding_box()
    assert (a["y"], a["width"], a["height"]) == (b["y"], b["width"], b["height"])
    assert a["x"] + a["width"] < b["x"]

    chart = page.locator(".st-key-bars .nsewdrag")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] / 18)
    expect(page.locator(".st-key-bars .hovertext")).to_contain_text(CLASSES[code][2][:25])

    page.get_by_text("The nine classes explained").click()
    for lesion, _, description in CLASSES.values():
        expect(page.locator(".sl-glossary dt").filter(has_text=lesion)).to_be_visible()
        expect(page.locator(".sl-glossary dd").filter(has_text=description)).to_be_visible()

    page.locator(".sl-provenance").scroll_into_view_if_needed()
    expect(page.locator(".sl-notice")).to_be_in_viewport(ratio=1)
    box = page.locator(".sl-notice").bounding_box()
    on_top = page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('.sl-notice') !== null",
                           [box["x"] + 20, box["y"] + 8])  # fmt: skip
    assert on_top, "something covers the notice"
    assert server.targets == [None]


def test_another_class_and_opacity(page, server, files):
    upload(page, files["mel"])
    expect(page.get_by_alt_text(HEATMAP)).to_be_visible()
    sources = {page.get_by_alt_text(HEATMAP).get_attribute("src")}
    choose(page, "Evidence for", "Dermatofibroma")
    heatmap = page.get_by_alt_text("Heatmap for Dermatofibroma")
    expect(heatmap).to_be_visible()
    settle(page)
    before = heatmap.get_attribute("src")
    slider = page.get_by_role("slider", name="Opacity of the heatmap")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(slider).to_have_value("50")
    expect(heatmap).not_to_have_attribute("src", before)
    settle(page)
    sources |= {before, heatmap.get_attribute("src")}
    assert len(sources) == 3, "the heatmap did not change with the class and the opacity"
    assert server.targets == [None, "DF"], "moving the slider sent a request"


def test_the_alarm_leads_and_its_promise_can_be_changed(page, server, files):
    upload(page, files["mel"])
    alarm = page.locator(".sl-alarm")
    expect(alarm).to_contain_text("Set to miss at most 1 in 10 malignant lesions.")
    assert alarm.bounding_box()["y"] < page.locator(".sl-verdict").bounding_box()["y"]
    choose(page, "Miss at most", "1 in 100")
    expect(alarm).to_contain_text("Flagged as suspicious")
    expect(alarm).to_contain_text("also flags 81 in 100 other lesions")
    assert server.targets == [None], "another promise sent a request"


def test_many_pictures_and_their_csv(page, files, tmp_path):
    upload(page, files["mel"], files["nv"], files[Path(HOSTILE).stem], files["notes"])
    expect(page.locator(".sl-counts")).to_contain_text("3 read")
    expect(page.locator(".sl-counts")).to_contain_text("1 refused")
    expect(page.locator(".sl-problem")).to_contain_text("notes.txt This is not a JPEG or PNG image.")
    expect(page.get_by_role("button", name="Report of all")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    download.value.save_as(tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["mel.jpg", "nv.jpg", HOSTILE, "notes.txt"]
    expected = answer_for(files["nv"].read_bytes())["probabilities"]
    assert {code: float(rows["nv.jpg"][code]) for code in CLASSES} == pytest.approx(expected)
    assert rows["notes.txt"]["problem"] == "This is not a JPEG or PNG image."
    expect(page.locator(".sl-verdict")).to_contain_text("mel.jpg")
    open_row(page, 2, HOSTILE)
    expect(page.get_by_alt_text(f"The uploaded picture {HOSTILE}")).to_be_visible()
    assert page.locator("img[src=x]").count() == 0


def test_an_example_and_its_report(page, tmp_path):
    page.get_by_role("button", name="Drawn melanoma", exact=True).click()
    expect(page.get_by_role("note").filter(has_text="Drawn, not real.")).to_be_visible()
    expect(page.locator(".sl-verdict")).to_contain_text("drawn_melanoma_not_real.jpg")
    note = page.get_by_label("Note for the report")
    note.fill("case <b>17</b>")
    note.press("Enter")
    settle(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Report", exact=True).click()
    assert download.value.suggested_filename == "skin_lesion_report.html"
    download.value.save_as(tmp_path / "report.html")
    # From a string, as the test's windows may request nothing but this machine's addresses.
    page.goto("about:blank")
    page.set_content((tmp_path / "report.html").read_text(encoding="utf-8"))
    expect(page.get_by_text("Note: case <b>17</b>")).to_be_visible()
    expect(page.get_by_text("Not a medical device; not for diagnosis")).to_be_visible()
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 2
    assert min(sizes) > 0, "a picture is missing"
    page.emulate_media(media="print")
    for name, size in WINDOWS.items():
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the report scrolls sideways"
        if folder := os.environ.get("SCREENSHOT_DIR"):
            page.screenshot(path=Path(folder) / f"report-{name}.png", full_page=True)
    if folder:
        page.pdf(path=Path(folder) / "report.pdf", format="A4")
    page.emulate_media(media="screen")
    page.set_viewport_size(WINDOWS["wide"])


def test_patient_details_stay_with_their_picture(page, server, files):
    server.takes = TAKES
    upload(page, files["mel"], files["nv"])
    expect(page.get_by_text("Fields you leave empty are not used.")).to_be_visible()
    age = page.get_by_role("spinbutton", name="Age in years")
    age.fill("71")
    age.press("Enter")
    settle(page)  # a rerun would close the list of options
    choose(page, "Sex", "female")
    details = {"age": "71", "sex": "female"}
    name = answer_for(files["mel"].read_bytes(), takes=TAKES, details=details)["prediction"]["name"]
    expect(page.get_by_alt_text(f"Heatmap for {name}")).to_be_visible()
    expect(page.locator(".sl-verdict")).to_contain_text(name)
    settle(page)
    open_row(page, 1, "nv.jpg")
    expect(age).to_have_value("")
    open_row(page, 0, "mel.jpg")
    expect(age).to_have_value("71")
    expect(page.locator(".sl-verdict")).to_contain_text(name)
    assert server.details == [{}, {}, {"age": "71"}, details], "the details of one picture were sent for the other"
    choose(page, "Sex", "not given")
    age.fill("")
    age.press("Enter")
    name = answer_for(files["mel"].read_bytes(), takes=TAKES)["prediction"]["name"]
    expect(page.get_by_alt_text(f"Heatmap for {name}")).to_be_visible()
    expect(page.locator(".sl-verdict")).to_contain_text(name)
    assert len(server.details) == 4, "an answer was not remembered"


def test_the_model_server_decides_about_every_file(page, server, files):
    """The page has no list of file types, and its limit for uploads is above the model server's."""
    upload(page, files["notes"])
    expect(page.get_by_role("alert").filter(has_text="This picture was refused")).to_contain_text("not a JPEG or PNG")
    server.mode = "too_large"
    upload(page, files["large"])
    expect(page.get_by_text("The image is larger than the model server accepts.")).to_be_visible()


def test_an_outage_its_end_and_a_removed_picture(page, server, files):
    server.mode = "no_model"
    upload(page, files["mel"])
    expect(page.get_by_role("alert")).to_contain_text("No model is deployed yet")
    server.mode = "garbage"
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The model server sent an unexpected answer")
    server.mode = "ok"
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".sl-verdict")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_test_id("stFileUploader").get_by_role("button", name=re.compile("Remove")).click()
    expect(page.locator(".sl-verdict")).to_have_count(0)
    expect(page.locator(".sl-steps")).to_be_visible()


def test_no_model_server_and_started_from_the_root(window, files):
    """`streamlit run streamlit_app/app.py` in the repository's root."""
    with streamlit(ROOT, "streamlit_app/app.py", NOWHERE) as address:
        assert httpx.get(f"{address}/_stcore/script-health-check", timeout=30).is_success
        window.goto(address)
        upload(window, files["mel"])
        expect(window.get_by_role("alert")).to_contain_text("The model server does not answer")
        expect(window.get_by_text("Does not answer", exact=True)).to_be_attached()
        expect(window.get_by_role("button", name="Try again")).to_be_visible()
        window.goto("about:blank")  # otherwise the page reports the end of its server


@pytest.mark.parametrize(("theme", "windows"), [("light", ["wide", "middle", "narrow"]), ("dark", ["narrow", "wide"])])
def test_the_page_fits_and_has_contrast(window, server, address, files, theme, windows):
    window.emulate_media(color_scheme=theme)
    window.set_viewport_size(WINDOWS[windows[0]])
    window.goto(os.environ.get("SCREENSHOT_PAGE_URL", address))
    expect(window.locator(".sl-steps")).to_be_visible()
    check(window, windows, "empty", theme)
    upload(window, files["mel"])
    expect(window.locator(".sl-provenance")).to_be_visible()
    check(window, windows, "one", theme)
    upload(window, files["nv"], files["bcc"], files["notes"])
    expect(window.locator(".sl-counts")).to_be_visible()
    check(window, windows, "many", theme)
