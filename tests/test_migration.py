"""`python -m monitoring.migration` makes the monitor's tables, and waits up to a minute for the database."""

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa

from monitoring import migration
from monitoring.prediction_store import StoreUnavailable
from tests.conftest import ROOT


@pytest.fixture
def database(tmp_path, monkeypatch):
    """A SQLite file in a folder that does not exist yet, so that the database does not answer."""
    file = tmp_path / "later" / "monitor.db"
    monkeypatch.setenv("MONITOR_DATABASE", f"sqlite:///{file}")
    return file


def test_the_command_makes_the_tables(tmp_path):
    address = f"sqlite:///{tmp_path}/monitor.db"
    for _ in range(2):  # repeating it is safe
        command = [sys.executable, "-m", "monitoring.migration"]
        done = subprocess.run(command, env=os.environ | {"MONITOR_DATABASE": address}, cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert {"predictions", "rollups", "alembic_version"} <= set(sa.inspect(sa.create_engine(address)).get_table_names())


def test_it_waits_until_the_database_answers(database, monkeypatch):
    monkeypatch.setattr(migration.time, "sleep", lambda _: database.parent.mkdir())
    migration.main()
    assert database.exists()


def test_it_gives_up_with_a_sentence(database, monkeypatch):
    pauses = []
    monkeypatch.setattr(migration, "PATIENCE", 0.05)
    monkeypatch.setattr(migration.time, "sleep", pauses.append)
    with pytest.raises(StoreUnavailable, match=r"^The monitor's database does not answer \(.*\)\.$"):
        migration.main()
    assert pauses, "it did not wait"
