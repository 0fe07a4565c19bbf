"""The settings of the reviewers' sign-in: complete, private, and the same after a restart."""

import stat
import tomllib
from pathlib import Path

import pytest

from streamlit_app import page_server
from streamlit_app.page_server import SignInError, sign_in_settings

CLIENT, SECRET = "skin-page", 'se"cret\\'
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


def test_in_containers_the_secrets_are_files(tmp_path):
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
