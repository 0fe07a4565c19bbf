"""The table of drift, and the statistics of each prediction."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table and the column."""
    op.add_column("predictions", sa.Column("statistics", sa.JSON))
    op.create_table(
        "drift",
        sa.Column("version", sa.String, primary_key=True),
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("pictures", sa.BigInteger, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("alarm_since", sa.Float),
        sa.Column("reference", sa.JSON, nullable=False),
    )
