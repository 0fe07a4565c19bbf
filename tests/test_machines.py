"""Other machines: line ends of Windows, spaces, other locales, file systems without sockets."""

import errno
import gc
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from handlers.bundle import Bundle
from mlflow_tracking import registry_database
from mlflow_tracking.registry import Registry, head_tag
from mlflow_tracking.stack_settings import MODEL_NAME, ROOT, Settings, takes_sockets
from scripts.promote import no_champion
from scripts.register_model import is_empty
from tests.live import mlflow_server

pytest_plugins = ["tests.fixtures_postgres"]
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
    assert (
        Bundle.load(windows_clone / "model_store/skin_vit").digest == Bundle.load(ROOT / "model_store/skin_vit").digest
    )


REVISION = "1b5f0d9ad7c1"  # the schema of MLflow 3.10


def make_older(uri: str) -> None:
    """Make the tables of MLflow 3.10, with a version that is champion."""
    import mlflow.store.db.utils as mlflow_database
    from alembic import command
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sqlalchemy.create_engine(uri)
    Base.metadata.create_all(engine)
    command.upgrade(mlflow_database._get_alembic_config(uri), REVISION)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO registered_models (name, workspace, creation_time, last_updated_time) "
            "VALUES ('skin_vit', 'default', 1, 1)",
            "INSERT INTO model_versions "
            "(name, version, workspace, creation_time, last_updated_time, current_stage, status) "
            "VALUES ('skin_vit', 1, 'default', 1, 1, 'None', 'READY')",
            "INSERT INTO registered_model_aliases (name, alias, version, workspace) "
            "VALUES ('skin_vit', 'champion', 1, 'default')",
        ):
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()


@pytest.fixture
def older_database(tmp_path) -> Path:
    path = tmp_path / "state" / "mlflow.db"
    path.parent.mkdir()
    make_older(f"sqlite:///{path}")
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MLflow's connections
def test_a_postgres_database_of_an_older_mlflow_is_backed_up_and_upgraded(postgres, capfd, monkeypatch):
    make_older(postgres)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", postgres)
    engine = sqlalchemy.create_engine(postgres)

    def rows(statement: str) -> list[tuple]:
        with engine.begin() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(statement))]

    revision, backups = (
        "SELECT version_num FROM alembic_version",
        "SELECT nspname FROM pg_namespace WHERE nspname ~ 'mlflow'",
    )
    with engine.begin() as connection:  # the last step of the upgrade will fail
        connection.execute(sqlalchemy.text("CREATE TABLE scheduler_leases (x INT)"))
    assert registry_database.main() == 1
    assert "could not be upgraded" in capfd.readouterr().err
    assert (rows(revision), rows(backups)) == ([(REVISION,)], [])

    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE scheduler_leases"))
    assert registry_database.main() == 0
    [(backup,)] = rows(backups)
    assert f"the backup is schema {backup}" in capfd.readouterr().err
    assert rows(revision) == [(registry_database.schemas()[1],)]
    assert rows(f'SELECT version_num FROM "{backup}".alembic_version') == [(REVISION,)]
    assert rows(f'SELECT alias FROM "{backup}".registered_model_aliases') == [("champion",)]
    engine.dispose()
    gc.collect()  # while the warning is ignored


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


@pytest.fixture
def registry(mlflow_store) -> Registry:
    """A registry with the registered model alone, as an interrupted first start leaves it."""
    registry = Registry(mlflow_store)
    registry.client.create_registered_model(MODEL_NAME)
    return registry


def test_a_registry_whose_champion_was_deleted_is_not_empty(registry, capsys):
    assert is_empty(registry)
    for number in ("1", "2"):
        registry.client.create_model_version(MODEL_NAME, "/bundle")
        assert is_empty(registry) == (number == "1"), "an interrupted first start leaves version 1 without an alias"
    registry.client.delete_model_version(MODEL_NAME, "2")
    assert is_empty(registry)
    registry.set_alias("champion", "1")
    assert not is_empty(registry)
    assert "has version 1 already" in capsys.readouterr().out
    registry.client.delete_model_version(MODEL_NAME, "1")
    assert registry.versions() == []
    assert not is_empty(registry)
    assert "skin_vit has no champion: the version with the alias was deleted" in capsys.readouterr().out


@pytest.mark.parametrize("replica", ["", "serving-1"])
def test_the_promoters_record_of_a_champion_counts_too(registry, replica):
    """People move the alias in MLflow's page, too."""
    registry.client.create_model_version(MODEL_NAME, "/bundle")
    registry.set_model_tag(head_tag(replica), "1 0123")
    assert not is_empty(registry)


def test_status_tells_a_deleted_champion_from_a_removed_alias():
    assert "champion points nowhere: version 3 was deleted" in no_champion("3", ["1", "2"])
    assert "No version has the alias champion; version 3 still serves" in no_champion("3", ["3", "2"])


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_sockets_moves_them_to_the_temporary_folder(tmp_path, monkeypatch, number):
    usual, real = tmp_path / "run", socket.socket.bind

    def bind(self: socket.socket, address: object) -> None:
        if str(address).startswith(str(tmp_path)):
            raise OSError(number, "not on this file system")
        real(self, address)

    monkeypatch.setattr("mlflow_tracking.stack_settings.SOCKET_PATH", 500)  # pytest's folders are long
    monkeypatch.setattr(socket.socket, "bind", bind)
    settings = Settings(stack_state=tmp_path, torchserve_run_dir=None)
    takes_sockets.cache_clear()
    assert settings.run_dir.parent == Path(tempfile.gettempdir())
    takes_sockets.cache_clear()
    monkeypatch.undo()
    assert takes_sockets(usual) or len(str(usual)) > 100
    takes_sockets.cache_clear()
    assert list(tmp_path.iterdir()) == []


def test_make_prints_its_signs_in_a_locale_that_is_not_utf8():
    """The stack prints ✓ and …, which Latin-1 lacks."""
    code = "import sys; sys.stdout.write(sys.stdout.encoding)"
    makefile = f"include Makefile\nencoding:\n\t@{sys.executable} -c '{code}'\n"
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "de_DE.ISO-8859-1"}
    done = subprocess.run(
        ["make", "-s", "-f", "-", "encoding"], cwd=ROOT, input=makefile, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "utf-8", done.stderr
