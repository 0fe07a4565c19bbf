"""Prepare the registry's database for this MLflow: mlflow_server.sh runs this before each start of the server.

A database of an older MLflow is backed up and upgraded: SQLite's file is copied, Postgres' tables are copied into a
schema of their own. A database of a newer MLflow, and an older one of another kind, is refused: exit code 1 and one
sentence on stderr. `make up` shows the lines that begin with PREFIX or REFUSED.

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
from typing import TYPE_CHECKING

from handlers.errors import UserError

if TYPE_CHECKING:
    import sqlalchemy

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
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
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
    stamp = f"{current}.{time.strftime('%Y%m%d-%H%M%S')}"
    if engine.dialect.name == "sqlite":
        upgrade_sqlite(Path(engine.url.database or ""), uri, stamp)
    elif engine.dialect.name == "postgresql":
        upgrade_postgres(engine, uri, f"mlflow.{stamp}")
    else:
        raise DatabaseError(
            f"{shown} was made by an MLflow older than {version('mlflow')}. Back it up and run `mlflow db upgrade`."
        )


def upgrade_postgres(engine: "sqlalchemy.Engine", uri: str, schema: str) -> None:
    """Copy all tables of a Postgres database into a new schema, and upgrade them. Raises DatabaseError."""
    import sqlalchemy
    from mlflow.db import commands

    shown = engine.url.render_as_string(hide_password=True)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f'CREATE SCHEMA "{schema}"'))
            for table in sqlalchemy.inspect(connection).get_table_names():
                connection.execute(sqlalchemy.text(f'CREATE TABLE "{schema}"."{table}" AS TABLE "{table}"'))
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(error).partition("\n")[0]
        raise DatabaseError(f"{shown} cannot be backed up ({reason}). Let its user create schemas.") from error
    say(f"{shown} was made by an older MLflow. It is upgraded to {version('mlflow')}; the backup is schema {schema}.")
    try:
        commands.main(["upgrade", uri], standalone_mode=False)
    except Exception as error:  # Postgres has undone the changes: they are one transaction
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f'DROP SCHEMA "{schema}" CASCADE'))
        reason = str(error).partition("\n")[0]
        raise DatabaseError(f"{shown} could not be upgraded ({reason}). It is as it was before.") from error
    say(f"{shown} is upgraded.")


def upgrade_sqlite(path: Path, uri: str, stamp: str) -> None:
    """Back up and upgrade a SQLite database; restore it if the upgrade fails. Raises DatabaseError."""
    from mlflow.db import commands

    backup = path.with_name(f"{path.name}.{stamp}")
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
