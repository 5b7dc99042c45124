"""Adds the webhook of each job: where it goes, when it is due, and how its delivery stands."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_COLUMNS: dict[str, sa.types.TypeEngine[Any]] = {
    "webhook_url": sa.Text(),
    "webhook_host": sa.String(300),
    "webhook_due_at": sa.Float(),
    "webhook": sa.JSON(none_as_null=True),
}


def upgrade() -> None:
    """Alembic calls this. Jobs that wait already have no webhook."""
    for name, kind in _COLUMNS.items():
        op.add_column("jobs", sa.Column(name, kind))
    op.create_index("jobs_by_webhook_due", "jobs", ["webhook_due_at"])


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    op.drop_index("jobs_by_webhook_due", "jobs")
    for name in _COLUMNS:
        op.drop_column("jobs", name)
