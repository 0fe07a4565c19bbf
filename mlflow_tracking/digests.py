"""Digests of bundles and evaluation sets, as tags, ledger and audit log write them: `sha256:` and 64 hex digits."""

import re

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def short(digest: str) -> str:
    """The first twelve digits of a digest: enough for a file's name, and to be told apart by people."""
    return digest.removeprefix("sha256:")[:12]
