"""The page's part Review, with a real monitor: a picture is read by keyboard before the model's answer appears."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import streamlit as st
from PIL import Image
from playwright.sync_api import expect
from streamlit.testing.v1 import AppTest

from monitoring.tables import readings
from streamlit_app import connections, review_access
from streamlit_app import review_wording as wording
from streamlit_app.review_client import ReviewClient
from tests.browser_page import check, settle
from tests.fake_torchserve import NOWHERE
from tests.review_world import ReviewedMonitor, names, sha
from tests.test_page_monitoring import blocks, running_monitor
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_page", "tests.fixtures_browser"]
PICTURES = names(4, False)


def jpeg(drawn: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory, drawn_image) -> ReviewedMonitor:
    """Three unread pictures, and a disputed one."""
    world = ReviewedMonitor(tmp_path_factory.mktemp("state"))
    world.answer(PICTURES, code="MEL", flagged=True, jpeg=jpeg(drawn_image("MEL", 1)))
    world.read(PICTURES[3], "ada <b>", "NV")
    world.read(PICTURES[3], "ben", "BCC")
    return world


@pytest.fixture(scope="module")
def address(world) -> Iterator[str]:
    with running_monitor(world.settings) as url:
        eventually(lambda: ReviewClient(url).status("x").waiting)
        yield url


def rows(world) -> list[dict]:
    with world.store.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(readings).order_by(readings.c.id)).mappings()]


def script() -> None:
    from streamlit_app.views.review import review

    review()


@pytest.fixture
def app(monkeypatch):
    """Return a function: the part for the monitor at an address, with a reader's name."""

    def draw(url: str, reader: str = "zoe", torchserve: str = NOWHERE) -> AppTest:
        monkeypatch.setenv("MONITOR_URL", url)
        monkeypatch.setattr(st, "get_option", lambda name: {"server.address": "127.0.0.1"}[name])
        monkeypatch.setenv("TORCHSERVE_URL", torchserve)
        for client in (connections.review_client, connections.prediction_client):
            client.clear()
        app = AppTest.from_function(script, default_timeout=60)
        if reader:
            app.session_state.reader = reader
        app.run()
        assert not app.exception
        return app

    return draw


def test_the_answer_is_hidden_until_the_reader_has_spoken(app, address, server):
    page = app(address, torchserve=server.url)
    assert wording.QUESTION in blocks(page)
    assert not page.get("plotly_chart")
    assert "The model says" not in blocks(page)
    page.button(key="verdict-NV").click().run()
    assert "You said: Melanocytic nevus" in blocks(page)
    assert "The model says: <b>Melanoma</b> (60 %), version 1. It flags the picture" in blocks(page)
    assert len(page.get("plotly_chart")) == 1
    assert page.button(key="agree").label == wording.AGREE.format(name="Melanoma")


def test_without_a_model_server_there_is_no_heatmap_and_the_review_goes_on(app, address):
    page = app(address, reader="dora")
    page.button(key="verdict-MEL").click().run()
    assert wording.NO_HEAT in [caption.value for caption in page.caption]
    assert page.button(key="keep").label == "Keep Melanoma"


def test_a_name_is_asked_for_once(app, address):
    page = app(address, reader="")
    page.text_input[0].input("  Zoë ")
    page.button[0].click().run()
    assert wording.QUESTION in blocks(page)
    assert page.session_state.reader == "Zoë"


def test_a_monitor_that_is_away_keeps_the_reading(app, address, monkeypatch, world):
    page = app(address, reader="eve")
    page.button(key="verdict-BCC").click().run()
    before = len(rows(world))
    request = ReviewClient._request
    monkeypatch.setattr(
        ReviewClient, "_request",
        lambda self, method, *a, **k: request(self, method, *a, **k) if method == "GET" else away(),
    )  # fmt: skip
    page.button(key="keep").click().run()
    assert "Your reading is not recorded yet." in page.error[0].value
    monkeypatch.setattr(ReviewClient, "_request", request)
    page.button(key="keep").click().run()
    assert [(row["reader"], row["verdict"]) for row in rows(world)[before:]] == [("eve", "BCC")]


