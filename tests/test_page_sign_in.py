"""The sign-in of reviewers: its settings, and a real login at an OpenID Connect provider in Chromium."""

import os
import stat
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from scripts import child_processes
from streamlit_app import page_server
from streamlit_app import review_wording as wording
from streamlit_app.page_server import SignInError, sign_in_settings
from streamlit_app.review_client import ReviewClient
from tests.browser_page import ROOT, check
from tests.fake_torchserve import NOWHERE
from tests.identity_provider import CLIENT, SECRET, identity_provider
from tests.review_world import ReviewedMonitor, names
from tests.test_page_monitoring import running_monitor
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_page", "tests.fixtures_browser"]
METADATA = "https://id.example.org/.well-known/openid-configuration"


def environment(folder: Path, **values: str) -> dict[str, str]:
    return {
        "STACK_STATE": str(folder), "OIDC_CLIENT_ID": CLIENT, "OIDC_CLIENT_SECRET": SECRET,
        "OIDC_METADATA_URL": METADATA,
    } | values  # fmt: skip


def test_the_settings_become_streamlits_secrets(tmp_path):
    env = environment(tmp_path, OIDC_REVIEWERS="ann@clinic.org, @lab.org,")
    values = tomllib.loads(sign_in_settings(env))
    cookie = values["auth"].pop("cookie_secret")
    assert values == {
        "auth": {
            "redirect_uri": "http://127.0.0.1:8501/oauth2callback", "client_id": CLIENT, "client_secret": SECRET,
            "server_metadata_url": METADATA,
        },
        "reviewers": {"names": ["ann@clinic.org", "@lab.org"]},
    }  # fmt: skip
    assert len(cookie) == 40
    assert tomllib.loads(sign_in_settings(env))["auth"]["cookie_secret"] == cookie, "a restart signs no reader out"
    assert stat.S_IMODE((tmp_path / "page" / "cookie_secret").stat().st_mode) == 0o600


def test_on_kubernetes_the_secrets_are_variables(tmp_path):
    env = environment(tmp_path, PAGE_COOKIE_SECRET="c" * 40)
    auth = tomllib.loads(sign_in_settings(env))["auth"]
    assert (auth["client_secret"], auth["cookie_secret"]) == (SECRET, "c" * 40)


def test_in_docker_compose_the_secrets_are_files(tmp_path):
    (tmp_path / "oidc_client_secret").write_text("issued\n")
    (tmp_path / "cookie_secret").write_text("c" * 40)
    env = environment(tmp_path, OIDC_CLIENT_SECRET="", PAGE_SECRETS=str(tmp_path))
    auth = tomllib.loads(sign_in_settings(env))["auth"]
    assert (auth["client_secret"], auth["cookie_secret"]) == ("issued", "c" * 40)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"OIDC_CLIENT_SECRET": ""}, "OIDC_CLIENT_SECRET is missing"),
        ({"OIDC_METADATA_URL": "x"}, "OIDC_METADATA_URL is 'x'"),
    ],
)  # fmt: skip
def test_an_incomplete_sign_in_starts_no_page(tmp_path, monkeypatch, capsys, values, words):
    with pytest.raises(SignInError, match=words):
        sign_in_settings(environment(tmp_path, **values))
    for name, value in environment(tmp_path, **values).items():
        monkeypatch.setenv(name, value)
    assert page_server.main() == 1
    assert words in capsys.readouterr().err


def test_without_a_client_there_is_no_sign_in(tmp_path):
    assert sign_in_settings({"STACK_STATE": str(tmp_path), "OIDC_METADATA_URL": METADATA}) == ""


@contextmanager
def page_server_process(env: dict[str, str]) -> Iterator[None]:
    """The page as `make up` starts it."""
    process = child_processes.start(
        [sys.executable, "-m", "streamlit_app.page_server"], os.environ | env, Path(os.devnull), ROOT
    )
    address = f"http://127.0.0.1:{env['STREAMLIT_SERVER_PORT']}"
    try:
        eventually(lambda: httpx.get(f"{address}/_stcore/health").is_success, state=process.poll)
        yield
    finally:
        child_processes.end(process)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ReviewedMonitor:
    world = ReviewedMonitor(tmp_path_factory.mktemp("state"))
    world.answer(names(2, False))
    return world


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_reviewer_signs_in_and_a_stranger_may_not_review(window, world, tmp_path):
    person: dict[str, Any] = {"email": "eve@other.org", "email_verified": True}
    [port] = child_processes.free_ports(1)
    with identity_provider(person) as issuer, running_monitor(world.settings) as monitor:
        env = environment(
            tmp_path, OIDC_METADATA_URL=f"{issuer}/.well-known/openid-configuration", OIDC_REVIEWERS="@clinic.org",
            MONITOR_URL=monitor, TORCHSERVE_URL=NOWHERE, PROMOTER_URL=NOWHERE, STREAMLIT_SERVER_PORT=str(port),
        )  # fmt: skip
        eventually(lambda: ReviewClient(monitor).status("x").waiting)
        with page_server_process(env):
            window.goto(f"http://127.0.0.1:{port}")
            window.get_by_role("link", name=wording.REVIEW).click()
            expect(window.get_by_text(wording.SIGN_IN_HEADING)).to_be_visible()
            expect(window.get_by_text(wording.QUESTION)).to_have_count(0)
            check(window, ["wide", "narrow"], "review-sign-in", "light")
            window.get_by_role("button", name=wording.SIGN_IN, exact=True).click()
            window.wait_for_url(f"http://127.0.0.1:{port}/")
            window.get_by_role("link", name=wording.REVIEW).click()
            expect(window.get_by_text(wording.NOT_LISTED)).to_be_visible()
            expect(window.get_by_text(wording.QUESTION)).to_have_count(0)

            with window.expect_navigation(url=f"http://127.0.0.1:{port}/"):
                window.get_by_role("button", name=wording.SIGN_OUT).click()
            person["email"] = "ann@clinic.org"
            window.get_by_role("link", name=wording.REVIEW).click()
            window.get_by_role("button", name=wording.SIGN_IN, exact=True).click()
            window.wait_for_url(f"http://127.0.0.1:{port}/")
            window.get_by_role("link", name=wording.REVIEW).click()
            expect(window.get_by_text(wording.QUESTION)).to_be_visible()
            expect(window.get_by_text("ann@clinic.org")).to_be_visible()
            window.goto("about:blank")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_page_for_other_machines_without_a_sign_in_reviews_nothing(window, world, tmp_path):
    """As in containers."""
    [port] = child_processes.free_ports(1)
    env = {"STREAMLIT_SERVER_PORT": str(port), "STREAMLIT_SERVER_ADDRESS": "0.0.0.0", "MONITOR_URL": NOWHERE}
    env |= {"TORCHSERVE_URL": NOWHERE, "PROMOTER_URL": NOWHERE, "STACK_STATE": str(tmp_path)}
    env |= {"STREAMLIT_BROWSER_SERVER_ADDRESS": "localhost"}
    with page_server_process(env):
        window.goto(f"http://127.0.0.1:{port}")
        window.get_by_role("link", name=wording.REVIEW).click()
        expect(window.get_by_text(wording.OFF, exact=True)).to_be_visible()
        window.goto("about:blank")
