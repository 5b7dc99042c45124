"""`hunyuan downgrade-queue`: migrates the queue's database back, before an older release is installed."""

import asyncio

from shim.host.data_directory import locked_data_directory
from shim.host.errors import StartError, settings_errors
from shim.queue.base import QueueError
from shim.queue.engine import database_url, downgrade
from shim.settings import ShimSettings


def main(revision: str) -> None:
    """Migrates the database that the server's settings name back to `revision`.

    Raises:
        StartError: a setting is wrong, a server uses the data directory, or the database can't be downgraded.
    """
    with settings_errors():
        settings = ShimSettings()
    with locked_data_directory(settings):
        try:
            asyncio.run(downgrade(database_url(settings.queue_url), revision))
        except (ValueError, QueueError) as exc:
            raise StartError(f"HUNYUAN_DATABASE_URL: {exc}") from exc
