"""Sends the webhooks that the store holds, until each was taken or its tries are used up.

What is being sent when the process dies is sent again with the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from serve_app.jobs.runner import AGAIN_SECONDS, InThread
from serve_app.jobs.store import Delivery, JobStore
from serve_app.jobs.webhook import BACKOFF_SECONDS, AddressRefused, Target, send

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
AT_ONCE = 4


class Courier:
    """The webhooks of one process; others may send from the same store."""

    def __init__(
        self,
        store: JobStore,
        in_thread: InThread,
        private_allowed: bool,
        backoff: Sequence[float] = BACKOFF_SECONDS,
        tell: Callable[[str], None] = lambda outcome: None,
        operators: Target | None = None,
    ) -> None:
        """`tell` is called with "delivered", "again" or "given_up" after each try.

        The operator's own webhook may go to a private address whatever those of callers may.
        """
        self._store = store
        self._in_thread = in_thread
        self._private_allowed = private_allowed
        self._backoff = backoff
        self._tell = tell
        self._operators = operators

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as senders:
            for _ in range(AT_ONCE):
                senders.create_task(self._send_for_ever())

    async def _send_for_ever(self) -> None:
        while True:
            try:
                delivery = await self._in_thread(self._store.due_delivery)
                if delivery is not None:
                    await self._send(delivery)
                    continue
            except SQLAlchemyError:
                logger.warning("the database of webhooks does not answer; trying again")
                await asyncio.sleep(AGAIN_SECONDS)
            except Exception:  # whatever it is, the other webhooks are not to wait for ever
                logger.exception("a webhook could not be seen to; trying again")
                await asyncio.sleep(AGAIN_SECONDS)
            await asyncio.sleep(POLL_SECONDS)

    async def _send(self, delivery: Delivery) -> None:
        target = Target(delivery.url, delivery.secret)
        private_allowed = self._private_allowed or target == self._operators
        try:
            await send(target, delivery.id, delivery.body.encode(), private_allowed)
        except Exception as error:  # of the network, of the address, of libraries: it was not delivered
            said = f"{type(error).__name__}: {error}"[:200]
            again = None
            if not isinstance(error, AddressRefused) and delivery.tries <= len(self._backoff):
                again = self._backoff[delivery.tries - 1]
            if again is None:
                # The address may hold a secret of its own, so the log does not have it.
                logger.warning("webhook %s is given up after %d tries: %s", delivery.id, delivery.tries, said)
            else:
                logger.info("webhook %s is sent again in %g s: %s", delivery.id, again, said)
            await self._in_thread(self._store.not_delivered, delivery.id, said, again)
            self._tell("given_up" if again is None else "again")
        else:
            await self._in_thread(self._store.delivered, delivery.id)
            self._tell("delivered")
