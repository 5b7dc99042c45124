"""The tables of the SQL queue. `migrations/` creates them; a test compares the two."""

from collections.abc import Mapping
from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    text,
)

from shim.queue.job import JobStatus

metadata = MetaData()

#: `seq` numbers the jobs as they are submitted. A job that is queued again keeps its number.
jobs = Table(
    "jobs",
    metadata,
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("task_id", String(128), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("input", JSON, nullable=False),
    Column("extras", JSON(none_as_null=True)),  # s3Config and other fields of the request: deleted when the job ends
    Column("worker_id", String(128)),
    Column("attempts", Integer, nullable=False, default=0),  # the number of the latest delivery, never reset
    Column("progress", Integer, nullable=False, default=0),
    Column("stage", String(32)),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("lease_expires_at", Float),
    Column("output", JSON(none_as_null=True)),
    Column("failure", JSON(none_as_null=True)),
    Column("stop_requested", Boolean, nullable=False, default=False),
    Column("stop_sent_at", Float),
    Column("idempotency_key", String(64)),  # a digest, see `shim.queue.base.Idempotency`
    Column("fingerprint", String(64)),
    Column("bucket_due_at", Float),  # when the bucket must be made to agree with the end of the job, see `outbox`
    # What HUNYUAN_MAX_ATTEMPTS limits, and deliveries in a row that no worker began: see `shim.queue.lost_jobs`.
    Column("lost_attempts", Integer, nullable=False, default=0),
    Column("deliveries_not_begun", Integer, nullable=False, default=0),
    Column("client", String(64), nullable=False, default=""),  # the name of its API key; empty without one
    Column("turn", Integer, nullable=False, default=0),  # orders the queue, see `shim.queue.fair_order`
    Column("last_event", Integer, nullable=False, default=0),  # its number in `events`; 0 for jobs of older releases
    Column("estimated_time", Float),  # seconds from submission to the end, as estimated at submission
    Column("webhook_url", Text),  # where the end of the job is sent, see `shim.queue.webhooks`
    Column("webhook_host", String(300)),  # the host and the port in it
    Column("webhook_due_at", Float),  # when the next attempt is due
    Column("webhook", JSON(none_as_null=True)),  # a `shim.queue.base.WebhookState`
    Column("preview", Integer),  # the number of the attempt's latest preview, see `previews`
)

# Every query of the queue uses one of these, so its cost does not grow with the number of ended jobs.
Index("jobs_by_state", jobs.c.state, jobs.c.seq)
Index("jobs_by_turn", jobs.c.state, jobs.c.turn, jobs.c.seq)
Index("jobs_by_worker", jobs.c.worker_id, jobs.c.state)
Index("jobs_to_stop", jobs.c.worker_id, jobs.c.stop_requested)
Index("jobs_by_finish", jobs.c.finished_at)
Index("jobs_by_bucket_due", jobs.c.bucket_due_at)
Index("jobs_by_webhook_due", jobs.c.webhook_due_at)
Index("jobs_by_idempotency_key", jobs.c.idempotency_key, unique=True)
Index("jobs_by_client", jobs.c.client, jobs.c.seq)

#: Selects the jobs that clients see with this status. Without parameters, because a partial index needs the same text.
HAS_STATUS: Final[Mapping[JobStatus, TextClause]] = {
    JobStatus.PROCESSING: text("state IN ('queued', 'running')"),
    JobStatus.COMPLETED: text("state = 'completed' AND failure IS NULL"),
    JobStatus.FAILED: text("failure IS NOT NULL"),
}
for _status, _which in HAS_STATUS.items():
    _columns = jobs.c.client, jobs.c.seq
    Index(f"jobs_{_status}_by_client", *_columns, sqlite_where=_which, postgresql_where=_which)

#: What has happened to each job: its first state, and every state or stage after it. See `shim.queue.history`.
events = Table(
    "events",
    metadata,
    Column("job", ForeignKey(jobs.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("stage", String(32)),
    Column("progress", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker_id", String(128)),
    Column("failure", JSON(none_as_null=True)),
)

#: The latest preview of each running job. Not in `jobs`, whose rows every poll reads. See `shim.queue.previews`.
previews = Table(
    "previews",
    metadata,
    Column("job", ForeignKey(jobs.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("jpeg", LargeBinary, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("worker_id", String(128), primary_key=True),
    Column("last_seen", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("report", JSON(none_as_null=True)),
)

#: The running mean of render seconds of each kind of job.
render_times = Table(
    "render_times",
    metadata,
    Column("model", String(64), primary_key=True),
    Column("resolution", String(16), primary_key=True),
    Column("duration", Integer, primary_key=True),
    Column("mean", Float, nullable=False),
    Column("samples", Integer, nullable=False),
)

#: How many jobs have reached each terminal state, updated as they do, because counting rows is slow.
outcomes = Table(
    "outcomes",
    metadata,
    Column("state", String(16), primary_key=True),
    Column("total", BigInteger, nullable=False),
)
