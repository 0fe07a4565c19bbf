"""Two monitors with logs of their own share one Postgres: predictions, roll-ups and drift count every line once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from monitoring import queries
from monitoring.drift_record import drift_states
from monitoring.monitor import Monitor
from monitoring.rollups import figures
from tests.monitored_log import RotatedLog, archive_with, measured, normal_reference, normal_values, settings_of
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_postgres"]
PICTURES, PIECES = 400, 40  # of each monitor


def write_and_read(folder: Path, monitor: Monitor, lines: list[bytes]) -> None:
    """Write lines in pieces, and let the monitor read after each; what fails is read again."""
    log = RotatedLog(folder)
    for piece in np.array_split(np.array(lines, dtype=object), PIECES):
        log.write(b"".join(piece))
        monitor.step()
    eventually(lambda: monitor.step() > 0 and not monitor.error)


def test_two_monitors_lose_nothing_and_count_nothing_twice(tmp_path, postgres):
    folders = [tmp_path / name for name in ("first", "second")]
    digests = {archive_with(normal_reference(), folder / "store") for folder in folders}
    values = normal_values(2 * PICTURES, np.random.default_rng(0))
    lines = measured(values, digests.pop()).splitlines(keepends=True)
    monitors = [
        Monitor(settings_of(folder, monitor_database=postgres.replace("postgresql:", "postgresql+psycopg:")))
        for folder in folders
    ]
    monitors[0].store.migrate()  # as the chart's job does
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_and_read, folders, monitors, (lines[:PICTURES], lines[PICTURES:])))
    store = monitors[0].store
    assert figures(queries.totals(store)["1"])["predictions"] == 2 * PICTURES
    with store.connect() as connection:
        [(state, _)] = drift_states(connection).values()
        assert connection.execute(sa.text("SELECT count(*) FROM predictions")).scalar_one() == 2 * PICTURES
    for monitor in monitors:
        monitor.store.engine.dispose()
    assert state.pictures == 2 * PICTURES
