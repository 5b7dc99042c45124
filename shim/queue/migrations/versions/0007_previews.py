"""Keeps the preview of each running job, in a table of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Alembic calls this. Jobs that run already have no preview yet."""
    op.add_column("jobs", sa.Column("preview", sa.Integer()))
    op.create_table(
        "previews",
        sa.Column("job", _SEQ, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True, autoincrement=False),
        sa.Column("jpeg", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    """`hunyuan downgrade-queue` calls this."""
    op.drop_table("previews")
    op.drop_column("jobs", "preview")
