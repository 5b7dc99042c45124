"""Adds idempotency keys, and an index that finds old jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Alembic calls this."""
    op.add_column("jobs", sa.Column("idempotency_key", sa.String(64)))
    op.add_column("jobs", sa.Column("fingerprint", sa.String(64)))
    op.create_index("jobs_by_finish", "jobs", ["finished_at"])
    op.create_index("jobs_by_idempotency_key", "jobs", ["idempotency_key"], unique=True)
    if op.get_context().dialect.name == "postgresql":
        # Each row changes many times: vacuum after thousands of changes, not after a fifth of the table.
        op.execute(
            "ALTER TABLE jobs SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_analyze_scale_factor = 0.02)"
        )


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER TABLE jobs RESET (autovacuum_vacuum_scale_factor, autovacuum_analyze_scale_factor)")
    op.drop_index("jobs_by_idempotency_key", "jobs")
    op.drop_index("jobs_by_finish", "jobs")
    op.drop_column("jobs", "fingerprint")
    op.drop_column("jobs", "idempotency_key")
