"""The page's requests to the monitor."""

from typing import TypeVar

import requests
from pydantic import BaseModel, ValidationError

from streamlit_app.monitor_schema import LatestPredictions, RecordedPrediction, Summary, VersionEvent, VersionHistory

TIMEOUTS = (1.0, 10.0)  # seconds to connect and to answer
Body = TypeVar("Body", bound=BaseModel)


class MonitorError(Exception):
    """The monitor has no usable answer; the message is for the reader."""


class MonitorClient:
    """The monitor's figures over HTTP. One client serves all sessions. Every method raises MonitorError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.session = requests.Session()
        self.session.trust_env = False

    def summary(self, hours: float, version: str | None) -> Summary:
        """Return the figures of the last hours, of one version or of all."""
        return self._get("summary", Summary, hours=hours, version=version)

    def events(self) -> list[VersionEvent]:
        """Return what happened to the versions, oldest first."""
        return self._get("versions", VersionHistory).events

    def latest(self, limit: int, version: str | None) -> list[RecordedPrediction]:
        """Return the latest predictions, newest first."""
        return self._get("predictions", LatestPredictions, limit=limit, version=version).predictions

    def _get(self, path: str, schema: type[Body], **parameters: float | str | None) -> Body:
        try:
            response = self.session.get(
                f"{self.url}/{path}", params=parameters, timeout=TIMEOUTS, allow_redirects=False
            )
        except requests.RequestException as error:
            raise MonitorError(f"No monitor answers at {self.url}.") from error
        try:
            body = response.json()
            if not response.ok:
                reason = str(body["error"]["message"])[:300]
                raise MonitorError(f"The monitor has no figures. {reason}")
            return schema.model_validate(body)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise MonitorError(
                f"{self.url} does not answer as a monitor of this version does (status {response.status_code})."
            ) from error
