"""The page's requests to the monitor."""

from typing import Any, TypeVar

import requests
from pydantic import BaseModel, ValidationError

from streamlit_app.monitor_schema import LatestPredictions, RecordedPrediction, Summary, VersionEvent, VersionHistory

TIMEOUTS = (1.0, 10.0)  # seconds to connect and to answer
Body = TypeVar("Body", bound=BaseModel)


class MonitorError(Exception):
    """The monitor has no usable answer; the message is for the reader. `status` is 0 without a response."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


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
        return self._parse(self._request("GET", path, params=parameters), schema)

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return self.session.request(
                method, f"{self.url}/{path}", timeout=TIMEOUTS, allow_redirects=False, **options
            )
        except requests.RequestException as error:
            raise MonitorError(f"No monitor answers at {self.url}.") from error

    def _parse(self, response: requests.Response, schema: type[Body]) -> Body:
        try:
            body = response.json()
            if not response.ok:
                reason = str(body["error"]["message"])[:300]
                raise MonitorError(f"The monitor has no answer. {reason}", response.status_code)
            return schema.model_validate(body)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise MonitorError(
                f"{self.url} does not answer as a monitor of this version does (status {response.status_code})."
            ) from error
