"""The page's part Monitoring, with a real monitor: figures, versions, predictions, and what it says without them."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from streamlit.testing.v1 import AppTest

from handlers.reference import DRIFT_STATISTICS
from mlflow_tracking.promotion.audit import AuditLog
from monitoring.outcomes import PictureOutcome, record
from monitoring.prediction_store import PredictionStore
from streamlit_app import connections, monitor_report
from streamlit_app import monitor_wording as wording
from streamlit_app.monitor_client import MonitorClient, MonitorError
from tests.browser_page import check
from tests.fake_torchserve import NOWHERE
from tests.monitored_log import (
    NOW,
    RotatedLog,
    archive_with,
    many,
    measured,
    normal_reference,
    normal_values,
    refusal,
    running_monitor,
    settings_of,
)
from tests.test_page_report import Outline
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_page", "tests.fixtures_browser"]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A monitor with two versions, a refused third one, 200 predictions, drift in the second, and some outcomes."""
    state = tmp_path_factory.mktemp("state")
    digest = archive_with(normal_reference(), state / "store", version="2")
    blurred = normal_values(80, np.random.default_rng(0))
    blurred[:, DRIFT_STATISTICS.index("sharpness")] -= 3
    second = measured(blurred, digest, version="2", metadata_sent={"sex": "<i>", "age": 44})
    RotatedLog(state).write(many(120, NOW - 900) + second + refusal("a", code="<b>invalid</b>"))
    audit = AuditLog(state / "store")
    for event, version in (("store", "1"), ("serve", "1"), ("check refused", "3"), ("serve", "2")):
        audit.append(event, "promoter", version=version, digest=f"sha256:{version}", remark="because")
    audit.append("alias seen", "promoter", alias="champion", version="2", digest="sha256:2")
    with running_monitor(settings_of(state)) as url:
        eventually(lambda: MonitorClient(url).summary(1, None).total.predictions == 200)
        outcomes = [PictureOutcome(f"p{number}", "NV", {"sex": "female"} if number < 9 else {}) for number in range(60)]
        record(PredictionStore(settings_of(state).monitor_database_url), outcomes, "lab")
        yield url


def script() -> None:
    from streamlit_app.views.monitoring import monitoring

    monitoring()


@pytest.fixture
def shown(monkeypatch):
    """Return a function: the drawn part, for the monitor at an address."""

    def draw(url: str) -> AppTest:
        monkeypatch.setenv("MONITOR_URL", url)
        connections.monitor_client.clear()
        app = AppTest.from_function(script, default_timeout=60).run()
        assert not app.exception
        return app

    return draw


def blocks(app: AppTest) -> str:
    return "".join(element.proto.body for element in app.get("html"))


def test_it_shows_what_serves_the_figures_and_the_charts(shown, address):
    app = shown(address)
    text = blocks(app)
    for expected in ("version 2", "<dd>200</dd>", "1 refused, 0 errors", wording.TRAFFIC, wording.CLASS_MIX):
        assert expected in text
    assert "&lt;b&gt;invalid&lt;/b&gt;" in text
    assert "<b>invalid" not in text
    assert len(app.get("plotly_chart")) == 5
    events, latest = (table.value for table in app.dataframe)
    assert list(events["Event"]) == ["alias champion seen here", "serves", "refused by the gates", "serves"]
    assert list(latest["Request"])[:2] == ["p79", "p78"]


def test_a_version_is_chosen_and_all_stay_on_offer(shown, address):
    app = shown(address)
    assert app.selectbox(key="version").options == [wording.ALL_VERSIONS, "1", "2"]
    app.selectbox(key="version").select("1").run()
    assert "<dd>120</dd>" in blocks(app)
    assert set(app.dataframe[1].value["Version"]) == {"1"}
    assert app.selectbox(key="version").options == [wording.ALL_VERSIONS, "1", "2"]


