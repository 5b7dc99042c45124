"""A downgrade of the queue's database, for an older release."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from shim.queue.base import QueueError
from shim.queue.engine import database_url as parsed
from shim.queue.engine import downgrade, migrate, open_engine
from tests.support.postgres import Postgres

VERSIONS = Path(__file__).parents[3] / "shim" / "queue" / "migrations" / "versions"
REVISIONS = sorted(path.name.partition("_")[0] for path in VERSIONS.glob("0*.py"))

pytestmark = pytest.mark.anyio


@pytest.fixture
def other_url(request: pytest.FixtureRequest, each_database_url: str, tmp_path: Path) -> str:
    """A second empty database of the same kind."""
    if each_database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/other.sqlite3"
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_empty_database()


async def tables(url: str) -> dict[str, tuple[list[str], list[str]]]:
    """The columns and indexes of each table."""

    def look(connection: sa.Connection) -> dict[str, tuple[list[str], list[str]]]:
        seen = sa.inspect(connection)
        return {
            table: (
                sorted(column["name"] for column in seen.get_columns(table)),
                sorted(index["name"] or "" for index in seen.get_indexes(table)),
            )
            for table in seen.get_table_names()
        }

    engine = create_async_engine(parsed(url))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(look)
    finally:
        await engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS)
async def test_a_downgrade_leaves_the_tables_that_the_older_release_made(
    each_database_url: str, other_url: str, revision: str
) -> None:
    await (await open_engine(parsed(each_database_url))).dispose()
    await downgrade(parsed(each_database_url), revision)
    engine = create_async_engine(parsed(other_url))
    async with engine.begin() as connection:
        await connection.run_sync(migrate, revision)
    await engine.dispose()
    assert await tables(each_database_url) == await tables(other_url)


async def test_a_database_is_not_downgraded_to_a_newer_revision(each_database_url: str) -> None:
    await (await open_engine(parsed(each_database_url))).dispose()
    await downgrade(parsed(each_database_url), REVISIONS[0])
    with pytest.raises(QueueError, match=f"can't be downgraded to revision {REVISIONS[-1]}"):
        await downgrade(parsed(each_database_url), REVISIONS[-1])
