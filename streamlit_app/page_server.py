"""Start the page, with a sign-in of the reviewers where it is set up.

    python -m streamlit_app.page_server

With OIDC_CLIENT_ID, Streamlit's own login (OpenID Connect) gets its settings from a file that this command writes:
OIDC_CLIENT_SECRET, OIDC_METADATA_URL, OIDC_REDIRECT_URI, OIDC_REVIEWERS, PAGE_COOKIE_SECRET (.env.example explains
each). In Docker Compose both secrets are files in the folder PAGE_SECRETS. All settings come from the environment.
"""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class SignInError(Exception):
    """A sign-in that is not completely set up."""


def main() -> int:
    """Become Streamlit. Returns exit code 1, with the reason on stderr, if the sign-in is not completely set up."""
    command = [sys.executable, "-m", "streamlit", "run", str(HERE / "app.py")]
    try:
        text = sign_in_settings(os.environ)
    except SignInError as error:
        print(error, file=sys.stderr)
        return 1
    if text:
        path = _folder(os.environ) / "secrets.toml"
        _write(path, text)
        command += ["--secrets.files", str(path)]
    return os.execv(command[0], command)


def sign_in_settings(env: Mapping[str, str]) -> str:
    """Return Streamlit's secrets as TOML; "" without OIDC_CLIENT_ID. Raises SignInError."""
    client = env.get("OIDC_CLIENT_ID")
    if not client:
        return ""
    metadata = env.get("OIDC_METADATA_URL") or ""
    if not metadata.startswith(("https://", "http://")):
        raise SignInError(
            f"OIDC_METADATA_URL is '{metadata}': it must be the address of the provider's configuration, which ends in "
            "/.well-known/openid-configuration."
        )
    secret = env.get("OIDC_CLIENT_SECRET") or _kept(env, "oidc_client_secret")
    if not secret:
        raise SignInError("OIDC_CLIENT_SECRET is missing: set it in .env, as the provider gave it.")
    port = env.get("STREAMLIT_SERVER_PORT") or "8501"
    auth = {
        "redirect_uri": env.get("OIDC_REDIRECT_URI") or f"http://127.0.0.1:{port}/oauth2callback",
        "cookie_secret": env.get("PAGE_COOKIE_SECRET") or _kept(env, "cookie_secret") or _new_cookie_secret(env),
        "client_id": client,
        "client_secret": secret,
        "server_metadata_url": metadata,
    }
    names = [name.strip() for name in (env.get("OIDC_REVIEWERS") or "").split(",") if name.strip()]
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in auth.items()]
    return "\n".join(["[auth]", *lines, "", "[reviewers]", f"names = {json.dumps(names, ensure_ascii=False)}", ""])


def _folder(env: Mapping[str, str]) -> Path:
    return ROOT / (env.get("STACK_STATE") or ".stack") / "page"


def _kept(env: Mapping[str, str], name: str) -> str:
    """Return a secret that is stored in a file; "" without one."""
    folder = env.get("PAGE_SECRETS")
    path = Path(folder, name) if folder else _folder(env) / name
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _new_cookie_secret(env: Mapping[str, str]) -> str:
    """Return a random secret, which is stored so that a restart signs no reader out."""
    value = secrets.token_hex(20)
    _write(_folder(env) / "cookie_secret", value)
    return value


def _write(path: Path, text: str) -> None:
    """Write a file that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
