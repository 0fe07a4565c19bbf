"""The first tables: predictions, refusals, roll-ups and log files."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "predictions",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("time", sa.Float, nullable=False, index=True),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("image_sha256", sa.String, nullable=False, index=True),
        *(sa.Column(name, sa.String, nullable=False) for name in ("model", "digest", "code")),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("confidence", "entropy", "milliseconds")),
        sa.Column("flagged", sa.Boolean),
        *(sa.Column(name, sa.Integer) for name in ("set_size", "width", "height")),
        *(sa.Column(name, sa.JSON, nullable=False) for name in ("probabilities", "metadata_sent")),
        sa.Column("likely_set", sa.JSON),
    )
    op.create_table(
        "refusals",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("time", sa.Float, nullable=False, index=True),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("code", sa.String, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
    )
    op.create_table(
        "rollups",
        sa.Column("width", sa.Integer, primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True),
        sa.Column("version", sa.String, primary_key=True),
        sa.Column("sums", sa.JSON, nullable=False),
    )
    op.create_table(
        "log_files",
        sa.Column("fingerprint", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("unreadable", sa.BigInteger, nullable=False),
    )
