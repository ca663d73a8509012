"""Strings that hold numbers: INCR and its relatives."""

from __future__ import annotations

from decimal import Context, Decimal
from typing import TYPE_CHECKING

from kvdb.commands.access import string_entry, write_string
from kvdb.commands.parse import INT_MAX, INT_MIN, parse_float, parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.resp import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

# Redis adds in 80-bit long doubles (64 bits of mantissa) and prints 17 digits behind the point.
_LONG_DOUBLE = Context(prec=21)


@handler("INCR")
def incr(client: Client, args: list[bytes]) -> Reply:
    """Add one."""
    return _add(client, args[0], 1)


@handler("DECR")
def decr(client: Client, args: list[bytes]) -> Reply:
    """Subtract one."""
    return _add(client, args[0], -1)


@handler("INCRBY")
def incrby(client: Client, args: list[bytes]) -> Reply:
    """Add an integer."""
    return _add(client, args[0], parse_int(args[1]))


@handler("DECRBY")
def decrby(client: Client, args: list[bytes]) -> Reply:
    """Subtract an integer."""
    number = parse_int(args[1])
    if number == INT_MIN:
        raise KvdbError("decrement would overflow")
    return _add(client, args[0], -number)


def _add(client: Client, key: bytes, number: int) -> int:
    entry = string_entry(client, key)
    value = add_integers(entry.value, number) if entry is not None else number  # type: ignore[arg-type]
    write_string(client, key, b"%d" % value, entry.expire_ms if entry is not None else 0, "incrby")
    return value


def add_integers(old: bytes, number: int) -> int:
    """The sum; refuses what is no 64-bit integer, before or after."""
    value = parse_int(old) + number
    if not INT_MIN <= value <= INT_MAX:
        raise KvdbError("increment or decrement would overflow")
    return value


@handler("INCRBYFLOAT")
def incrbyfloat(client: Client, args: list[bytes]) -> Reply:
    """Add a number; the result as text."""
    key = args[0]
    entry = string_entry(client, key)
    old: bytes = entry.value if entry is not None else b"0"  # type: ignore[assignment]
    text = add_decimals(old, args[1])
    write_string(client, key, text, entry.expire_ms if entry is not None else 0, "incrbyfloat")
    return text


def add_decimals(old: bytes, number: bytes, message: str = "value is not a valid float") -> bytes:
    """The sum of two numbers as text, as exact as a long double. Refuses infinity and what is no number."""
    first, second = parse_float(old, message), parse_float(number)
    if abs(first) == float("inf") or abs(second) == float("inf"):
        raise KvdbError("increment would produce NaN or Infinity")
    total = _LONG_DOUBLE.add(_decimal(old, first), _decimal(number, second))
    text = f"{total:.17f}".rstrip("0").rstrip(".") if total % 1 else f"{total:.0f}"
    return b"0" if text in ("-0", "") else text.encode()


def _decimal(text: bytes, value: float) -> Decimal:
    return Decimal(value) if b"x" in text.lower() else Decimal(text.decode())
