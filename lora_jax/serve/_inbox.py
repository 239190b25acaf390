"""From the engine's thread to the event loop."""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable

from ._request import Event, Ticket


class Inbox:
    """What several requests of one call say, in the order in which they say it.

    The loop is woken once for whatever has come until it looks, and not for every token.
    """

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self._loop = asyncio.get_running_loop()
        self._events: collections.deque[tuple[int, Event]] = collections.deque()
        self._come, self._waking = asyncio.Event(), False

    def listener(self, index: int) -> Callable[[Event], None]:
        """What the engine is to call with the events of a request."""

        def listen(event: Event) -> None:
            self._events.append((index, event))
            if not self._waking:
                self._waking = True
                self._loop.call_soon_threadsafe(self._wake)

        return listen

    async def events(self) -> AsyncIterator[dict[int, list[Event]]]:
        """What has come since the last look, by request, until all have ended."""
        left = len(self.tickets)
        while left:
            await self._come.wait()
            self._come.clear()
            come: dict[int, list[Event]] = {}
            while self._events:
                index, event = self._events.popleft()
                come.setdefault(index, []).append(event)
            left -= sum(events[-1].ending is not None for events in come.values())
            if come:
                yield come

    def cancel(self) -> None:
        """Let all requests end where they are; those that have ended stay as they are."""
        for ticket in self.tickets:
            ticket.cancel()

    def _wake(self) -> None:
        self._waking = False
        self._come.set()
