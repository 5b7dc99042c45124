"""Adds the outbox of the bucket. Tasks that failed or were cancelled before get their tombstones, too."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Alembic calls this."""
    op.add_column("jobs", sa.Column("bucket_due_at", sa.Float()))
    op.create_index("jobs_by_bucket_due", "jobs", ["bucket_due_at"])
    op.execute("UPDATE jobs SET bucket_due_at = finished_at WHERE state IN ('failed', 'cancelled')")


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    op.drop_index("jobs_by_bucket_due", "jobs")
    op.drop_column("jobs", "bucket_due_at")
