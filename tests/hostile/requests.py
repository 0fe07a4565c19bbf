"""Hostile requests around one good picture: odd, wrong and malformed ones, each with the statuses that may answer it.

TorchServe's frontend answers wrong methods, paths and malformed forms in its own format, the handler the rest in ours.
"""

import base64
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from tests.hostile.images import BROKEN, FOREIGN, LARGE, OK, PERHAPS, SECRET, Case
from tests.serving import PREDICTIONS, Call

BOUNDARY = "----hostile"
OCTETS, JSON = ("Content-Type", "application/octet-stream"), ("Content-Type", "application/json")
# From TorchServe's frontend: not found, wrong method, and 403 for a malformed address.
LOST = frozenset({403, 404, 405})
# A malformed form: TorchServe's frontend answers some with 500 before any worker sees them. No setting changes that;
# docs/reliability.md names it as the one exception.
UNREADABLE = BROKEN | FOREIGN | {500}
# The standard has 431 and 414 for headers and addresses that are too long.
OVERLONG = frozenset({400, 413, 414, 431})


@dataclass(frozen=True)
class Item:
    """One request of the corpus."""

    family: str
    name: str
    call: Call
    expected: frozenset[int]

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


Items = Iterator[Item]


def part(
    name: str, value: bytes, filename: str | None = None, kind: str | None = None, more: str = "", quoted: str = '"'
) -> bytes:
    """One part of a form."""
    head = f"Content-Disposition: form-data; name={quoted}{name}{quoted}"
    head += f'; filename="{filename}"' if filename is not None else ""
    head += f"\r\nContent-Type: {kind}" if kind else ""
    return f"--{BOUNDARY}\r\n{head}{more}\r\n\r\n".encode() + value + b"\r\n"


def form(*parts: bytes, kind: str = f"multipart/form-data; boundary={BOUNDARY}", end: bytes | None = None) -> Call:
    """A multipart form of parts."""
    return Call(b"".join(parts) + (f"--{BOUNDARY}--\r\n".encode() if end is None else end), (("Content-Type", kind),))


def as_json(value: object, path: str = PREDICTIONS) -> Call:
    """A JSON body."""
    return Call(value if isinstance(value, bytes) else json.dumps(value).encode(), (JSON,), path)


def carried(rng: random.Random, data: bytes) -> Call:
    """A file on one of the ways that a client may choose."""
    way = rng.choice(("raw", "raw", "form", "json"))
    if way == "form":
        kind = rng.choice((None, "image/jpeg", "application/octet-stream", "image/png"))
        return form(part(rng.choice(("data", "file", "image")), data, f"{SECRET}.jpg", kind))
    if way == "json":
        return as_json({rng.choice(("image", "data", "file")): base64.b64encode(data).decode()})
    kind = rng.choice(("application/octet-stream", "image/jpeg", "image/x-none", "binary", "Image/JPEG; charset=x"))
    return Call(data, (("Content-Type", kind),))


def files(rng: random.Random, family: str, cases: Iterator[Case]) -> Items:
    """Files, each on some way."""
    for case in cases:
        yield Item(family, case.name, carried(rng, case.data), case.expected)


