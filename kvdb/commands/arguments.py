"""Reading a command's arguments from left to right, with Redis' own error texts where they mean the same."""

from __future__ import annotations

from kvdb.errors import KvdbError

INT64_MAX = (1 << 63) - 1


class Arguments:
    """A cursor over the arguments of one command."""

    def __init__(self, args: list[bytes]) -> None:
        self._args = args
        self._at = 0

    def __bool__(self) -> bool:
        """Whether any argument is left."""
        return self._at < len(self._args)

    def next(self) -> bytes:
        """The next argument as it is."""
        if self._at >= len(self._args):
            raise KvdbError("syntax error")
        self._at += 1
        return self._args[self._at - 1]

    def take(self, count: int) -> list[bytes]:
        """The next `count` arguments."""
        if count < 0 or count > len(self._args) - self._at:
            raise KvdbError("syntax error")
        self._at += count
        return self._args[self._at - count : self._at]

    def word(self) -> bytes:
        """The next argument as an upper-case option name."""
        return self.next().upper()

    def text(self) -> str:
        """The next argument as UTF-8 text."""
        try:
            return self.next().decode()
        except UnicodeDecodeError as error:
            raise KvdbError(f"text is not valid UTF-8 at byte {error.start}") from error

    def integer(self, what: str, low: int = -INT64_MAX - 1, high: int = INT64_MAX) -> int:
        """The next argument as an integer between `low` and `high`."""
        return integer(self.next(), what, low, high)

    def number(self, what: str, low: float, high: float) -> float:
        """The next argument as a float between `low` and `high`."""
        raw = self.next()
        try:
            value = float(raw)
        except ValueError:
            raise KvdbError("value is not a valid float") from None
        if not low <= value <= high:
            raise KvdbError(f"{what} must be between {low:g} and {high:g}, got {value:g}")
        return value


def integer(raw: bytes, what: str, low: int, high: int) -> int:
    """An integer in decimal; `what` names it when it is out of bounds."""
    digits = raw[1:] if raw[:1] == b"-" else raw
    if not digits.isdigit() or len(raw) > 20:
        raise KvdbError("value is not an integer or out of range")
    value = int(raw)
    if not low <= value <= high:
        if (low, high) == (-INT64_MAX - 1, INT64_MAX):
            raise KvdbError("value is not an integer or out of range")
        raise KvdbError(f"{what} must be between {low} and {high}, got {value}")
    return value


def unknown_option(name: bytes) -> KvdbError:
    """The error for an option the command does not have."""
    return KvdbError(f"syntax error near '{name[:64].decode(errors='replace')}'")
