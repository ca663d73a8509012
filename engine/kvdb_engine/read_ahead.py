"""Numbered pieces of work, done in threads ahead of the one who needs them in order.

Whoever waits for a piece does not sit idle: it takes the next piece that nobody has begun. So one piece costs no
hand-over between threads, and many pieces keep as many processors busy as there are helpers, and one more.

Invariant: no piece is begun that lies `window` or more past the one that was asked for last. Pieces may therefore
share `window` buffers in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

# More than processors: what is not in the page cache is waited for, and a disk is as fast as it can only with several
# requests at a time. Neither reading nor a checksum holds the interpreter's lock.
HELPERS = 3

_helpers = ThreadPoolExecutor(HELPERS, "kvdb-read")


class ReadAhead:
    """Does work(0) ... work(n_pieces - 1), each once. `wait_for` belongs to one thread; `close` ends it."""

    def __init__(self, work: Callable[[int], None], n_pieces: int, window: int) -> None:
        self._work = work
        self._n_pieces = n_pieces
        self._window = window
        self._asked = 0
        self._next = 0
        self._done: dict[int, BaseException | None] = {}
        self._is_closed = False
        self._change = threading.Condition()
        self._running = [_helpers.submit(self._help) for _ in range(min(HELPERS, n_pieces - 1))]

    def wait_for(self, number: int) -> None:
        """Return once piece `number` is done; raises what it raised. Pieces before it are not needed any more.

        Each piece is asked for once, in order.
        """
        with self._change:
            self._asked = number
            self._change.notify_all()
        while True:
            with self._change:
                while number not in self._done and (own := self._take()) is None:
                    if self._is_closed:
                        raise RuntimeError("closed: no more pieces are read")
                    self._change.wait()
                if number in self._done:
                    error = self._done.pop(number)
                    break
            assert own is not None
            self._do(own)
        if error is not None:
            raise error

    def close(self) -> None:
        """Begin nothing more and wait until nothing is under way."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()
        wait(self._running)

    def _take(self) -> int | None:
        """The next piece that may begin now. The lock is held."""
        if self._is_closed or self._next >= min(self._n_pieces, self._asked + self._window):
            return None
        self._next += 1
        return self._next - 1

    def _do(self, number: int) -> None:
        error: BaseException | None = None
        try:
            self._work(number)
        except BaseException as raised:
            error = raised
        with self._change:
            self._done[number] = error
            self._change.notify_all()

    def _help(self) -> None:
        while True:
            with self._change:
                while (number := self._take()) is None:
                    if self._is_closed or self._next >= self._n_pieces:
                        return
                    self._change.wait()
            self._do(number)