def json_bodies(data: bytes) -> Items:
    """JSON of every shape."""
    image = base64.b64encode(data).decode()
    nested: dict[str, object] = {}
    for _ in range(300):
        nested = {"image": nested}
    wrong: dict[str, object] = {
        "null": None, "number": 5, "list": [1], "list of objects": [{"image": image}], "string": image, "true": True,
        "empty object": {}, "no image": {"gradcam": "grid"}, "image null": {"image": None},
        "image number": {"image": 1},
        "image list": {"image": [image]}, "image object": {"image": {"b64": image}}, "nested": nested,
        "image true": {"image": True}, "empty image": {"image": ""}, "spaces": {"image": "    "},
        "two images": {"image": image, "data": image}, "address": {"image": "http://127.0.0.1:8081/models"},
        "path": {"image": "/etc/passwd"}, "data address": {"image": "data:image/jpeg;base64," + image},
        "lines": {"image": image[:76] + "\n" + image[76:]}, "cut base64": {"image": image[:-3] + "A"},
        "url-safe": {"image": "-_" + image[2:]}, "not ascii": {"image": "é" + image}, "surrogate": {"image": "\ud800"},
        "surrogate name": {"image": image, "\ud800": "x"}, "nul": {"image": image, "a\0b": "x"},
        "unknown": {"image": image, "x": "1"},
        "number as option": {"image": image, "gradcam": 1}, "null as option": {"image": image, "target": None},
        "wrong gradcam": {"image": image, "gradcam": "heat"}, "wrong target": {"image": image, "target": "mel"},
        "wrong tta": {"image": image, "tta": "yes"}, "list as option": {"image": image, "target": ["MEL"]},
        "bytes of a list": {"image": list(data[:200])},
        "many options": {"image": image} | {f"x{n}": "1" for n in range(2000)},
        "target of a megabyte": {"image": image, "target": "M" * (1 << 20)},
        "gradcam of seven megabytes": {"image": image, "gradcam": "é" * (7 << 19)},
        "name of a megabyte": {"image": image, "n" * (1 << 20): "1"},
        "TorchServe's own": {"instances": [{"data": image}]},
        "prototype": {"image": image, "__proto__": "x"}, "dunder": {"image": image, "__class__": "x"},
    }  # fmt: skip
    for name, value in wrong.items():
        yield Item("json", name, as_json(value), BROKEN | FOREIGN if name in ("string", "image true") else BROKEN)
    good: dict[str, object] = {
        "plain": {"image": image}, "data": {"data": image}, "true": {"image": image, "tta": True},
        "false": {"image": image, "tta": False}, "options": {"image": image, "gradcam": "overlay", "target": "MEL"},
        "unknown target": {"image": image, "target": "UNK"}, "spaces around": {"image": image, "target": " MEL "},
    }  # fmt: skip
    for name, value in good.items():
        yield Item("json", name, as_json(value), OK)
    text = json.dumps({"image": image}).encode()
    spoilt = {
        "cut": text[:-1], "two": text + text, "nan": b"NaN", "infinity": b'{"image": Infinity}',
        "quotes": b"{'image': 'x'}",
        "comment": b"/* */" + text, "bom": b"\xef\xbb\xbf" + text, "utf-16": text.decode().encode("utf-16"),
        "nuls": bytes(9),
        "latin-1": '{"image": "é"}'.encode("latin-1"), "deep": b"[" * 200_000, "deep objects": b'{"a":' * 100_000,
        "closed deep": b"[" * 50_000 + b"]" * 50_000, "large number": b'{"image": ' + b"9" * 10_000 + b"}",
        "empty": b"",
        "exponent": b'{"image": 1e999999}', "spaces": b" " * 9999,
        "picture": data, "same key": b'{"image": "", ' + text[1:],
    }  # fmt: skip
    for name, body in spoilt.items():
        yield Item("json", f"spoilt, {name}", as_json(body), PERHAPS - LARGE)


