"""Who may review: the one user of a page on this machine, or whoever is signed in by OpenID Connect."""

import ipaddress
from dataclasses import dataclass
from typing import Any, Literal

import streamlit as st
from streamlit.errors import StreamlitSecretNotFoundError

Reason = Literal["", "sign in", "not listed", "off", "name"]
LONGEST_NAME = 100


@dataclass(frozen=True)
class Access:
    """The reader's name, if `reason` is empty, or why this person may not review. `signed_in` offers a sign-out."""

    reader: str
    reason: Reason
    signed_in: bool = False


def access() -> Access:
    """Return who may review in this session."""
    if _section("auth"):
        user = dict(st.user)
        if not user.get("is_logged_in"):
            return Access("", "sign in")
        reader = reader_of(user)
        listed = list(_section("reviewers").get("names", []))
        if not reader or (listed and not is_listed(user, listed)):
            return Access(reader, "not listed", signed_in=True)
        return Access(reader, "", signed_in=True)
    if not is_local(str(st.get_option("server.address") or ""), st.context.headers.get("Host")):
        return Access("", "off")
    reader = str(st.session_state.get("reader") or st.query_params.get("reader") or "")
    reader = "".join(letter for letter in reader if letter.isprintable()).strip()[:LONGEST_NAME]
    return Access(reader, "" if reader else "name")


def reader_of(user: dict[str, Any]) -> str:
    """Return the name under which a signed-in person's readings are stored: e-mail address, else name, else subject."""
    values = (user.get(name) for name in ("email", "name", "sub"))
    text = next((str(value) for value in values if value), "")
    return "".join(letter for letter in text if letter.isprintable()).strip()[:LONGEST_NAME]


def is_listed(user: dict[str, Any], listed: list[str]) -> bool:
    """Return whether a person's e-mail address, or its domain written as @clinic.org, is listed.

    An address that the provider calls unverified is not listed.
    """
    email = str(user.get("email") or "").lower()
    if not email or user.get("email_verified") is False:
        return False
    names = {name.lower() for name in listed}
    return email in names or f"@{email.rpartition('@')[2]}" in names


def is_local(address: str, host: str | None) -> bool:
    """Return whether the page listens on this machine alone, and was opened by a name of this machine."""
    name = (host or address).strip()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    return _is_loopback(address) and _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _section(name: str) -> dict[str, Any]:
    """Return a section of Streamlit's secrets; empty without one."""
    try:
        return dict(st.secrets[name])
    except (StreamlitSecretNotFoundError, KeyError):
        return {}
