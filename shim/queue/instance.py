"""A server's claim to its instance id, with which the ids of its own workers begin."""

import asyncio
import logging
from typing import Final

import psycopg

from shim.queue.base import QueueUnavailableError
from shim.queue.engine import INSTANCE_LOCK, database_url, libpq_parameters

_CHECK_EVERY: Final = 10.0
_ANSWER_TIMEOUT: Final = 10.0
#: PostgreSQL ends the session of a machine that is gone after 25 s, and with it the claim.
_KEEPALIVES: Final = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"

log = logging.getLogger(__name__)


class Instance:
    """The claim to `instance_id` in the database at `url`.

    A starting server takes back the jobs of its workers of earlier starts, which it knows by its instance id. With a
    copy of another server's data directory it would take back that server's jobs. So on PostgreSQL a session holds an
    advisory lock for the id, from the start of the server to its end. With SQLite the lock on the data directory
    excludes a second server, and the claim always succeeds.
    """

    def __init__(self, url: str, instance_id: str) -> None:
        self.instance_id = instance_id
        self._url = database_url(url)
        self._session: psycopg.AsyncConnection | None = None

    async def claim(self) -> bool:
        """Claims the id; False if another server has it.

        Raises:
            QueueUnavailableError: the database does not answer.
        """
        if self._url.get_backend_name() == "sqlite":
            return True
        session = None
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                session = await psycopg.AsyncConnection.connect(autocommit=True, **libpq_parameters(self._url))
                await session.execute(_KEEPALIVES)
                query = "SELECT pg_try_advisory_lock(%s, hashtext(%s))"
                row = await (await session.execute(query, (INSTANCE_LOCK, self.instance_id))).fetchone()
            if row is None or not row[0]:
                return False
            self._session, session = session, None
        except (psycopg.Error, TimeoutError) as exc:
            raise QueueUnavailableError("The job queue's database does not answer") from exc
        finally:
            if session is not None:
                await session.close()
        return True

    async def keep(self, check_every: float = _CHECK_EVERY) -> None:
        """Claims the id again whenever the database has ended the session. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(check_every)
            try:
                if not await self._is_held() and not await self.claim():
                    log.error(
                        "another server has claimed the instance id %s: delete the file `instance` in HUNYUAN_DATA_DIR "
                        "of one of the two servers and restart it",
                        self.instance_id,
                    )
            except QueueUnavailableError as exc:
                log.warning("can't claim instance id %s, retrying in %.0f s: %s", self.instance_id, check_every, exc)

    async def _is_held(self) -> bool:
        if self._url.get_backend_name() == "sqlite":
            return True
        if self._session is None:
            return False
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await self._session.execute("SELECT 1")
        except (psycopg.Error, TimeoutError):
            await self.release()
            return False
        return True

    async def release(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