def options(data: bytes) -> Items:
    """Options of forms: right, wrong, twice, endless."""
    image = part("data", data, "a.jpg", "image/jpeg")
    for name, value in (
        ("gradcam", "grid"), ("gradcam", "none"), ("gradcam", "overlay"), ("target", "MEL"), ("target", "UNK"),
        ("tta", "true"), ("tta", "0"), ("tta", "TRUE"), ("target", " NV "), ("gradcam", "grid\r\n"),
    ):  # fmt: skip
        yield Item("options", f"{name}={value!r}", form(image, part(name, value.encode())), OK)
    endless = b"9" * (2 << 20)
    for name, value in (
        ("gradcam", b""), ("gradcam", b"GRID"), ("gradcam", b"grid,overlay"), ("gradcam", b"\0"),
        ("gradcam", b"\xff\xfe"),
        ("gradcam", endless), ("target", b""), ("target", b"mel"), ("target", b"XYZ"), ("target", b"0"),
        ("target", b"MEL,NV"),
        ("target", "ＭＥＬ".encode()), ("target", b"\xc3\x28"), ("target", b"{{7*7}}"), ("target", b"../../etc/passwd"),
        ("target", endless), ("target", b"' OR 1=1 --"), ("target", b"$(reboot)"), ("tta", b""), ("tta", b"yes"),
        ("tta", b"2"),
        ("tta", b"none"), ("tta", endless), ("colour", b"red"), ("Gradcam", b"grid"), ("explain", b"True"),
        ("method", b"DELETE"),
        ("url", b"http://127.0.0.1:8081"), ("a" * 5000, b"1"), ("ä", b"1"), ("instances", b"[]"), ("body", b"{}"),
    ):  # fmt: skip
        title = f"{name[:9]}={value[:16]!r} of {len(value)}"
        yield Item("options", title, form(image, part(name, value)), BROKEN)
    for name, value in (("gradcam", b"none"), ("target", b"MEL"), ("tta", b"false"), ("data", data)):
        yield Item("options", f"{name} twice", form(image, part(name, value), part(name, value)), OK)
    yield Item(
        "options", "a good one and a wrong one", form(image, *(part("tta", v) for v in (b"true", b"x"))), OK | BROKEN
    )
    yield Item("options", "a thousand", form(image, *(part(f"x{n}", b"1") for n in range(1000))), BROKEN)
    yield Item("options", "before the picture", form(part("gradcam", b"none"), image), OK)


def forms(data: bytes) -> Items:
    """Multipart forms, from usual to none at all."""
    for name in (
        "a.jpg",
        "../../etc/passwd",
        "a\\b\\c.exe",
        "ä.jpg",
        "x" * 5000,
        "",
        "%00.png",
        "a.php;.jpg",
        "con",
        SECRET,
    ):
        yield Item("forms", f"named {name[:20]!r}", form(part("data", data, name, "image/jpeg")), OK)
    for kind in (None, "image/png", "application/x-php", "x", "image/jpeg; a=b"):
        yield Item("forms", f"of kind {kind}", form(part("data", data, "a.jpg", kind)), OK)
    yield Item("forms", "a part of text", form(part("data", b"words", "a.txt", "text/plain")), FOREIGN)
    yield Item("forms", "a picture as text", form(part("data", data, "a.jpg", "text/plain")), PERHAPS)
    yield Item("forms", "JSON as the picture", form(part("data", b'{"a": 1}', "a.json", "application/json")), PERHAPS)
    yield Item("forms", "no file name", form(part("data", data)), OK)
    yield Item("forms", "nothing in the picture", form(part("data", b"", "a.jpg")), BROKEN)
    yield Item("forms", "no picture", form(part("gradcam", b"grid")), BROKEN)
    yield Item("forms", "two pictures", form(part("data", data, "a"), part("image", data, "b")), BROKEN)
    yield Item("forms", "another field", form(part("upload", data, "a.jpg")), BROKEN)
    yield Item("forms", "the field called body", form(part("body", data, "a.jpg")), OK | BROKEN)
    yield Item("forms", "not quoted", form(part("data", data, quoted="")), OK)
    yield Item("forms", "a long head", form(part("data", data, "a", None, "\r\nX-A: " + "b" * 7000)), PERHAPS)
    yield Item(
        "forms",
        "a prologue",
        Call(b"hello\r\n" + (whole := form(part("data", data, "a"))).body, whole.headers),
        PERHAPS,
    )


