"""Roll back: choose the version to return to, and record the roll-back in ledger and audit log."""

from dataclasses import dataclass
from pathlib import Path

from handlers.errors import UserError
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.promotion.ledger import Ledger
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.registry import Registry


class RollbackError(UserError):
    """There is no version to return to."""


@dataclass(frozen=True)
class Rollback:
    """A return to `target`. `left` is the release that served when this was planned; None if that is `target`."""

    target: Release
    left: Release | None


def plan_rollback(registry: Registry, ledger: Ledger) -> Rollback:
    """Choose the last good version, or the serving one while the alias asks for a version that never served.

    Raises:
        RollbackError: there is no such version, or the registry holds another bundle under its number.
        RegistryUnavailable
    """
    serving, last_good = ledger.release(ledger.default), ledger.release(ledger.last_good)
    champion = registry.resolve("champion")
    # An interrupted roll-back has already moved the alias to the last good version.
    proven_digests = [release.digest for release in (serving, last_good) if release]
    pending = champion is not None and serving is not None and champion.digest not in proven_digests
    target, left = (serving, None) if pending else (last_good, serving)
    if target is None:
        raise RollbackError(
            "The model store holds no earlier good version. List the versions with `promote.py status` and deploy one "
            "with `promote.py to VERSION`."
        )
    registered = registry.version(target.version)
    if registered is None or registered.digest != target.digest:
        raise RollbackError(
            f"Version {target.version} in {registry.uri} is not the version that served. Deploy another one with "
            "`promote.py to VERSION`."
        )
    return Rollback(target, left)


def record_rollback(rollback: Rollback, store: Path, audit: AuditLog, by: str, reason: str) -> None:
    """Withdraw the release that was left, and write who rolled back and why. The caller holds the store's lock."""
    ledger = ledgers.read(store)
    serving = ledger.release(ledger.default)  # a running promoter may have deployed another version since the plan
    left = {release for release in (rollback.left, serving) if release and release != rollback.target}
    for release in left:
        ledger = ledger.rolled_back(release.archive)
    ledgers.write(store, ledger)
    previous = serving if serving in left else rollback.left
    names = {"previous": previous.version, "previous_digest": previous.digest} if previous else {}
    audit.append("rollback", by, **vars(rollback.target), **names, reason=reason or None)
