"""Machines that differ from the developers': line ends of Windows, spaces, other locales, file systems without sockets."""

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from handlers.bundle import Bundle
from mlflow_tracking import registry_database
from mlflow_tracking.registry import Registry
from mlflow_tracking.settings import ROOT
from tests.live import mlflow_server

# MLflow's own, of SQLAlchemy and Alembic
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def windows_clone(tmp_path_factory) -> Path:
    """A clone as Git for Windows makes it by default, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a clone") / "skin lesion"
    command = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--shared", ROOT, folder]
    subprocess.run(command, check=True)
    return folder


def test_a_clone_with_windows_line_ends_has_those_of_linux(windows_clone):
    listed = ["git", "-c", "core.autocrlf=true", "ls-files", "--eol"]
    done = subprocess.run(listed, cwd=windows_clone, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(lines) > 100
    assert {worktree for _, worktree, _ in lines} <= {"w/lf", "w/none", "w/-text"}
    done = subprocess.run(["bash", "scripts/setup_env.sh", "--no"], cwd=windows_clone, capture_output=True, text=True)
    assert "The option --no does not exist" in done.stderr


def test_the_shipped_bundle_of_such_a_clone_is_intact(windows_clone):
    assert Bundle.load(windows_clone / "model_store/skin_vit").digest == Bundle.load(ROOT / "model_store/skin_vit").digest


REVISION = "1b5f0d9ad7c1"  # the schema of MLflow 3.10


@pytest.fixture
def older_database(tmp_path) -> Path:
    """The database of MLflow 3.10, with a version that is champion."""
    import mlflow.store.db.utils as mlflow_database
    from alembic import command
    from mlflow.store.tracking.dbmodels.initial_models import Base

    path = tmp_path / "state" / "mlflow.db"
    path.parent.mkdir()
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    command.upgrade(mlflow_database._get_alembic_config(str(engine.url)), REVISION)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO registered_models (name, workspace, creation_time, last_updated_time) "
            "VALUES ('skin_vit', 'default', 1, 1)",
            "INSERT INTO model_versions (name, version, workspace, creation_time, last_updated_time, current_stage, status) "
            "VALUES ('skin_vit', 1, 'default', 1, 1, 'None', 'READY')",
            "INSERT INTO registered_model_aliases (name, alias, version, workspace) "
            "VALUES ('skin_vit', 'champion', 1, 'default')",
        ):
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()
    return path


def schema(path: Path) -> str:
    """The revision of a database's schema."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT version_num FROM alembic_version").fetchone()[0]


def prepared(path: Path, capfd, monkeypatch) -> tuple[int, list[str]]:
    """The exit code of registry_database.py for a SQLite database, and its sentences."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{path}")
    code = registry_database.main()
    lines = capfd.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith((registry_database.PREFIX, registry_database.REFUSED))]


@pytest.mark.live
def test_the_database_of_an_older_mlflow_is_backed_up_and_upgraded(older_database):
    server = mlflow_server(older_database.parent).start()
    try:
        champion = Registry(server.health.removesuffix("/health")).resolve("champion")
    finally:
        server.stop()
    assert champion is not None and champion.version == "1"
    assert schema(older_database) == registry_database.schemas()[1]
    [backup] = older_database.parent.glob(f"mlflow.db.{REVISION}.*")
    assert schema(backup) == REVISION
    assert f"the backup is {backup.name}" in server.text()


def test_a_failed_upgrade_restores_the_database(older_database, capfd, monkeypatch):
    def fail(engine: sqlalchemy.Engine) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("DROP TABLE model_versions"))
        raise OSError("No space left on device")

    monkeypatch.setattr("mlflow.store.db.utils._upgrade_db", fail)
    code, lines = prepared(older_database, capfd, monkeypatch)
    assert code == 1
    assert "No space left on device" in lines[-1] and "It was restored from mlflow.db." in lines[-1]
    with closing(sqlite3.connect(older_database)) as database:
        assert database.execute("SELECT version FROM model_versions").fetchall() == [(1,)]


def test_the_database_of_a_newer_mlflow_is_refused_unchanged(older_database, capfd, monkeypatch):
    with closing(sqlite3.connect(older_database)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
        database.commit()
    before = older_database.read_bytes()
    code, [line] = prepared(older_database, capfd, monkeypatch)
    assert code == 1
    assert "was made by a newer MLflow" in line
    assert older_database.read_bytes() == before
    assert list(older_database.parent.iterdir()) == [older_database]


def test_a_new_and_a_current_database_are_left_alone(tmp_path, capfd, monkeypatch):
    path = tmp_path / "mlflow.db"
    assert prepared(path, capfd, monkeypatch) == (0, [])
    assert not path.exists()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES (?)", [registry_database.schemas()[1]])
        database.commit()
    assert prepared(path, capfd, monkeypatch) == (0, [])
    assert list(tmp_path.iterdir()) == [path]
