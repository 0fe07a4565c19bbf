"""bench_page.py times uploads in Chromium, the requests alone, and the opening of Monitoring."""

import pytest

from scripts.studies import bench_page
from tests.browser_page import ROOT, streamlit
from tests.commands import invoke
from tests.fake_torchserve import NOWHERE
from tests.monitored_log import RotatedLog, many, running_monitor, settings_of

pytest_plugins = ["tests.fixtures_page"]


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_page_is_compared_with_its_requests(server, tmp_path):
    RotatedLog(tmp_path).write(many(20))
    with (
        running_monitor(settings_of(tmp_path)) as monitor,
        streamlit(ROOT / "streamlit_app", "app.py", server.url, monitor) as page,
    ):
        code, output = invoke(bench_page.main, "--page", page, "--torchserve", server.url, "--count", 2, "--busy")
    assert code == 0, output
    words = output.split()
    for name in ("ms", "s"):
        alone, uploaded, ratio = (float(word) for word in words[words.index(name) + 1 :][:3])
        assert 0 < alone < uploaded and ratio > 1
    openings = [float(words[place + 2]) for place, word in enumerate(words) if word == "charts,"]
    assert len(openings) == 2 and min(openings) > 0


def test_without_torchserve_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(bench_page, "in_the_page", lambda *_: 1.0)
    code, output = invoke(bench_page.main, "--torchserve", NOWHERE, "--busy")
    assert code == 1 and "Run `make up` first." in output
