"""The review's HTTP service below /reviews: the next picture, its pixels, a reading, the progress. See docs/api.md."""

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.datastructures import Headers

from handlers.kept_images import kept_path
from handlers.taxonomy import TAXONOMY
from monitoring.monitor import Monitor
from monitoring.review_queue import ReviewQueue
from monitoring.reviews import VERDICTS, NewReading, ReviewRefused, record_reading

LARGEST_BODY = 16_384  # bytes
SHA256 = r"^[0-9a-f]{64}$"
# Postgres refuses NUL, and a name needs no other control character.
ReaderName = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f\x7f]{1,100}$")]
Kind = Literal["reading", "adjudication"]
Scope = MutableMapping[str, Any]


class Submission(BaseModel):
    """The body of POST /reviews."""

    model_config = ConfigDict(extra="forbid")

    submission: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{16,64}$")]
    kind: Kind = "reading"
    reader: ReaderName
    image_sha256: Annotated[str, StringConstraints(pattern=SHA256)]
    request_id: Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,200}$")]
    first_opinion: Literal[VERDICTS]  # type: ignore[valid-type]
    verdict: Literal[VERDICTS]  # type: ignore[valid-type]


def review_routes(monitor: Monitor) -> APIRouter:
    """Return the routes. They raise StoreUnavailable."""
    settings, router = monitor.settings, APIRouter(prefix="/reviews")
    folder = settings.kept_images_folder
    queue = ReviewQueue(monitor.store, folder, settings.review_random_share)

    @router.get("/next")
    def next_picture(reader: Annotated[ReaderName, Query()], kind: Kind = "reading") -> dict[str, Any]:
        return {"picture": queue.next_picture(reader, kind)}

    classes = {
        lesion.code: {"name": lesion.name, "malignant": lesion.malignant, "description": lesion.description}
        for lesion in TAXONOMY
    }

    @router.get("/status")
    def status(reader: Annotated[ReaderName, Query()]) -> dict[str, Any]:
        state = {"keep_days": settings.keep_images_days, "random_share": settings.review_random_share}
        return state | queue.status(reader) | {"classes": classes}

    @router.get("/{sha256}/picture")
    def picture(sha256: Annotated[str, Path(pattern=SHA256)]) -> Response:
        try:
            data = kept_path(folder, sha256).read_bytes()
        except FileNotFoundError:
            return _error(404, "not_kept", "This picture is not kept any more.")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @router.post("")
    def record(reading: Submission) -> Response:
        try:
            number, is_new = record_reading(
                monitor.store, NewReading(**reading.model_dump()), queue.reason(reading.image_sha256)
            )
        except ReviewRefused as error:
            return _error(409, "not_recorded", str(error))
        return JSONResponse({"id": number, "new": is_new})

    return router


class ReviewGuard:
    """ASGI middleware that lets only short requests of neighbours reach /reviews, which hands out pictures.

    A web page elsewhere can make a browser resolve the page's own name to this machine (DNS rebinding). Neighbours use
    an IP address or a name without a dot, such as `monitor`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer, or pass the request on."""
        refusal = None
        if scope["type"] == "http" and scope["path"].startswith("/reviews"):
            headers = Headers(scope=scope)
            if not _is_neighbour(headers.get("host", "")) or "origin" in headers:
                refusal = _error(403, "not_allowed", "Reviews are for the page only, by an address without a dot.")
            elif scope["method"] == "POST" and not _is_short(headers.get("content-length", "")):
                refusal = _error(413, "too_large", f"A reading has at most {LARGEST_BODY} bytes and states its length.")
        await (refusal or self.app)(scope, receive, send)


def _is_neighbour(host: str) -> bool:
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and "." not in name
    return True


def _is_short(length: str) -> bool:
    return length.isdecimal() and len(length) < 10 and int(length) <= LARGEST_BODY


def _error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status)
