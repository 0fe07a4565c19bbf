"""The monitor stores each line of the prediction log exactly once.

That holds for any pieces that the log is written in, after rotations, restarts and kills, and while the database is
away. Roll-ups agree with the rows, and old rows are deleted.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.taxonomy import CODES
from monitoring import queries
from monitoring.log_lines import parse_line
from monitoring.monitor import DAY, Monitor
from monitoring.prediction_store import PredictionStore, StoreError
from monitoring.rollups import ALWAYS, HOUR, MINUTE, add, figures
from monitoring.tables import predictions, refusals, rollups
from tests.conftest import ROOT
from tests.monitored_log import NOW, RotatedLog, drain, many, prediction, refusal, settings_of


def stored_ids(store: PredictionStore) -> list[str]:
    with store.connect() as connection:
        return [
            identifier
            for table in (predictions, refusals)
            for identifier in connection.execute(sa.select(table.c.request_id)).scalars()
        ]


LINES = st.lists(st.sampled_from(["prediction", "refusal", "again", "broken", "empty"]), max_size=25)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(kinds=LINES, data=st.data())
def test_each_line_is_stored_once_whatever_happens(kinds, data):
    with tempfile.TemporaryDirectory() as folder:
        state, lines, ids, broken = Path(folder), [], [], 0
        for number, kind in enumerate(kinds):
            if kind == "prediction" or (kind == "again" and not ids):
                ids.append(f"r{number}")
                lines.append(prediction(ids[-1], NOW + number))
            elif kind == "refusal":
                ids.append(f"r{number}")
                lines.append(refusal(ids[-1], NOW + number))
            elif kind == "again":
                lines.append(next(line for line in lines if ids[-1].encode() in line))
            else:
                broken += kind == "broken"
                # No two lines are the same, as each line of a log holds a time: a file is recognised by its first line.
                lines.append(b'{"time": "noon %d"}\n' % number if kind == "broken" else b" " * number + b"\n")
        log, monitor = RotatedLog(state), Monitor(settings_of(state))
        rest = b"".join(lines)
        while rest:
            cut = data.draw(st.integers(1, len(rest)), label="bytes written")
            log.write(rest[:cut])
            ends_a_line, rest = rest[:cut].endswith(b"\n"), rest[cut:]
            if ends_a_line and data.draw(st.booleans(), label="rotated"):
                log.rotate()
            if data.draw(st.booleans(), label="read"):
                monitor.step()
            if data.draw(st.booleans(), label="restarted"):
                monitor.store.engine.dispose()
                monitor = Monitor(settings_of(state))
        drain(monitor)
        assert Counter(stored_ids(monitor.store)) == Counter(ids)
        total = figures(queries.totals(monitor.store).get("1", {}))
        assert total["predictions"] + total["refusals"] == len(ids)
        assert queries.unreadable_lines(monitor.store) == broken
        monitor.store.engine.dispose()


def test_a_killed_monitor_loses_nothing_and_counts_nothing_twice(tmp_path):
    log, number = RotatedLog(tmp_path), 0
    env = {"STACK_STATE": str(tmp_path), "MODEL_STORE": str(tmp_path / "store"), "PATH": "/usr/bin:/bin"}
    program = (
        "import threading\nfrom mlflow_tracking.stack_settings import Settings\n"
        "from monitoring.monitor import Monitor\nprint('ready', flush=True)\n"
        "Monitor(Settings.load()).run(threading.Event())"
    )
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                log.write(b"".join(prediction(f"r{number + i}") for i in range(200)))
                number += 200
                if number % 5000 == 0:
                    log.rotate()
                time.sleep(0.02)
            process.kill()
    monitor = Monitor(settings_of(tmp_path))
    drain(monitor)
    assert len(stored_ids(monitor.store)) == len(set(stored_ids(monitor.store))) == number
    assert figures(queries.totals(monitor.store)["1"])["predictions"] == number


def test_a_database_that_is_away_is_tried_again_and_nothing_is_lost(tmp_path):
    place = tmp_path / "disk" / "monitor.db"
    monitor, log = Monitor(settings_of(tmp_path, monitor_database=f"sqlite:///{place}")), RotatedLog(tmp_path)
    log.write(many(5))
    waits = [monitor.step() for _ in range(8)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert monitor.state()["database_up"] is False
    assert "database does not answer" in monitor.state()["error"]
    log.rotate()
    log.write(many(5, seed=1))
    place.parent.mkdir()
    drain(monitor)
    assert len(stored_ids(monitor.store)) == 10
    assert monitor.state() == {"recording": True, "database_up": True, "behind": 0, "reason": "", "error": ""}


def test_two_monitors_count_each_line_once(tmp_path):
    log = RotatedLog(tmp_path)
    log.write(many(50))
    first, second = Monitor(settings_of(tmp_path)), Monitor(settings_of(tmp_path))
    first.store.migrate()
    stale = second.store.positions()
    drain(first)
    log.write(many(3, seed=1))
    second.store.positions = lambda: dict(stale)  # it has read before the first one wrote
    second.step()
    del second.store.positions
    drain(second)
    assert figures(queries.totals(second.store)["1"])["predictions"] == 53


def test_roll_ups_agree_with_the_rows(tmp_path):
    log, monitor = RotatedLog(tmp_path), Monitor(settings_of(tmp_path))
    log.write(many(300, NOW - 5000) + many(400, NOW, version="2") + refusal("a") + refusal("b", code="x", status=500))
    drain(monitor)
    with monitor.store.connect() as connection:
        rows = connection.execute(sa.select(predictions)).all()
    for width in (MINUTE, HOUR, ALWAYS):
        total: dict[str, dict[str, float]] = {}
        for slot, sums in queries.sums(monitor.store, width):
            add(total.setdefault(slot.version, {}), sums)
        for version in ("1", "2"):
            mine = [row for row in rows if row.version == version]
            values = figures(total[version])
            assert values["predictions"] == len(mine)
            assert values["classes"] == {
                code: pytest.approx(sum(row.code == code for row in mine) / len(mine), abs=1e-5) for code in CODES
            }
            assert values["flagged_share"] == pytest.approx(sum(row.flagged for row in mine) / len(mine), abs=1e-5)
            assert values["set_sizes"] == {"2": len(mine)}
            latency = sorted(row.milliseconds for row in mine)
            for percent in (50, 95, 99):
                assert values["latency_ms"][f"p{percent}"] == pytest.approx(
                    latency[int(percent / 100 * (len(latency) - 1))], rel=0.05
                )
        assert (figures(total["1"])["refusals"], figures(total["1"])["errors"]) == (1, 1)
        assert figures(total["1"])["refusals_by_code"] == {"invalid_image": 1, "x": 1}


def test_old_rows_are_deleted_and_their_hours_stay(tmp_path):
    monitor = Monitor(settings_of(tmp_path, monitor_keep_days=30))
    RotatedLog(tmp_path).write(prediction("old", NOW - 40 * DAY) + prediction("new", NOW - 20 * DAY))
    drain(monitor)
    assert monitor.store.prune(time.time() - 30 * DAY) is False
    assert stored_ids(monitor.store) == ["new"]
    assert figures(queries.totals(monitor.store)["1"])["predictions"] == 2
    with monitor.store.connect() as connection:
        widths = Counter(connection.execute(sa.select(rollups.c.width)).scalars())
    assert widths == {MINUTE: 1, HOUR: 2, ALWAYS: 1}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"null", b"[1]", b"\xff\xfe", b'"probabilities"', b"9" * 5000,
        {"time": "yesterday"},
        {"time": "2026-01-01T00:00:00"},  # of no zone
        {"time": "1999-01-01T00:00:00+00:00"},
        {"time": "2999-01-01T00:00:00+00:00"},
        {"probabilities": {"NV": 1.0}},
        {"probabilities": dict.fromkeys(CODES, 2.0)},
        {"milliseconds": -1},
        {"milliseconds": float("nan")},
        {"version": "a\0b"},
        {"image_sha256": "x" * 5000},
        {"request_id": ["a"]},
        {"metadata_sent": {"age": [1]}},
    ],
)  # fmt: skip
def test_a_line_that_does_not_fit_is_unreadable(line):
    if isinstance(line, dict):
        line = json.dumps(json.loads(prediction("r")) | line).encode()
    assert parse_line(line, "fallback") is None


def test_a_line_of_an_older_version_is_read():
    row = json.loads(prediction("r"))
    for name in ("entropy", "set", "flagged", "width", "height", "request_id", "metadata_sent"):
        del row[name]
    parsed = parse_line(json.dumps(row).encode(), "fallback")
    assert parsed is not None
    assert (parsed["request_id"], parsed["code"], parsed["confidence"]) == ("fallback", "NV", 0.6)
    assert parsed["entropy"] == pytest.approx(1.5047, abs=1e-3)
    assert (parsed["flagged"], parsed["set_size"]) == (None, None)


def test_the_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    store = PredictionStore(f"sqlite:///{tmp_path / 'monitor.db'}")
    store.migrate()
    store.migrate()  # again changes nothing
    with store.connect() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="A newer version of this project made the monitor's database"):
        store.migrate()


def test_migrations_make_the_tables_of_this_version(tmp_path):
    store = PredictionStore(f"sqlite:///{tmp_path / 'monitor.db'}")
    store.migrate()
    inspector = sa.inspect(store.engine)
    for table in (predictions, refusals, rollups):
        columns = {column["name"]: column["nullable"] for column in inspector.get_columns(table.name)}
        assert columns == {column.name: column.nullable for column in table.columns}
        indexes = {name for index in inspector.get_indexes(table.name) for name in index["column_names"]}
        assert indexes == {column.name for column in table.columns if column.index}


@pytest.mark.parametrize("address", ["monitor.db", "mysql+nothing://a/b", ""])
def test_an_unusable_address_is_a_sentence(address):
    with pytest.raises(StoreError, match="MONITOR_DATABASE is not usable"):
        PredictionStore(address)
