"""The ledger, from which TorchServe starts without registry and promoter.

- a reader finds the old ledger or the new one, whole, even if the writer is killed;
- a damaged ledger is an error with a sentence, a missing one is an empty one;
- one promoter at a time holds the store, and a killed one frees it;
- a changed archive is noticed, even with the old size and time.
"""

import os
import time
from pathlib import Path

import pytest

from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import locks
from mlflow_tracking.promotion.ledger import Entry, Ledger, LedgerError, Verifier
from mlflow_tracking.promotion.locks import StoreBusy
from mlflow_tracking.promotion.plan import Release
from tests.processes import running

ONE = Entry("1" * 64, "1", "sha256:" + "a" * 64, {"minWorkers": 1})
TWO = Entry("2" * 64, "2", "sha256:" + "b" * 64, {"minWorkers": 1})


@pytest.fixture
def ledger() -> Ledger:
    return Ledger().stored("one.mar", ONE).stored("two.mar", TWO).serving("one.mar").serving("two.mar")


def test_a_written_ledger_is_read(tmp_path, ledger):
    assert ledgers.read(tmp_path) == Ledger()
    ledgers.write(tmp_path, ledger)
    assert ledgers.read(tmp_path) == ledger
    assert ledgers.read(tmp_path).release("two.mar") == Release("2", TWO.digest)
    assert ledgers.read(tmp_path).release("three.mar") is None


def test_the_serving_and_the_last_good_archive(ledger):
    assert (ledger.default, ledger.last_good, ledger.loaded) == ("two.mar", "one.mar", ("one.mar", "two.mar"))
    assert ledger.serving("two.mar") == ledger, "no change: otherwise the last good one would be lost"
    assert ledger.serving("one.mar").last_good == "two.mar"
    assert ledger.retired("one.mar").loaded == ("two.mar",)
    assert "one.mar" in ledger.retired("one.mar").archives
    back = ledger.rolled_back("two.mar").serving("one.mar")
    assert (back.default, back.last_good, back.withdrawn) == ("one.mar", None, ("two.mar",))
    assert back.serving("two.mar").withdrawn == ()
    assert "two.mar" not in back.pruned("two.mar").archives


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 1, "archives": {"a": {"x": 1}}}'])
def test_a_damaged_ledger_is_an_error_with_a_sentence(tmp_path, text):
    (tmp_path / ledgers.LEDGER).write_text(text)
    with pytest.raises(LedgerError, match=r"The ledger .*ledger\.json cannot be read .*\."):
        ledgers.read(tmp_path)
    ledgers.set_aside(tmp_path)
    assert ledgers.read(tmp_path) == Ledger()


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_ledger_and_no_file(tmp_path, ledger, monkeypatch, where):
    ledgers.write(tmp_path, ledger)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full_disk)
    with pytest.raises(OSError, match="No space"):
        ledgers.write(tmp_path, Ledger())
    monkeypatch.undo()
    assert ledgers.read(tmp_path) == ledger
    assert list(tmp_path.iterdir()) == [tmp_path / ledgers.LEDGER]


WRITER = """
import sys
from pathlib import Path
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import locks
from mlflow_tracking.promotion.ledger import Entry, Ledger
store = Path(sys.argv[1])
with locks.lock(store):
    print("locked", flush=True)
    for number in range(10**9):
        entry = Entry("0" * 64, str(number), "sha256:" + "0" * 64)
        ledgers.write(store, Ledger({f"{i}.mar": entry for i in range(500)}, default="1.mar"))
"""


@pytest.fixture
def writer(tmp_path):
    """A process that holds the store's lock and writes ledgers as fast as it can."""
    with running(WRITER, tmp_path, says="locked") as process:
        yield process


def test_a_killed_writer_leaves_a_whole_ledger_and_a_free_store(tmp_path, writer):
    with pytest.raises(StoreBusy, match="Another promoter is working"), locks.lock(tmp_path):
        pass
    began, seen = time.monotonic(), set()
    while time.monotonic() < began + (1 if len(seen) > 2 else 60):  # a busy machine writes seldom
        ledger = ledgers.read(tmp_path)  # raises if a half-written one can be seen
        seen |= {entry.version for entry in ledger.archives.values()}
        assert len(ledger.archives) in (0, 500)
    assert len(seen) > 2, "the writer wrote nothing"
    writer.kill()
    assert len(ledgers.read(tmp_path).archives) == 500
    with locks.lock(tmp_path, wait=5):
        pass


def test_a_changed_archive_is_noticed(tmp_path: Path, monkeypatch):
    archive = tmp_path / "one.mar"
    archive.write_bytes(b"model")
    entry = Entry("9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4", "1", ONE.digest)
    verifier = Verifier(tmp_path)
    assert verifier.intact("one.mar", entry)
    assert not verifier.intact("two.mar", entry)
    stat = archive.stat()
    archive.write_bytes(b"m0del")
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not verifier.intact("one.mar", entry)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert not verifier.intact("one.mar", entry), "an unchanged file is not read again"
    archive.unlink()
    assert not verifier.intact("one.mar", entry)
