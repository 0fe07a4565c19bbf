"""Digests of bundles and evaluation sets in tags, ledger and audit log: `sha256:` and 64 hex digits."""

import re

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def short(digest: str) -> str:
    """Return the first twelve hex digits, which suffice for file names and tables."""
    return digest.removeprefix("sha256:")[:12]
