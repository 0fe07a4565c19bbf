"""The share of live requests that the challenger answers too.

- without the promoter's file nothing is sent, nor by a worker that is not the champion's, nor beyond the share;
- offering never waits: while one picture is on its way others are dropped;
- a picture is sent only while the champion rests, and given up when it does not;
- the log tells both answers and names the picture by its hash; a challenger that fails is told and harms nothing.
"""

import json
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from handlers import shadow
from handlers.shadow import Offer, Shadow, compared
from handlers.taxonomy import CODES
from tests.waiting import eventually

MELANOMA = {code: 0.92 if code == "MEL" else 0.01 for code in CODES}
MOLE = {code: 0.92 if code == "NV" else 0.01 for code in CODES}
OFFER = Offer(b"picture", "5ha", MELANOMA)


class Challenger:
    """Answers MOLE, after `wait` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.body = json.dumps({"probabilities": MOLE}).encode()
        self.wait = threading.Event()
        self.wait.set()
        challenger = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                challenger.asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                challenger.wait.wait(10)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(challenger.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def challenger():
    running = Challenger()
    yield running
    running.wait.set()
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def make(tmp_path, challenger, monkeypatch):
    monkeypatch.setattr(shadow, "QUIET", 0.05)

    def make(share: float | None = 1.0, version: str = "1") -> Shadow:
        file = tmp_path / "shadow.json"
        if share is not None:
            file.write_text(json.dumps({"champion": "1", "challenger": "3", "share": share}))
        url = f"http://127.0.0.1:{challenger.server.server_address[1]}/predictions/skin_vit"
        return Shadow(file, url, version)

    return make


def logged(caplog, seconds: float = 5) -> dict:
    """The first line of the log."""
    end = time.monotonic() + seconds
    while not caplog.messages:
        assert time.monotonic() < end, "nothing was logged"
        time.sleep(0.01)
    return json.loads(caplog.messages[0].removeprefix("shadow "))


def test_both_answers_are_compared_in_the_log(make, challenger, caplog):
    caplog.set_level(logging.INFO, "handlers.shadow")
    assert make().offer(OFFER)
    told = logged(caplog)
    assert challenger.asked == [("/predictions/skin_vit/3", b"picture")]
    assert told.pop("milliseconds") > 0
    assert told == {"champion": "1", "challenger": "3", "image": "5ha", "codes": ["MEL", "NV"], "agree": False,
                    "flip": "out of malignant", "moved": 0.91}  # fmt: skip
    assert compared(MOLE, MELANOMA)["flip"] == "into malignant"
    assert compared(MOLE, MOLE) == {"codes": ["NV", "NV"], "agree": True, "flip": None, "moved": 0.0}


def test_a_garbled_word_of_the_promoters_sends_nothing(make):
    own = make()
    for text in ("null", "[]", "3", '{"champion": "1"}', '{"champion": "1", "share": 1.0}', "{"):
        own.file.write_text(text)
        own._mark = None
        assert own.offer(OFFER) is False


@pytest.mark.parametrize(("share", "version"), [(None, "1"), (0.0, "1"), (1.0, "3"), (1.0, "2")])
def test_nothing_is_sent_unless_it_is_asked_for(make, challenger, share, version):
    own = make(share, version)
    assert not any(own.offer(OFFER) for _ in range(50))
    assert own._thread is None
    assert challenger.asked == []


def test_the_share_is_a_share(make, monkeypatch):
    own = make(0.3)
    monkeypatch.setattr(own._waiting, "put_nowait", lambda offer: None)
    assert 200 < sum(own.offer(OFFER) for _ in range(1000)) < 400


def test_the_promoters_word_is_heard_while_running(make):
    own = make(None)
    assert not own.offer(OFFER)
    own.file.write_text('{"champion": "1", "challenger": "3", "share": 1.0}')
    assert own.offer(OFFER)
    own.file.write_text("{")
    os.utime(own.file, ns=(1, 1))
    assert not own.offer(OFFER), "half a file is none"
    own.file.unlink()
    assert not own.offer(OFFER)


def test_offering_never_waits(make, challenger):
    challenger.wait.clear()
    own = make()
    began = time.monotonic()
    taken = 0
    while time.monotonic() - began < 0.5:
        taken += own.offer(OFFER)
    assert taken <= 2, "one on its way and one that waits; all others are dropped"
    eventually(lambda: challenger.asked)
    for _ in range(1000):
        own.offer(OFFER)
    assert len(challenger.asked) == 1, "all returned while the first was still waiting for its answer"


def test_the_champion_comes_first(make, challenger, monkeypatch):
    own = make()
    monkeypatch.setattr(shadow, "QUIET", 1.0)  # long enough for a machine that is busy with something else
    monkeypatch.setattr(shadow, "PATIENCE", 0.5)
    own.working(True)
    own.offer(OFFER)
    time.sleep(1.2)  # one long batch
    own.offer(OFFER)
    end = time.monotonic() + 2
    while time.monotonic() < end:  # many short ones
        own.working(False)
        time.sleep(0.01)
    time.sleep(1.2)
    assert challenger.asked == [], "it never rested, and the picture was given up"
    monkeypatch.setattr(shadow, "QUIET", 0.05)
    own.offer(OFFER)
    end = time.monotonic() + 10
    while not challenger.asked:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("body", [b"{}", b"<html>", b'{"probabilities": null}'])
def test_a_challenger_that_fails_is_told(make, challenger, caplog, body):
    caplog.set_level(logging.INFO, "handlers.shadow")
    challenger.body = body
    own = make()
    own.offer(OFFER)
    assert "failed" in logged(caplog)
    challenger.body = json.dumps({"probabilities": MOLE}).encode()
    caplog.clear()
    own.offer(OFFER)
    assert "failed" not in logged(caplog), "and the next one is compared"


def test_workers_are_told_by_their_environment(monkeypatch, tmp_path):
    for name in ("SHADOW_FILE", "SHADOW_URL"):
        monkeypatch.delenv(name, raising=False)
    assert Shadow.from_environment("1", "skin_vit") is None
    monkeypatch.setenv("SHADOW_FILE", str(tmp_path / "shadow.json"))
    monkeypatch.setenv("SHADOW_URL", "http://127.0.0.1:8080")
    assert Shadow.from_environment("1", "skin_vit").url == "http://127.0.0.1:8080/predictions/skin_vit"