def away() -> None:
    from streamlit_app.monitor_client import MonitorError

    raise MonitorError("No monitor answers at http://127.0.0.1:9.")


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, wording.EMPTY), ({"keep_images_days": 0}, wording.NOT_KEEPING)],
)
def test_an_empty_and_an_idle_queue_say_what_to_do(app, tmp_path, options, words):
    world = ReviewedMonitor(tmp_path)
    world.settings.keep_images_days = options.get("keep_images_days", 30)
    with running_monitor(world.settings) as url:
        eventually(lambda: ReviewClient(url).status("x"))
        assert words in blocks(app(url))


def test_a_monitor_that_is_away_is_a_sentence(app):
    text = blocks(app(NOWHERE))
    assert wording.AWAY in text
    assert f"No monitor answers at {NOWHERE}." in text


@pytest.mark.parametrize(
    ("address", "host", "local"),
    [
        ("127.0.0.1", "127.0.0.1:8501", True), ("127.0.0.1", None, True), ("localhost", "localhost:8501", True),
        ("::1", "[::1]:8501", True), ("127.0.0.1", "page.clinic.org", False), ("0.0.0.0", "127.0.0.1:8501", False),
        ("", "127.0.0.1", False), ("192.168.0.7", "192.168.0.7", False),
    ],
)  # fmt: skip
def test_without_a_sign_in_only_this_machine_reviews(address, host, local):
    assert review_access.is_local(address, host) is local


@pytest.mark.parametrize(
    ("user", "listed"),
    [
        ({"email": "Ann@Clinic.org"}, True), ({"email": "eve@other.org"}, False), ({"email": "bob@lab.org"}, True),
        ({"email": "ann@clinic.org", "email_verified": False}, False), ({"name": "ann@clinic.org"}, False),
        ({"email": "x@evil.org@clinic.org.evil.org"}, False),
    ],
)  # fmt: skip
def test_reviewers_are_listed_by_address_or_domain(user, listed):
    assert review_access.is_listed(user, ["ann@clinic.org", "@lab.org"]) is listed


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_pictures_are_read_and_a_dispute_is_adjudicated_by_keyboard(window, server, page_address, world):
    window.goto(page_address)
    window.get_by_role("link", name=wording.REVIEW).click()
    window.get_by_label(wording.NAME_LABEL).fill("cleo")
    window.get_by_role("button", name=wording.NAME_BUTTON).click()
    expect(window.get_by_alt_text(wording.PICTURE_ALT)).to_be_visible()
    expect(window.get_by_text("The model says")).to_have_count(0)
    check(window, ["wide", "narrow"], "review-question", "light")
    window.set_viewport_size({"width": 1440, "height": 900})
    before = len(rows(world))
    window.keyboard.press("2")
    expect(window.get_by_text("You said: Melanocytic nevus")).to_be_visible()
    expect(window.get_by_alt_text(wording.HEAT_ALT.format(name="Melanoma"))).to_be_visible()
    for theme in ("light", "dark"):
        window.emulate_media(color_scheme=theme)
        check(window, ["wide", "narrow"], "review-answer", theme)
    window.set_viewport_size({"width": 1440, "height": 900})
    window.keyboard.press("a")
    expect(window.get_by_text(wording.QUESTION)).to_be_visible()
    eventually(lambda: len(rows(world)) == before + 1)
    row = rows(world)[-1]
    assert (row["reader"], row["first_opinion"], row["verdict"], row["version"]) == ("cleo", "NV", "MEL", "1")
    assert server.recorded == [False], "the page's own request is no traffic"

    settle(window)
    window.keyboard.press("b")
    expect(window.get_by_text("You said: Bad picture")).to_be_visible()
    settle(window)
    window.keyboard.press("k")
    eventually(lambda: rows(world)[-1]["verdict"] == "bad_picture")

    window.get_by_text(wording.ADJUDICATE.format(count=1)).click()
    expect(window.get_by_text(wording.DIFFER)).to_be_visible()
    expect(window.get_by_text("ada <b>")).to_be_visible()
    settle(window)
    window.keyboard.press("3")
    expect(window.get_by_text("You said: Basal cell carcinoma")).to_be_visible()
    settle(window)
    window.keyboard.press("k")
    eventually(lambda: rows(world)[-1]["kind"] == "adjudication")
    expect(window.get_by_text(wording.NO_DISPUTES)).to_be_visible()
    assert rows(world)[-1]["image_sha256"] == sha(PICTURES[3])
    if folder := os.environ.get("SCREENSHOT_DIR"):
        window.screenshot(path=Path(folder) / "review-no-disputes.png")
