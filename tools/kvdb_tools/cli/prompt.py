"""The interactive prompt: line editing, history, a syntax hint below the line, Tab completion.

Ctrl-C during a command closes the connection, which cancels the command's work in the server; the next one connects
again. Ctrl-D, `quit` and `exit` leave.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory

from kvdb_tools.cli.complete import complete_keys, complete_words
from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.docs import CommandDoc, find_doc, load_docs, remaining_syntax
from kvdb_tools.cli.run import Runner
from kvdb_tools.cli.words import QuoteError, split_line

# A line with a password must not end up in a file in the home directory.
_SECRET = ("auth ", "acl setuser", "config set requirepass", "hello ")


class _History(FileHistory):
    def store_string(self, string: str) -> None:
        if not string.lower().lstrip().startswith(_SECRET):
            super().store_string(string)


class ServerCompleter(Completer):
    """Completes from the server's command docs and, by a short connection of its own, from its keys."""

    def __init__(self, docs: dict[str, CommandDoc], target: Target) -> None:
        """`docs` is the dictionary that the prompt fills; it may be empty."""
        self._docs = docs
        self._target = target

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Offer words for what stands before the cursor."""
        typed = document.text_before_cursor
        given = typed.split()
        incomplete = "" if not typed or typed[-1].isspace() else given.pop()
        found = complete_words(self._docs, given, incomplete)
        if given:
            try:
                with Connection(self._target, timeout=0.5) as connection:
                    found += complete_keys(connection, incomplete)
            except OSError:
                pass
        for word in found:
            yield Completion(word, start_position=-len(incomplete))


def hint(docs: dict[str, CommandDoc], line: str) -> str:
    """What may still follow the line: the rest of the command's syntax, then its summary."""
    words = line.split()
    match = find_doc(docs, words)
    if not match:
        return ""
    doc, n_name = match
    rest = remaining_syntax(doc, len(words) - n_name)
    return f"{doc.name} {rest}".rstrip() + (f"   ({doc.summary})" if doc.summary else "")


def help_text(docs: dict[str, CommandDoc], words: list[str]) -> str:
    """The answer to `help` and `help COMMAND`."""
    if not words:
        names = sorted(name for name in docs if " " not in name)
        return "help COMMAND shows its syntax. Commands: " + " ".join(names) if names else "no command documentation"
    match = find_doc(docs, words)
    if not match:
        return f"no command {' '.join(words)!r}"
    doc = match[0]
    return f"{doc.name} {doc.syntax}\n  {doc.summary}\n  since {doc.since or '?'}, group {doc.group or '?'}"


def run_prompt(runner: Runner, history: Path) -> int:
    """Read and run lines until the end. Returns the exit status, 0."""
    docs: dict[str, CommandDoc] = {}
    try:
        file_history: FileHistory | InMemoryHistory = _History(str(history))
        history.touch(mode=0o600)
    except OSError:
        file_history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=file_history, completer=ServerCompleter(docs, runner.target), complete_while_typing=False
    )
    while True:
        connected = _connected(runner, docs)
        name = f"{runner.target}> " if connected else "not connected> "
        try:
            line = session.prompt(name, bottom_toolbar=lambda: hint(docs, session.default_buffer.text) or None)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        words = _words(line)
        if not words:
            continue
        match words[0].lower():
            case b"exit" | b"quit":
                return 0
            case b"clear":
                print("\x1b[2J\x1b[H", end="")
            case b"help" | b"?":
                print(help_text(docs, [word.decode(errors="replace") for word in words[1:]]))
            case _:
                _run(runner, words)


def _run(runner: Runner, words: list[bytes]) -> None:
    try:
        runner.run(words)
    except KeyboardInterrupt:
        print("(cancelled)")
    except OSError as error:
        print(f"Could not talk to kvdb at {runner.target}: {error}")


def _words(line: str) -> list[bytes]:
    try:
        return split_line(line)
    except QuoteError as error:
        print(error)
        return []


def _connected(runner: Runner, docs: dict[str, CommandDoc]) -> bool:
    try:
        connection = runner.connection
        if not docs:
            docs.update(load_docs(connection))
    except OSError:
        runner.close()
        return False
    return True
