"""Back-off: which releases are not tried now, and when a failed one is tried again.

A failed release is tried again at the next pass, then after 4, 8, 16 … seconds, up to LONGEST_WAIT. A refused release
is tried again only after its alias has moved away and back.
"""

import time
from dataclasses import dataclass

from mlflow_tracking.promotion.plan import Actual, Desired, Release

LONGEST_WAIT = 300.0


@dataclass(frozen=True)
class Setback:
    """Why a release is not tried: for good if `final`, otherwise until `retry_at` (monotonic seconds).

    `approved` says that it had passed its gates before.
    """

    reason: str
    final: bool
    attempts: int
    retry_at: float
    approved: bool


class Backoff:
    """The setbacks of releases."""

    def __init__(self) -> None:
        self.setbacks: dict[Release, Setback] = {}

    def add(self, release: Release, reason: str, *, final: bool, approved: bool) -> bool:
        """Record a refusal or a failure; return whether its reason is new."""
        previous = self.setbacks.get(release)
        attempts = previous.attempts + 1 if previous else 1
        wait = 0.0 if attempts == 1 else min(LONGEST_WAIT, 2.0 ** min(attempts, 16))
        self.setbacks[release] = Setback(reason, final, attempts, time.monotonic() + wait, approved)
        return previous is None or previous.reason != reason

    def refresh(self, desired: Desired, actual: Actual) -> None:
        """Remove setbacks that no longer matter: without an alias, or approved by another promoter since."""
        if desired.registry_up:
            relevant = {*desired.releases, actual.serving, actual.last_good}
            self.setbacks = {release: setback for release, setback in self.setbacks.items() if release in relevant}
        for release, setback in list(self.setbacks.items()):
            if release in actual.approved and not setback.approved:
                del self.setbacks[release]

    def blocked(self) -> frozenset[Release]:
        """Return the releases that are not tried now."""
        now = time.monotonic()
        return frozenset(
            release for release, setback in self.setbacks.items() if setback.final or now < setback.retry_at
        )
