"""Alembic runs this module on the connection that `shim.queue.engine` passes in."""

from alembic import context

from shim.queue.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
