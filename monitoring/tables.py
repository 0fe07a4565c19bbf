"""The tables of the monitor's database; `migrations/` makes them."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

metadata = sa.MetaData()
# What outcomes and readings keep of the prediction, which is deleted earlier.
ANSWER = ("request_id", "image_sha256", "version", "digest", "time", "flagged", "probabilities", "metadata_sent")
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("time", sa.Float, nullable=False, index=True),  # seconds since 1970
    sa.Column("version", sa.String, nullable=False),
    sa.Column("image_sha256", sa.String, nullable=False, index=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("code", sa.String, nullable=False),
    sa.Column("confidence", sa.Float, nullable=False),
    sa.Column("entropy", sa.Float, nullable=False),
    sa.Column("milliseconds", sa.Float, nullable=False),
    sa.Column("flagged", sa.Boolean),
    sa.Column("set_size", sa.Integer),
    sa.Column("width", sa.Integer),
    sa.Column("height", sa.Integer),
    sa.Column("probabilities", sa.JSON(none_as_null=True), nullable=False),  # in the order of handlers.taxonomy.CODES
    # Age, sex and site, where the client sent them.
    sa.Column("metadata_sent", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("likely_set", sa.JSON(none_as_null=True)),
    sa.Column("statistics", sa.JSON(none_as_null=True)),  # handlers.prediction.Prediction
)
refusals = sa.Table(
    "refusals",
    metadata,
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("time", sa.Float, nullable=False, index=True),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("code", sa.String, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
)
rollups = sa.Table(
    "rollups",
    metadata,
    sa.Column("width", sa.Integer, primary_key=True),
    sa.Column("start", sa.BigInteger, primary_key=True),
    sa.Column("version", sa.String, primary_key=True),
    sa.Column("sums", sa.JSON(none_as_null=True), nullable=False),
)
log_files = sa.Table(
    "log_files",
    metadata,
    sa.Column("fingerprint", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("unreadable", sa.BigInteger, nullable=False),
)
outcomes = sa.Table(
    "outcomes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("request_id", sa.String, nullable=False, index=True),
    sa.Column("recorded", sa.Float, nullable=False),  # when the row was written, in seconds since 1970
    sa.Column("reader", sa.String, nullable=False),  # who wrote it
    sa.Column("diagnosis", sa.String, nullable=False),  # a code of handlers.taxonomy
    # The prediction, which is deleted earlier.
    sa.Column("image_sha256", sa.String, nullable=False),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("flagged", sa.Boolean),
    sa.Column("probabilities", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("metadata_sent", sa.JSON(none_as_null=True)),
)
drift = sa.Table(
    "drift",
    metadata,
    sa.Column("version", sa.String, primary_key=True),
    sa.Column("digest", sa.String, primary_key=True),
    sa.Column("pictures", sa.BigInteger, nullable=False),
    sa.Column("evidence", sa.JSON(none_as_null=True), nullable=False),  # monitoring.drift.DriftState
    sa.Column("alarm_since", sa.Float),  # seconds since 1970; NULL without an alarm
    sa.Column("reference", sa.JSON(none_as_null=True), nullable=False),  # its figures
)
readings = sa.Table(
    "readings",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("submission", sa.String, nullable=False, unique=True),  # of the page, so that a repeated one counts once
    sa.Column("kind", sa.String, nullable=False),  # reading, or adjudication of readings that differ
    sa.Column("reader", sa.String, nullable=False),
    sa.Column("recorded", sa.Float, nullable=False),
    sa.Column("queued_as", sa.String, nullable=False),  # why the picture was in the queue at its first reading
    sa.Column("first_opinion", sa.String, nullable=False),  # before the model's answer was shown
    sa.Column("verdict", sa.String, nullable=False),  # a code of handlers.taxonomy, cannot_tell or bad_picture
    # The prediction, which is deleted earlier.
    sa.Column("request_id", sa.String, nullable=False),
    sa.Column("image_sha256", sa.String, nullable=False, index=True),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("flagged", sa.Boolean),
    sa.Column("probabilities", sa.JSON(none_as_null=True), nullable=False),
    sa.Column("metadata_sent", sa.JSON(none_as_null=True)),
    sqlite_autoincrement=True,  # a deleted row's number is not given again
)


def insert_new(connection: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless there is one with its key; return whether it was inserted.

    Other transactions with the same key wait until this one has ended.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(table).values(values).on_conflict_do_nothing()
    # Without preserve_rowcount, the rowcount is -1 on Postgres.
    return connection.execute(insert.execution_options(preserve_rowcount=True)).rowcount == 1
