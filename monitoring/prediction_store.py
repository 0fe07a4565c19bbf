"""The monitor's database: predictions, refusals, roll-ups, and how far each log file is read. SQLite or Postgres.

A batch's rows, its roll-ups and its position are one transaction. Wherever the monitor is killed, the next one
continues at the last position, and each request id is counted once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from handlers.errors import ServiceUnavailable, UserError
from monitoring.drift_record import update_drift
from monitoring.log_reader import Batch
from monitoring.references import References
from monitoring.rollups import MINUTE, Slot, roll_up
from monitoring.tables import insert_new, log_files, metadata, outcomes, predictions, readings, refusals, rollups

MIGRATIONS = Path(__file__).parent / "migrations"
DELETED_AT_ONCE = 10_000  # so that the monitor reads the log between two deletions
# A server that stops answering must not stop the monitor.
POSTGRES_TIMEOUTS = {"connect_timeout": 5, "tcp_user_timeout": 30_000, "options": "-c statement_timeout=30000"}
IDS_AT_ONCE = 5_000  # SQLite takes 32,766 values in a statement, Postgres 65,535


class StoreError(UserError):
    """A database that this version cannot use."""


class StoreUnavailable(ServiceUnavailable):
    """The database does not answer."""


class PredictionStore:
    """The database at an address, such as sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME."""

    def __init__(self, url: str) -> None:
        try:
            address = sa.make_url(url)
            is_postgres = address.get_backend_name() == "postgresql"
            timeout = POSTGRES_TIMEOUTS if is_postgres else {"timeout": 30}
            self.engine = sa.create_engine(address, pool_pre_ping=True, connect_args=timeout)
        except (sa.exc.ArgumentError, ImportError):
            raise StoreError(
                "MONITOR_DATABASE is not usable: it must be sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME."
            ) from None
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def connect(self, writes: bool = False) -> Iterator[sa.Connection]:
        """A connection in a transaction. Raises StoreUnavailable if the database does not answer or has no tables.

        Args:
            writes: the transaction will write. Without it, SQLite refuses a write after another one's.
        """
        try:
            with self.engine.connect().execution_options(writes=writes) as connection, connection.begin():
                yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.ProgrammingError) as error:
            reason = str(error.orig).splitlines()[:1]
            raise StoreUnavailable(f"The monitor's database does not answer ({' '.join(reason)}).") from error

    def migrate(self) -> None:
        """Bring the tables to this version. Raises StoreError for a newer database, StoreUnavailable."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        with (
            self.connect(writes=True) as connection,
            EnvironmentContext(config, script, fn=lambda revision, _: script._upgrade_revs("head", revision)) as scope,
        ):
            scope.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
            try:
                with scope.begin_transaction():
                    scope.run_migrations()
            except CommandError:
                raise StoreError(
                    "A newer version of this project made the monitor's database. Update this project, or name "
                    "another database in MONITOR_DATABASE."
                ) from None

    def positions(self) -> dict[str, int]:
        """Return how many bytes of each log file are stored, by the file's fingerprint."""
        with self.connect() as connection:
            rows = connection.execute(sa.select(log_files.c.fingerprint, log_files.c.position))
            return {row.fingerprint: row.position for row in rows}

    def add(self, batch: Batch, references: References) -> int:
        """Store a batch unless another monitor has stored it; return the number of new rows.

        Raises StoreUnavailable, and then nothing of the batch is stored.

        Args:
            references: of the models, for drift.
        """
        with self.connect(writes=True) as connection:
            if not self._move(connection, batch):
                return 0
            rows = {row["request_id"]: row for row in batch.rows}
            refused = [row for row in rows.values() if "status" in row]
            answered = [row for row in rows.values() if "status" not in row]
            seen = self._stored(connection, (predictions.c.image_sha256, predictions.c.version), answered)
            new = self._insert(connection, predictions, answered)
            update_drift(connection, new, seen, references)
            new += self._insert(connection, refusals, refused)
            self._add_sums(connection, roll_up(new))
            return len(new)

    def _move(self, connection: sa.Connection, batch: Batch) -> bool:
        """Move the position of a file, and return whether it was where the batch begins."""
        if batch.begin is None:
            values = {"fingerprint": batch.fingerprint, "position": batch.end, "unreadable": batch.unreadable}
            return insert_new(connection, log_files, values)
        here = (log_files.c.fingerprint == batch.fingerprint) & (log_files.c.position == batch.begin)
        values = {"position": batch.end, "unreadable": log_files.c.unreadable + batch.unreadable}
        return connection.execute(sa.update(log_files).where(here).values(values)).rowcount == 1

    def _insert(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Insert the rows whose request id is new, and return them."""
        stored = self._stored(connection, (table.c.request_id,), rows)
        new = [row for row in rows if (row["request_id"],) not in stored]
        if new:
            connection.execute(sa.insert(table), new)
        return new

    @staticmethod
    def _stored(
        connection: sa.Connection, columns: Sequence[sa.Column[str]], rows: Sequence[dict[str, Any]]
    ) -> set[tuple[str, ...]]:
        """Return the stored values of some columns, where the first has a value that one of the rows has."""
        stored: set[tuple[str, ...]] = set()
        for first in range(0, len(rows), IDS_AT_ONCE):
            values = [row[columns[0].name] for row in rows[first : first + IDS_AT_ONCE]]
            query = sa.select(*columns).where(columns[0].in_(values)).distinct()
            stored |= {tuple(row) for row in connection.execute(query)}
        return stored

    def _add_sums(self, connection: sa.Connection, sums: Mapping[Slot, Mapping[str, float]]) -> None:
        """Add to the roll-ups. Several monitors add to one row: it is made first, locked, and then changed."""
        for slot, added in sorted(sums.items()):  # in one order, so that two monitors do not wait for each other
            insert_new(connection, rollups, slot._asdict() | {"sums": {}})
            key = (
                (rollups.c.width == slot.width) & (rollups.c.start == slot.start) & (rollups.c.version == slot.version)
            )
            stored = connection.execute(sa.select(rollups.c.sums).where(key).with_for_update()).scalar_one()
            total = stored | {name: stored.get(name, 0) + value for name, value in added.items()}
            connection.execute(sa.update(rollups).where(key).values(sums=total))

    def forget(self, sha256: str) -> dict[str, int]:
        """Delete the predictions, readings and outcomes of a picture; return how many of each.

        Raises StoreUnavailable, and then nothing is deleted.
        """
        with self.connect(writes=True) as connection:
            return {
                table.name: connection.execute(sa.delete(table).where(table.c.image_sha256 == sha256)).rowcount
                for table in (predictions, readings, outcomes)
            }

    def prune(self, before: float) -> bool:
        """Delete rows and minutes older than `before`, at most DELETED_AT_ONCE of each; return whether some remain.

        Hours and totals stay.
        """
        remaining = False
        for table in (predictions, refusals):
            old = sa.select(table.c.request_id).where(table.c.time < before).limit(DELETED_AT_ONCE)
            with self.connect(writes=True) as connection:
                count = connection.execute(sa.delete(table).where(table.c.request_id.in_(old))).rowcount
            remaining |= count == DELETED_AT_ONCE
        with self.connect(writes=True) as connection:
            minutes = (rollups.c.width == MINUTE) & (rollups.c.start < before)
            connection.execute(sa.delete(rollups).where(minutes))
        return remaining


def _begin_sqlite(connection: sa.Connection) -> None:
    """Take the lock for writing at once: SQLite does not wait for it once a transaction has read."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_sqlite(connection: Any, _: Any) -> None:
    """Let readers work while the monitor writes, and put migrations into transactions, as SQLAlchemy then begins them.

    A killed process loses no committed transaction.
    """
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()
