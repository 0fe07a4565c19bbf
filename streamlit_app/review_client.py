"""The page's requests to the monitor about reviews."""

from streamlit_app.monitor_client import MonitorClient, MonitorError
from streamlit_app.review_schema import Kind, NextPicture, RecordedReading, ReviewPicture, ReviewStatus


class ReviewClient(MonitorClient):
    """The review queue over HTTP. Every method raises MonitorError; its status is 409 if a reading comes too late."""

    def status(self, reader: str) -> ReviewStatus:
        """Return the progress of the review."""
        return self._get("reviews/status", ReviewStatus, reader=reader)

    def next_picture(self, reader: str, kind: Kind) -> ReviewPicture | None:
        """Return the next picture of a reader; None if none is left."""
        return self._get("reviews/next", NextPicture, reader=reader, kind=kind).picture

    def jpeg(self, sha256: str) -> bytes:
        """Return the kept copy of a picture."""
        response = self._request("GET", f"reviews/{sha256}/picture")
        if not response.ok or not response.content.startswith(b"\xff\xd8"):
            raise MonitorError("The picture is not kept any more.", response.status_code)
        return response.content

    def record(self, reader: str, picture: ReviewPicture, submission: str, first_opinion: str, verdict: str) -> bool:
        """Record a reading, twice if the answer is lost; return False if it was recorded before."""
        body = {
            "submission": submission,
            "kind": picture.kind,
            "reader": reader,
            "image_sha256": picture.image_sha256,
            "request_id": picture.request_id,
            "first_opinion": first_opinion,
            "verdict": verdict,
        }
        try:
            response = self._request("POST", "reviews", json=body)
        except MonitorError:
            response = self._request("POST", "reviews", json=body)  # the same submission counts once
        return self._parse(response, RecordedReading).new
