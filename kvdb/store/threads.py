"""Threads that wait for disks in the event loop's place.

What an executor of the standard library does for a call (two futures, a lock, a condition, callbacks from one to the
other) takes longer than the change of thread itself, and happens on the way to every durable reply. Here a call is
handed to a thread that waits, and its result is one callback on the loop. Each thread waits for its own calls: where
several wait at one queue, a call wakes a second one for nothing, and both want the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

log = logging.getLogger("kvdb.store")
T = TypeVar("T")
Call = Callable[[], object]
Done = Callable[[Any, BaseException | None], object]  # result, error
Task = tuple[Call, Done, Call | None]


class Threads:
    """One or more threads that make calls; one makes them in their order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n_threads: int, name: str) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Task | None]] = []  # of threads that wait: the last one is still warm
        self._calls: deque[Task] = deque()  # that wait for a thread
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, call: Call, done: Done, then: Call | None = None) -> None:
        """Run `call` in a thread, then `done` with its result, or the exception, on the event loop. From any thread.

        then: what the thread does once the loop was told, if `call` raised nothing; an error of its own is logged.
        Raises RuntimeError after `close`.
        """
        if not self._threads:
            raise RuntimeError("the threads have ended")
        with self._lock:
            if not self._idle:
                self._calls.append((call, done, then))
                return
            thread = self._idle.pop()
        thread.put((call, done, then))

    def run(self, call: Callable[[], T], then: Call | None = None) -> asyncio.Future[T]:
        """The same, as a future; one that is cancelled before its turn is not run. From the event loop."""
        future: asyncio.Future[T] = self._loop.create_future()

        def unless_cancelled() -> T:
            if future.cancelled():
                raise asyncio.CancelledError
            return call()

        def settle(result: T, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.start(unless_cancelled, settle, then)
        return future

    def close(self) -> None:
        """Wait until everything asked for so far is done, and end. Results are still delivered by the loop."""
        with self._lock:
            self._is_closing = True
            while self._idle:
                self._idle.pop().put(None)
        for worker in self._threads:
            worker.join()
        self._threads.clear()

    def _next(self, mine: SimpleQueue[Task | None]) -> Task | None:
        with self._lock:
            if self._calls:
                return self._calls.popleft()
            if self._is_closing:
                return None
            self._idle.append(mine)
        return mine.get()

    def _work(self) -> None:
        mine: SimpleQueue[Task | None] = SimpleQueue()
        while (next_call := self._next(mine)) is not None:
            call, done, then = next_call
            result, error = None, None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(done, result, error)
            # Nothing is kept until the next call comes: it may be the last reference to something large.
            del next_call, call, done, result
            if then is not None and error is None:
                try:
                    then()
                except Exception as problem:
                    log.error("what a thread did behind its call failed", exc_info=problem)
            del then, error
