"""Run by Alembic on the connection that `shim.queue.engine` hands over."""

from alembic import context

from shim.queue.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
