"""The gate of an index that may have to be opened again while threads read it.

LMDB gives an environment up when writing a meta page fails: what reads already may go on, nothing can begin, and a
process must not open the same index twice. So whoever wants to read enters here, and once the gate is shut the
environment is replaced as soon as everybody has left.
"""

from __future__ import annotations

import threading

from kvdb.errors import MisconfError

GIVEN_UP = "the index is being opened again after a failed write: try again"


class Gate:
    """Counts the threads that read. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_inside = 0
        self.is_shut = False

    def enter(self, wait_s: float) -> bool:
        """Begin to read, if need be after waiting for the gate to open; False if it stayed shut."""
        with self._changed:
            if self.is_shut and not self._changed.wait_for(lambda: not self.is_shut, wait_s):
                return False
            self._n_inside += 1
            return True

    def leave(self) -> None:
        """What `enter` allowed is over."""
        with self._changed:
            self._n_inside -= 1

    def shut(self) -> None:
        """Let nobody in from now on."""
        self.is_shut = True

    def open(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self.is_shut = False
            self._changed.notify_all()

    @property
    def is_empty(self) -> bool:
        """Whether nobody reads."""
        with self._changed:
            return not self._n_inside

    def check(self) -> None:
        """For long walks, which would keep everybody waiting: raises MisconfError once the gate is shut."""
        if self.is_shut:
            raise MisconfError(GIVEN_UP)


class Ended:
    """In place of a transaction whose environment is gone: all but `abort` raises MisconfError."""

    def __init__(self, message: str) -> None:
        self._message = message

    def abort(self) -> None:
        """Nothing is left to end."""

    def __getattr__(self, name: str) -> object:
        raise MisconfError(self._message)