def broken_forms(data: bytes) -> Items:
    """Bodies that call themselves forms and are none: TorchServe's front cannot read them, and no worker sees them."""
    whole = part("data", data, "a.jpg")
    yield Item("broken forms", "cut in the picture", form(whole[: len(whole) // 2], end=b""), UNREADABLE)
    yield Item("broken forms", "no end", form(whole, end=b""), UNREADABLE)
    yield Item("broken forms", "empty", form(end=b""), UNREADABLE)
    yield Item("broken forms", "no part", form(), UNREADABLE)
    yield Item("broken forms", "no boundary", form(whole, kind="multipart/form-data"), UNREADABLE)
    yield Item("broken forms", "empty boundary", form(whole, kind="multipart/form-data; boundary="), UNREADABLE)
    yield Item("broken forms", "another boundary", form(whole, kind="multipart/form-data; boundary=other"), UNREADABLE)
    yield Item("broken forms", "no head", form(f"--{BOUNDARY}\r\n\r\nx\r\n".encode()), UNREADABLE)
    yield Item("broken forms", "a picture called a form", form(data, end=b""), UNREADABLE)
    yield Item("broken forms", "mixed", form(whole, kind=f"multipart/mixed; boundary={BOUNDARY}"), UNREADABLE)
    yield Item("broken forms", "no name", form(part("", data, "a.jpg")), UNREADABLE)
    encoding = "\r\nContent-Transfer-Encoding: base64"
    yield Item("broken forms", "base64 inside", form(part("data", base64.b64encode(data), more=encoding)), UNREADABLE)
    url = ("Content-Type", "application/x-www-form-urlencoded")
    for name, body in {
        "a picture": data, "words": b"data=1&data=2", "base64": b"image=" + quote(base64.b64encode(data)).encode(),
        "nothing": b"", "percent": b"a=%", "percent z": b"%zz=%zz", "many": b"a&" * 5000,
    }.items():  # fmt: skip
        yield Item("broken forms", f"urlencoded, {name}", Call(body, (url,)), UNREADABLE)


def heads(data: bytes) -> Items:
    """Headers of all kinds around a good picture."""
    for kind in (
        "image/jpeg", "IMAGE/JPEG", "application/pdf", "a/b", "a", "*/*", ";", "image/jpeg;;;", "x" * 3000, "é/ü",
        "video/mp4",
        "application/json5", "application/x-pickle", "multipart", "image/jpeg, image/png",
        "\tapplication/octet-stream\t",
    ):  # fmt: skip
        yield Item("heads", f"Content-Type: {kind[:24]}", Call(data, (("Content-Type", kind),)), OK)
    yield Item("heads", "no Content-Type", Call(data, ()), OK)
    for kind in ("text/plain", "text/html; charset=utf-8", "text/"):
        yield Item("heads", f"Content-Type: {kind}", Call(data, (("Content-Type", kind),)), OK | FOREIGN)
        yield Item("heads", f"words as {kind}", Call(b"words", (("Content-Type", kind),)), FOREIGN)
    yield Item("heads", "bad text", Call(b"\xff\xfe\x80", (("Content-Type", "text/plain; charset=utf-8"),)), FOREIGN)
    for name, value in (
        ("X-Forwarded-For", SECRET), ("Cookie", SECRET), ("Authorization", f"Bearer {SECRET}"), ("User-Agent", SECRET),
        ("Accept", "text/html"), ("Accept", "image/png;q=0"), ("Accept-Encoding", "gzip, br"), ("Range", "bytes=0-9"),
        ("If-None-Match", "*"), ("Origin", "http://evil.example"), ("explain", "True"), ("explain", "x"),
        ("TE", "trailers"),
        ("X-Name", "ä ö ü ÿ"), ("X-Long", "b" * 5000), ("Content-Encoding", "gzip"), ("Content-Encoding", "zstd"),
        ("Content-MD5", "x"), ("Upgrade", "websocket"), ("Upgrade", "h2c"),
        ("Content-Disposition", 'attachment; filename="/x"'),
        ("ts_request_sequence_id", "1"), ("ts_stream_next", "true"), ("x-ts-stream", "1"), ("requestId", "../x"),
        ("X-Forwarded-Host", "evil.example"), ("X-HTTP-Method-Override", "DELETE"), ("data", "1"), ("body", "1"),
        ("Date", "x"),
    ):  # fmt: skip
        yield Item("heads", f"{name}: {value[:20]}", Call(data, (OCTETS, (name, value))), OK)
    yield Item("heads", "two of a kind", Call(data, (OCTETS, ("Content-Type", "text/plain"))), OK | FOREIGN)
    yield Item("heads", "a hundred", Call(data, (OCTETS, *((f"X-{n}", "1") for n in range(100)))), OK)
    yield Item("heads", "overlong", Call(data, (OCTETS, ("X-Long", "b" * 20_000))), OVERLONG)
    yield Item("heads", "too many", Call(data, (OCTETS, *((f"X-{n}", "1") for n in range(5000)))), OVERLONG)
    chunks = (
        b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (data[:7], data[7:90], data[90:])) + b"0\r\n\r\n"
    )
    yield Item("heads", "in chunks", Call(chunks, (OCTETS, ("Transfer-Encoding", "chunked"))), OK)
    yield Item(
        "heads", "chunks that are none", Call(b"zz\r\nx\r\n", (OCTETS, ("Transfer-Encoding", "chunked"))), BROKEN
    )
    for length in ("-1", "x", "99999999999999999999", "1e3"):
        yield Item(
            "heads", f"Content-Length: {length}", Call(data, (OCTETS, ("Content-Length", length))), BROKEN | LARGE
        )
    yield Item("heads", "151 MiB and a byte", Call(data, (OCTETS, ("Content-Length", "158334977"))), LARGE)
    yield Item("heads", "33 MiB", Call(data + bytes(33 << 20), (OCTETS,)), LARGE)
    yield Item("heads", "152 MiB", Call(data + bytes(152 << 20), (OCTETS,)), LARGE)
    yield Item("heads", "48 MB of base64", as_json({"image": "/9j/" * (12_000_000)}), LARGE)


def addresses(data: bytes) -> Items:
    """Yield other methods and paths than those of the contract."""
    model = PREDICTIONS.rsplit("/", 1)[0]
    for path in (
        f"{PREDICTIONS}/1",
        "/explanations/skin_vit",
        f"{PREDICTIONS}?gradcam=none",
        f"{PREDICTIONS}?a=1&a=2&b",
    ):
        yield Item("addresses", path, Call(data, path=path), OK)
    for path in (
        f"{model}/nothing", f"{PREDICTIONS}/99", f"{PREDICTIONS}/-1", f"{PREDICTIONS}/x", f"{model}/..",
        f"{model}/%2e%2e%2f", f"{model}/skin_vit%00", f"{model}/{'a' * 2000}", "/", "/nothing", "/models",
        "/models/skin_vit", "//",
        "/metrics", "/workflows", "/invocations", "/etc/passwd",
        "/wfpredict/x", f"{model}/ä", f"{model}/a%20b", f"{model}/<script>", "/explanations/nothing",
        "/../../etc/passwd",
        f"{model}/skin_vit/%zz", "/%", f"/{'é' * 50}", f"{model}//skin_vit",
    ):  # fmt: skip
        yield Item("addresses", path[:40], Call(data, path=path), LOST | BROKEN)
    yield Item("addresses", "overlong", Call(data, path="/" + "a" * 20_000), OVERLONG | LOST)
    # TorchServe looks at the path alone: any method asks for a prediction. The proxy in front lets POST through.
    for method in ("PATCH", "DELETE", "TRACE", "CONNECT", "BREW", "post", "PROPFIND"):
        for path in (PREDICTIONS, f"{PREDICTIONS}/1"):
            yield Item("addresses", f"{method} {path}", Call(data, path=path, method=method), LOST | BROKEN | OK)
    for method in ("GET", "PUT"):
        yield Item("addresses", f"{method} and nothing", Call(method=method), LOST | BROKEN)
        yield Item("addresses", f"{method} and a picture", Call(data, method=method), LOST | BROKEN | OK)
