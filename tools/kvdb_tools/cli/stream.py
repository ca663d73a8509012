"""What is shown while a command runs: generated text as it comes, a progress bar for a prefill.

The server says so in push frames: `generate` session id text, and `progress` session done total. Anything else that is
pushed (a pub/sub message) is shown as a reply of its own.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvdb_tools.cli.reply import Map, Push, Reply


class Watcher:
    """Shows the push frames of one command. `finish` must be called when its reply is there, also after an error."""

    def __init__(self, out: BinaryIO, other: Callable[[Push], None], with_progress: bool) -> None:
        """`out` gets generated text; `other` gets frames of other kinds; the bar goes to stderr if asked for."""
        self._out = out
        self._other = other
        self._with_progress = with_progress
        self._progress: Progress | None = None
        self._task = TaskID(0)
        # A token may end in the middle of a character; a terminal wants whole ones.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.n_tokens = 0

    def __call__(self, push: Push) -> None:
        """Take one frame."""
        match push.items:
            case (b"generate", _, _, bytes() as text):
                self.n_tokens += 1
                self._write(self._decoder.decode(text))
            case (b"progress", session, int() as done, int() as total):
                if self._with_progress:
                    self._advance(session, done, total)
            case _:
                self._other(push)

    def finish(self) -> None:
        """End the line of generated text and take the bar away."""
        if self._progress:
            self._progress.stop()
        if self.n_tokens:
            self._write(self._decoder.decode(b"", final=True) + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text.encode())
        self._out.flush()

    def _advance(self, session: Reply, done: int, total: int) -> None:
        if self._progress is None:
            name = session.decode(errors="replace") if isinstance(session, bytes) else "session"
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,}/{task.total:,} tokens"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(name, total=total)
        self._progress.update(self._task, completed=done, total=total)


def without_streamed(reply: Reply) -> Reply:
    """A GENERATE reply without the text and ids that were streamed already."""
    if isinstance(reply, Map):
        return Map(tuple(pair for pair in reply.pairs if pair[0] not in (b"text", b"ids")))
    return reply
