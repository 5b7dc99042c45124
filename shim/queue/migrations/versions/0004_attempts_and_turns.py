"""Counts lost attempts apart from deliveries, and adds the client and the turn of each job."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Alembic calls this. Jobs that wait already keep their order, before all new ones."""
    for name in ("lost_attempts", "deliveries_not_begun", "turn"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("client", sa.String(64), nullable=False, server_default=""))
    op.create_index("jobs_by_turn", "jobs", ["state", "turn", "seq"])


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    op.drop_index("jobs_by_turn", "jobs")
    for name in ("lost_attempts", "deliveries_not_begun", "turn", "client"):
        op.drop_column("jobs", name)
