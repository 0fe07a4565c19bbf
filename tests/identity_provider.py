"""An OpenID Connect provider that signs everybody in as one person, for tests of the page's sign-in."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import uvicorn
from fastapi import FastAPI, Form
from fastapi.responses import RedirectResponse
from joserfc import jwt
from joserfc.jwk import RSAKey

from scripts.child_processes import free_ports
from tests.waiting import eventually

CLIENT, SECRET = "skin-page", 'se"cret\\'


@contextmanager
def identity_provider(claims: dict[str, Any]) -> Iterator[str]:
    """The address of the provider; `claims` of the person may change while it runs."""
    [port] = free_ports(1)
    issuer, key, codes = f"http://127.0.0.1:{port}", RSAKey.generate_key(2048, {"kid": "1"}), dict[str, str]()
    app = FastAPI()

    @app.get("/.well-known/openid-configuration")
    def configuration() -> dict[str, Any]:
        return {
            "issuer": issuer, "authorization_endpoint": f"{issuer}/authorize", "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/keys", "id_token_signing_alg_values_supported": ["RS256"],
        }  # fmt: skip

    @app.get("/authorize")
    def authorize(client_id: str, redirect_uri: str, state: str, nonce: str = "") -> RedirectResponse:
        assert client_id == CLIENT
        code = secrets.token_hex(8)
        codes[code] = nonce
        return RedirectResponse(f"{redirect_uri}?{urlencode({'code': code, 'state': state})}")

    @app.post("/token")
    def token(code: str = Form()) -> dict[str, Any]:
        now = int(time.time())
        body = {"iss": issuer, "aud": CLIENT, "sub": "1", "iat": now, "exp": now + 600, "nonce": codes.pop(code)}
        return {
            "access_token": "x", "token_type": "Bearer", "expires_in": 600,
            "id_token": jwt.encode({"alg": "RS256", "kid": "1"}, body | claims, key),
        }  # fmt: skip

    @app.get("/keys")
    def keys() -> dict[str, Any]:
        return {"keys": [key.as_dict(private=False)]}

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield issuer
    finally:
        server.should_exit = True
        thread.join()
