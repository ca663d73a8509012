"""Threads that wait for disks in the event loop's place.

What an executor of the standard library does for a call (two futures, a lock, a condition, callbacks from one to the
other) takes longer than the change of thread itself, and happens on the way to every durable reply. Here a call is
one entry in a queue, and its result one callback on the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Call = Callable[[], object]
Done = Callable[[Any, BaseException | None], object]  # result, error


class Threads:
    """One or more threads that work off a queue; with one, calls run in their order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n_threads: int, name: str) -> None:
        self._loop = loop
        self._calls: SimpleQueue[tuple[Call, Done] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, call: Call, done: Done) -> None:
        """Run `call` in a thread, then `done` with its result, or the exception, on the event loop. From any thread.

        Raises RuntimeError after `close`.
        """
        if not self._threads:
            raise RuntimeError("the threads have ended")
        self._calls.put((call, done))

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """The same, as a future; one that is cancelled before its turn is not run. From the event loop."""
        future: asyncio.Future[T] = self._loop.create_future()

        def unless_cancelled() -> T | None:
            return None if future.cancelled() else call()

        def settle(result: T, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.start(unless_cancelled, settle)
        return future

    def close(self) -> None:
        """Wait until everything asked for so far is done, and end. Results are still delivered by the loop."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (next_call := self._calls.get()) is not None:
            call, done = next_call
            result, error = None, None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(done, result, error)
            # Nothing is kept until the next call comes: it may be the last reference to something large.
            del next_call, call, done, result, error
