"""Keeps what has happened to each job, and finds a client's jobs by status, newest first."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_STATUSES = {
    "processing": "state IN ('queued', 'running')",
    "completed": "state = 'completed' AND failure IS NULL",
    "failed": "failure IS NOT NULL",
}


def upgrade() -> None:
    """Alembic calls this. Jobs that exist already have the number 0 and no events."""
    op.add_column("jobs", sa.Column("last_event", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("estimated_time", sa.Float()))
    op.create_index("jobs_by_client", "jobs", ["client", "seq"])
    for status, which in _STATUSES.items():
        name, where = f"jobs_{status}_by_client", sa.text(which)
        op.create_index(name, "jobs", ["client", "seq"], sqlite_where=where, postgresql_where=where)
    op.create_table(
        "events",
        sa.Column("job", _SEQ, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("stage", sa.String(32)),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(128)),
        sa.Column("failure", sa.JSON()),
    )


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    op.drop_table("events")
    for name in (*(f"jobs_{status}_by_client" for status in _STATUSES), "jobs_by_client"):
        op.drop_index(name, "jobs")
    for name in ("last_event", "estimated_time"):
        op.drop_column("jobs", name)
