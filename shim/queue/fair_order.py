"""The order of the waiting jobs: one job of each client in turn.

Each job gets the number of its turn when it is submitted. The worker that asks next gets the job with the lowest turn,
and of one turn the job that was submitted first. A client's job gets the turn after that of its last waiting job, and
at least the turn that is being served, so that nobody saves up turns. With one client this is first in, first out.

| submitted | a1 | a2 | a3 | b1 | b2 |
|---|---|---|---|---|---|
| turn | 1 | 2 | 3 | 1 | 2 |

These are taken as a1, b1, a2, b2, a3. A job that lost its worker returns to the front: its turn becomes 0. One that a
client retries gets a new turn, as if it were submitted now.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row

from shim.queue.schema import jobs

#: The turn of jobs that go before all others.
FRONT: Final = 0
#: Sorts waiting jobs. The index jobs_by_turn has this order.
ORDER: Final = (jobs.c.turn, jobs.c.seq)


def next_turn(waiting: Sequence[Row[Any]], client: str) -> int:
    """The turn of a new job of `client`. `waiting` are rows with `turn` and `client`."""
    served_now = min((job.turn for job in waiting if job.turn > FRONT), default=FRONT + 1)
    last_of_client = max((job.turn for job in waiting if job.client == client), default=FRONT)
    return max(served_now, last_of_client + 1)
