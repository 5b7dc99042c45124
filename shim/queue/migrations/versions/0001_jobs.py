"""Creates the tables of jobs, workers, render times and outcomes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Alembic calls this."""
    op.create_table(
        "jobs",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("task_id", sa.String(128), nullable=False, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("extras", sa.JSON()),
        sa.Column("worker_id", sa.String(128)),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("progress", sa.Integer(), nullable=False),
        sa.Column("stage", sa.String(32)),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float()),
        sa.Column("finished_at", sa.Float()),
        sa.Column("lease_expires_at", sa.Float()),
        sa.Column("output", sa.JSON()),
        sa.Column("failure", sa.JSON()),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        sa.Column("stop_sent_at", sa.Float()),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "seq"])
    op.create_index("jobs_by_worker", "jobs", ["worker_id", "state"])
    op.create_index("jobs_to_stop", "jobs", ["worker_id", "stop_requested"])
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.String(128), primary_key=True),
        sa.Column("last_seen", sa.Float(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("report", sa.JSON()),
    )
    op.create_table(
        "render_times",
        sa.Column("model", sa.String(64), primary_key=True),
        sa.Column("resolution", sa.String(16), primary_key=True),
        sa.Column("duration", sa.Integer(), primary_key=True),
        sa.Column("mean", sa.Float(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
    )
    outcomes = op.create_table(
        "outcomes",
        sa.Column("state", sa.String(16), primary_key=True),
        sa.Column("total", sa.BigInteger(), nullable=False),
    )
    op.bulk_insert(outcomes, [{"state": state, "total": 0} for state in ("completed", "failed", "cancelled")])
