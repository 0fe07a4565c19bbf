"""The audit log says what happened, and shows when somebody made it say something else.

- every line carries the hash of the one before it; a changed, removed, inserted or exchanged line is found;
- lines missing at the end are found with what the registry remembers of the newest one;
- a line that a crash cut off was never written, and the next one takes its place;
- appending never touches the lines that are there.
"""

import json
import os
import subprocess
import sys

import pytest

from mlflow_tracking import provenance as lineage
from mlflow_tracking.promotion.audit import START, AuditLog, Head, line_hash


@pytest.fixture
def log(tmp_path) -> AuditLog:
    log = AuditLog(tmp_path)
    for number in range(1, 6):
        log.append("serve", "ann@lab", version=str(number), remark=None)
    return log


def lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def write(log: AuditLog, new: list[bytes]) -> AuditLog:
    log.path.write_bytes(b"".join(new))
    return AuditLog(log.path.parent)


def test_what_is_written_is_read(log):
    assert [row["version"] for row in log.rows()] == ["1", "2", "3", "4", "5"]
    assert log.rows()[0]["before"] == START
    assert "remark" not in log.rows()[0]
    assert log.verify() == []
    assert log.verify(log.head()) == []
    assert Head.parse(str(log.head())) == log.head()
    assert Head.parse("") is None
    assert log.newest("serve", version="2")["seq"] == 2
    assert log.newest("retire") is None
    assert AuditLog(log.path.parent / "nothing").head() == Head()


def test_appending_leaves_the_lines_that_are_there(log):
    before = lines(log)
    AuditLog(log.path.parent).append("retire", "bob@lab", version="1")
    assert lines(log)[:5] == before
    assert log.verify() == [], "another process has written, and it is seen"
    assert log.head().seq == 6


def changed(line: bytes, **values) -> bytes:
    return json.dumps(json.loads(line) | values).encode() + b"\n"


def forged(line: bytes, **values) -> bytes:
    """Changed by somebody who knows how the hash is made."""
    row = json.loads(line) | values
    return json.dumps(row | {"hash": line_hash(row)}).encode() + b"\n"


FORGERIES = {
    "a word": (lambda own: [*own[:2], changed(own[2], version="9"), *own[3:]], "Line 3 was changed"),
    "a word and its hash": (lambda own: [*own[:2], forged(own[2], version="9"), *own[3:]], "Line 4 does not follow"),
    "a missing line": (lambda own: [*own[:2], *own[3:]], "Line 3 has the number 4"),
    "a missing first line": (lambda own: own[1:], "Line 1 has the number 2"),
    "two exchanged": (lambda own: [own[0], own[2], own[1], *own[3:]], "Line 2 has the number 3"),
    "one twice": (lambda own: [*own[:3], own[2], *own[3:]], "Line 4 has the number 3"),
    "no line at all": (lambda own: [*own[:2], b"hello\n", *own[3:]], "Line 3 is not a line of an audit log"),
    "a missing end": (lambda own: own[:3], "Lines 4 to 5 are missing at the end"),
    "a missing whole": (lambda own: [], "Lines 1 to 5 are missing at the end"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forgery_is_found(log, kind):
    head = log.head()
    forge, sentence = FORGERIES[kind]
    found = write(log, forge(lines(log))).verify(head)
    assert found[0].startswith(sentence)


def test_a_log_written_anew_is_found(log):
    head = log.head()
    log.path.unlink()
    anew = AuditLog(log.path.parent)
    for _ in range(7):
        anew.append("serve", "eve@lab", version="1")
    assert anew.verify() == [], "the chain itself is whole"
    assert anew.verify(head) == ["Line 5 is not the one that the registry knows: the log was rewritten."]


@pytest.mark.parametrize("kept", [1, 60, -1])
def test_a_line_that_was_cut_off_was_never_written(log, kept):
    own = lines(log)
    torn = write(log, [*own[:4], own[4][:kept]])
    assert torn.head().seq == 4
    assert torn.verify() == []
    torn.append("serve", "ann@lab", version="6")
    assert [row["version"] for row in torn.rows()] == ["1", "2", "3", "4", "6"]
    assert torn.verify() == []
    assert lines(log)[:4] == own[:4]


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"seq": "6", "hash": 1}\n', b"\xff\n"])
def test_a_damaged_last_line_stops_nobody_and_is_found(log, line):
    head = log.head()
    damaged = write(log, [*lines(log), line])
    assert damaged.head() == head
    damaged.append("serve", "ann@lab", version="6")
    assert damaged.rows()[-1]["before"] == head.hash
    assert damaged.verify()[0].startswith("Line 6 is not a line of an audit log")


def test_a_killed_writer_leaves_a_whole_chain(tmp_path):
    code = f"""
import os
from pathlib import Path
from mlflow_tracking.promotion.audit import AuditLog
log = AuditLog(Path({str(tmp_path)!r}))
print("ready", flush=True)
while True:
    log.append("serve", "x" * 2000)
"""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
        writer.stdout.readline()
        size = -1
        while (tmp_path / "audit.jsonl").stat().st_size <= size if (tmp_path / "audit.jsonl").exists() else True:
            pass
        writer.kill()
        writer.wait()
        writer.stdout.close()
        log = AuditLog(tmp_path)
        log.append("after", "ann@lab")
        assert log.verify() == []


def test_a_number_is_a_version_and_not_the_beginning_of_a_digest():
    rows = [{"version": "3", "digest": "sha256:abab" + "0" * 60}, {"version": "7", "digest": "sha256:3f00" + "0" * 60}]
    assert lineage._digest_in(rows, "3") == rows[0]["digest"]
    assert lineage._digest_in(rows, "4") is None
    assert lineage._digest_in(rows, "3f000000") == rows[1]["digest"]