def test_a_drift_alarm_is_said_with_what_changed_and_doubts_the_estimate(shown, address):
    text = blocks(shown(address))
    assert f"<dd>{wording.DRIFT_ALARM}</dd>" in text
    assert f"mostly in {wording.STATISTICS['sharpness']}" in text
    assert wording.ESTIMATED_DOUBTFUL in text
    assert wording.EXPECTED.format(value="30.0 %") in text


def test_realised_performance_is_shown_by_patient_group_with_counts_and_bounds(shown, address):
    text = blocks(shown(address))
    assert f"<dd>100.0 %</dd><p>{wording.RANDOM_NOTHING}" not in text
    assert wording.RANDOM_NOTHING in text
    assert '<th scope="row">30–49</th><td>60</td><td>100.0 % <small>94.0 % to 100.0 %</small></td><td>–</td>' in text
    assert f'<th scope="row">female</th><td>9</td><td>{wording.SLICE_FEW}</td>' in text
    assert '<th scope="row">&lt;i&gt;</th><td>51</td>' in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, (wording.EMPTY, wording.SERVING_NOTHING)),
        ({"prediction_log": "off"}, ("Set PREDICTION_LOG to a file to record predictions.",)),
        ({"monitor_database": "sqlite:////absent/monitor.db"}, ("The monitor&#x27;s database does not answer",)),
    ],
    ids=["empty", "log off", "database away"],
)
def test_without_figures_it_says_what_to_do(shown, tmp_path, options, words):
    with running_monitor(settings_of(tmp_path, **options)) as url:
        text = blocks(shown(url))
    assert all(word in text for word in words)


def test_a_monitor_that_is_away_is_a_sentence(shown):
    text = blocks(shown(NOWHERE))
    assert wording.AWAY in text
    assert f"No monitor answers at {NOWHERE}." in text


def test_another_server_is_no_monitor(fake_server):
    with pytest.raises(MonitorError, match="does not answer as a monitor of this version does"):
        MonitorClient(fake_server.url).events()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "less than a minute ago"), (60, "1 minute ago"), (7200, "2 hours ago"), (200_000, "2 days ago")],
)
def test_ages_are_words(seconds, words):
    now = datetime.now(UTC)
    assert wording.since(now - timedelta(seconds=seconds), now) == words


def test_the_report_has_the_figures_and_nothing_that_runs(address):
    summary = MonitorClient(address).summary(1, None)
    text = monitor_report.render(summary, datetime(2026, 3, 1, tzinfo=UTC))
    tags = Outline(text).tags
    assert {tag[0] for tag in tags} >= {"svg", "circle", "rect", "table"}
    assert not {"script", "img", "link"} & {tag[0] for tag in tags}
    for expected in (
        "<dd>200</dd>", f"<dd>{wording.DRIFT_ALARM}</dd>", wording.REPORT_LINE.format(value="4"), "<td>sharpness ",
        "<td>120</td><td>1</td>", "<td>80</td><td>0</td>", "fewer than 10 outcomes", "2026-03-01 00:00:00 UTC",
        wording.ALL_VERSIONS, '<line x1="0" x2="720"',
    ):  # fmt: skip
        assert expected in text
    assert "&lt;b&gt;invalid" in text
    assert "<b>invalid" not in text
    empty = monitor_report.render(MonitorClient(address).summary(1, "99"), datetime.now(UTC))
    assert wording.DRIFT_NOTHING in empty


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_every_window_and_has_contrast(window, page_address, theme):
    window.emulate_media(color_scheme=theme)
    window.goto(page_address)
    window.get_by_role("link", name=wording.MONITORING).click()
    expect(window.locator(".sl-cards")).to_be_visible()
    expect(window.locator(".js-plotly-plot")).to_have_count(5)
    check(window, ["wide", "narrow"], "monitoring", theme)
    with window.expect_download() as download:
        window.get_by_role("button", name=wording.REPORT).click()
    assert wording.REPORT_TITLE in Path(download.value.path()).read_text()
    window.get_by_text("1 hour", exact=True).click()
    expect(window.locator(".sl-cards")).to_contain_text("200")
    window.get_by_role("link", name="Read pictures").click()
    expect(window.locator(".sl-steps")).to_be_visible()
