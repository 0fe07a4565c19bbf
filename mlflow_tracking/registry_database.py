"""Prepare the registry's database for this MLflow: mlflow_server.sh runs this before each start of the server.

A SQLite database of an older MLflow is copied and upgraded. A database of a newer MLflow, and another kind of database
of an older one, is refused: exit code 1 and one sentence on stderr. `make up` shows the lines that begin with PREFIX or
REFUSED.

Few imports, because the script runs at each start, and in MLflow's image.
"""

import importlib.util
import os
import re
import shutil
import sqlite3
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from handlers.errors import UserError

PREFIX = "Registry database: "
REFUSED = "Registry database refused: "


class DatabaseError(UserError):
    """A database that this MLflow cannot use."""


def schemas() -> tuple[set[str], str]:
    """Return the revisions of the schema that the installed MLflow knows, and the latest; importing MLflow is slow."""
    package = importlib.util.find_spec("mlflow")
    if package is None or not package.submodule_search_locations:
        raise DatabaseError("MLflow is not installed. Run `make env`.")
    folder = Path(package.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    revisions, earlier = (
        {match[1] for text in texts if (match := re.search(rf"^{name}\s*=\s*['\"](\w+)['\"]", text, re.MULTILINE))}
        for name in ("revision", "down_revision")
    )
    [latest] = revisions - earlier
    return revisions, latest


def prepare(uri: str) -> None:
    """Upgrade the database at `uri` if an older MLflow made it. Raises DatabaseError."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        if engine.dialect.name == "sqlite" and not Path(engine.url.database or "").is_file():
            return
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return
            current = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError):
        return  # the server opens it too, and reports the error
    revisions, latest = schemas()
    shown = engine.url.render_as_string(hide_password=True)
    if current in (None, latest):
        return
    if current not in revisions:
        raise DatabaseError(
            f"{shown} was made by a newer MLflow than {version('mlflow')}: its schema {current} is unknown here. "
            "Update this project, or name another folder in STACK_STATE."
        )
    if engine.dialect.name != "sqlite":
        raise DatabaseError(
            f"{shown} was made by an MLflow older than {version('mlflow')}. Back it up and run `mlflow db upgrade`; "
            "docs/docker.md shows both commands."
        )
    upgrade(Path(engine.url.database or ""), uri, current)


def upgrade(path: Path, uri: str, revision: str) -> None:
    """Back up and upgrade a SQLite database; restore it if the upgrade fails. Raises DatabaseError."""
    from mlflow.db import commands

    backup = path.with_name(f"{path.name}.{revision}.{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
    except sqlite3.Error as error:
        backup.unlink(missing_ok=True)
        raise DatabaseError(f"{path} cannot be backed up to {backup.name} ({error}). Free some space.") from error
    say(f"{path} was made by an older MLflow. It is upgraded to {version('mlflow')}; the backup is {backup.name}.")
    try:
        commands.main(["upgrade", uri], standalone_mode=False)
    except Exception as error:
        for suffix in ("-wal", "-shm", "-journal"):  # they belong to the database that is replaced
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        shutil.copy2(backup, path)
        raise DatabaseError(f"{path} could not be upgraded ({error}). It was restored from {backup.name}.") from error
    say(f"{path} is upgraded.")


def say(sentence: str, prefix: str = PREFIX) -> None:
    """Print a sentence for the log and `make up`."""
    print(f"{prefix}{sentence}", file=sys.stderr, flush=True)


def main() -> int:
    """Prepare the database of MLFLOW_BACKEND_STORE_URI, which may hold a password. Return the exit code."""
    try:
        prepare(os.environ["MLFLOW_BACKEND_STORE_URI"])
    except DatabaseError as error:
        say(str(error), REFUSED)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
