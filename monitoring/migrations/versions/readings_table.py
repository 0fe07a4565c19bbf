"""The table of readings: what reviewers say of a predicted picture, and what the model had answered."""

import sqlalchemy as sa
from alembic import op

revision = "readings"
down_revision = "0003"


def upgrade() -> None:
    """Make the table."""
    words = ("kind", "reader", "queued_as", "first_opinion", "verdict", "request_id", "version", "digest")
    op.create_table(
        "readings",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("submission", sa.String, nullable=False, unique=True),
        *(sa.Column(name, sa.String, nullable=False) for name in words),
        sa.Column("image_sha256", sa.String, nullable=False, index=True),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("recorded", "time")),
        sa.Column("flagged", sa.Boolean),
        sa.Column("probabilities", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
