"""Requests leave no pixels, file names, places, headers or patient's words in any log.

Pictures with GPS and a name in every EXIF field are sent in every way: whole, damaged and mislabelled. Then every file
that TorchServe has written is searched. Only hashes, classes and probabilities may be logged.
"""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from tests.hostile import images, photograph
from tests.hostile.images import SECRET, encode, exif, small
from tests.hostile.requests import OCTETS, as_json, form, part
from tests.serving import PREDICTIONS, Call, Serving
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_serving"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
WINDOW = 24  # bytes of a picture, or letters of its base64, that appear in no text by chance


def calls(data: bytes) -> list[Call]:
    """Every right and wrong way to send the file."""
    encoded = base64.b64encode(data).decode()
    secret = (
        OCTETS,
        ("X-Patient", SECRET),
        ("Cookie", SECRET),
        ("Authorization", f"Bearer {SECRET}"),
        ("Referer", SECRET),
    )
    file = part("data", data, f"{SECRET}.jpg", "image/jpeg")
    kinds = (
        "text/plain",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        SECRET,
    )
    return [
        Call(data, secret), Call(data, secret, "/explanations/skin_vit"),
        Call(data, secret, f"{PREDICTIONS}?patient={SECRET}"), form(file), as_json({"image": encoded}),
        *(Call(data, (("Content-Type", kind),)) for kind in kinds),
        Call(data[: len(data) // 2], secret), Call(b"x" + data, secret), Call(data[::-1], secret),
        form(part("data", data, SECRET, "text/plain")), form(part(SECRET, data, SECRET)),
        form(file, part("target", SECRET.encode())),
        form(file, part(SECRET, b"x")), form(file, part("age", SECRET.encode())), form(file, end=b""),
        form(file.replace(b"Content-Disposition", b"Disposition")), form(part("", data, SECRET)),
        as_json({"image": encoded, SECRET: "x"}), as_json({"image": encoded[:-1], "target": SECRET}), as_json(data),
        as_json(f'{{"image": "{encoded}", {SECRET}'.encode()), as_json({"image": SECRET}), as_json({"image": [SECRET]}),
        Call(data, (("X-Broken " + SECRET, "x"), OCTETS)), Call(data, (OCTETS, ("Content-Length", SECRET))),
        Call(data, (("Content-Type", "application/x-www-form-urlencoded"),), f"{PREDICTIONS}?x=%zz"),
    ]  # fmt: skip


def written(folder: Path) -> dict[Path, bytes]:
    """All files that TorchServe has written, except the unpacked archives, which hold the golden pictures."""
    files = [path for path in folder.rglob("*") if path.is_file() and "models" not in path.relative_to(folder).parts]
    return {path: path.read_bytes() for path in files if path.suffix != ".mar"}


def traces(text: bytes, data: bytes) -> list[str]:
    """What of a file and its sender stands in a log."""
    found = [word for word in (SECRET, "Mustermann", "GPS", "JFIF", "Exif") if word.encode() in text]
    # A log shows bytes as Latin-1, as UTF-8, as escapes, or with what cannot be shown replaced.
    forms = {"pixels": data, "base64": base64.b64encode(data), "UTF-8": data.decode("latin-1").encode()}
    forms |= {"escapes": repr(data)[2:-1].encode(), "hex": data.hex().encode()}
    for name, body in forms.items():
        pieces = (body[at : at + WINDOW] for at in range(0, len(body) - WINDOW, WINDOW))
        found += [name] if any(piece in text for piece in pieces if len(set(piece)) > 4) else []
    return found + (["bytes that are no text"] if re.search(rb"(\xef\xbf\xbd){4}", text) else [])


def test_the_search_finds_traces():
    data = photograph(0)
    for text in (data, base64.b64encode(data), data.decode("latin-1").encode(), repr(data).encode(), SECRET.encode()):
        assert traces(b"... " + text[3000:9000] if len(text) > 9000 else text, data)
    assert traces(data.decode("utf-8", errors="replace").encode(), data)
    assert not traces(b'INFO ACCESS_LOG - /127.0.0.1:1234 "POST /predictions/skin_vit HTTP/1.1" 200 12', data)


def test_logs_hold_no_pixels_names_places_or_headers(serving: Serving, sample_images):
    image = small(sample_images[0])
    files = [
        encode(image, "JPEG", exif=exif(6), comment=SECRET.encode()), encode(image, "TIFF", exif=exif(1)),
        encode(image, "PNG", exif=exif(3)),
    ]  # fmt: skip
    answers = [serving.ask(call) for data in files for call in calls(data)]
    assert {200, 400, 415} <= {answer.status for answer in answers}
    logs = written(serving.server.log.parent)
    text = b"".join(logs.values())
    assert serving.server.log in logs and text.count(b"ACCESS_LOG") >= len(answers) // 2, "there is something to search"
    for path, content in logs.items():
        for data in files:
            assert not traces(content, data), path


def test_answers_hold_only_the_pictures_hash_and_size(serving: Serving):
    data = encode(small(photograph(0)), "JPEG", exif=exif(1), comment=SECRET.encode())
    answer = serving.ask(Call(data, (OCTETS, ("X-Patient", SECRET))))
    assert answer.json["image"].keys() == {"width", "height", "sha256", "converted"}
    assert not traces(answer.body, data)
    explained = serving.ask(Call(data, path="/explanations/skin_vit"))
    overlay = images.Image.open(images.io.BytesIO(base64.b64decode(explained.json["gradcam"]["overlay_png"])))
    assert not overlay.getexif() and not overlay.info, "EXIF does not travel into the overlay"


def test_a_request_that_asks_for_it_is_not_recorded(serving: Serving):
    log = serving.server.log.parent / "logs" / "predictions.jsonl"
    silent, recorded = (encode(small(photograph(seed)), "JPEG") for seed in (41, 42))
    for call in (Call(silent, (OCTETS, ("X-Record", "no"))), Call(recorded)):
        assert serving.ask(call).status == 200
    eventually(lambda: hashlib.sha256(recorded).hexdigest() in log.read_text())
    assert hashlib.sha256(silent).hexdigest() not in log.read_text()
