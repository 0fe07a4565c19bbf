"""The references of served versions, read from the archives in the model store."""

import hashlib
import json
import zipfile
from pathlib import Path

from handlers.reference import REFERENCE, Reference

BUNDLE = "bundle"  # folder in an archive, mlflow_tracking/promotion/model_archive.py


class References:
    """The references of the bundles in a model store, each read once."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._by_digest: dict[str, Reference | None] = {}

    def of(self, digest: str) -> Reference | None:
        """Return the reference of a bundle; None if it has none, or if its archive is not in the store (any more)."""
        if digest not in self._by_digest:
            for path in self.store.glob("*.mar"):
                try:
                    with zipfile.ZipFile(path) as archive:
                        config = archive.read(f"{BUNDLE}/bundle.json")
                        name = f"sha256:{hashlib.sha256(config).hexdigest()}"
                        self._by_digest.setdefault(name, _read(archive))
                except (OSError, KeyError, zipfile.BadZipFile):
                    continue  # an archive that is being written, or that is not ours
        return self._by_digest.get(digest)


def _read(archive: zipfile.ZipFile) -> Reference | None:
    """Return the reference in an archive; None if there is none that this version reads."""
    try:
        return Reference.from_dict(json.loads(archive.read(f"{BUNDLE}/{REFERENCE}")))
    except (KeyError, TypeError, ValueError):
        return None
