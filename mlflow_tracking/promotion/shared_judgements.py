"""Judgements that several promoters share through the registry, signed with the key that they have in common.

Everyone who reaches the registry can write a report there, so an unsigned one counts for nothing.
"""

import hashlib
import hmac
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from mlflow_tracking.promotion.gates.judge import Judgement, Question
from mlflow_tracking.promotion.gates.judgement_report import REPORT
from mlflow_tracking.registry import RegisteredVersion, Registry, RegistryError

SIGNATURE = "gates.signature"  # tag of the version


class SharedJudgements:
    """Signs judgements, and finds those of other promoters. Without a key it does neither."""

    def __init__(self, registry: Registry, key: bytes) -> None:
        self._registry = registry
        self._key = key
        self._found: dict[str, Judgement | None] = {}  # by signature

    def tags(self, judgement: Judgement) -> dict[str, str]:
        """Return the tag with the signature of a judgement."""
        return {SIGNATURE: self._signature(judgement)} if self._key else {}

    def find(self, number: str, question: Question) -> Judgement | None:
        """Return another promoter's judgement on a version, if it answers the question. Raises RegistryUnavailable.

        The champion may differ if this replica has none to compare with.
        """
        version = self._registry.version(number) if self._key else None
        judgement = self._signed(version) if version else None
        if judgement is None:
            return None
        other = judgement.question
        is_same = replace(other, champion=None) == replace(question, champion=None)
        return judgement if is_same and question.champion in (other.champion, None) else None

    def _signed(self, version: RegisteredVersion) -> Judgement | None:
        signature = version.tags.get(SIGNATURE)
        if not signature:
            return None
        if signature not in self._found:
            self._found[signature] = self._fetch(version, signature)
        return self._found[signature]

    def _fetch(self, version: RegisteredVersion, signature: str) -> Judgement | None:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                path = self._registry.download_version(version.version, f"{REPORT}/report.json", Path(temporary))
                judgement = Judgement.from_dict(json.loads(path.read_bytes()))
            except (RegistryError, OSError, ValueError):
                return None  # the signature belongs to a report that has been replaced
        return judgement if hmac.compare_digest(self._signature(judgement), signature) else None

    def _signature(self, judgement: Judgement) -> str:
        """Return HMAC-SHA256 of the judgement's JSON form (RFC 2104)."""
        text = json.dumps(judgement.to_dict(), sort_keys=True).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()
