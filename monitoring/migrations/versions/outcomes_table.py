"""The table of outcomes: the true diagnosis of a predicted picture, and what the model had answered."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "outcomes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("request_id", sa.String, nullable=False, index=True),
        sa.Column("recorded", sa.Float, nullable=False),
        *(sa.Column(name, sa.String, nullable=False) for name in ("reader", "diagnosis", "image_sha256")),
        *(sa.Column(name, sa.String, nullable=False) for name in ("version", "digest")),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("flagged", sa.Boolean),
        sa.Column("probabilities", sa.JSON, nullable=False),
    )
