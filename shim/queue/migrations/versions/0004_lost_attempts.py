"""Counts lost attempts apart from deliveries."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"


def upgrade() -> None:
    """Alembic calls this."""
    for name in ("lost_attempts", "deliveries_not_begun"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
