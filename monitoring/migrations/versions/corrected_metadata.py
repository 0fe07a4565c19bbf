"""The metadata of a corrected prediction: its age, sex and site."""

import sqlalchemy as sa
from alembic import op

revision = "corrected metadata"
down_revision = "readings"


def upgrade() -> None:
    """Make the columns."""
    for table in ("outcomes", "readings"):
        op.add_column(table, sa.Column("metadata_sent", sa.JSON))
