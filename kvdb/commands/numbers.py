"""Strings that hold numbers: INCR and its relatives."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from kvdb.commands.access import string_entry, write_string
from kvdb.commands.parse import INT_MAX, INT_MIN, is_float, parse_float, parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

_MANTISSA_BITS = 64  # of the 80-bit long double in which Redis adds
_LONG_DOUBLE_LIMIT = Fraction(2) ** 16384
_LARGEST_EXPONENT = 4932
_LONGEST_NUMBER = 5 * 1024  # Redis' buffer for a long double's text


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
    """The sum of two numbers as text, computed as Redis does: in long doubles, shown with up to 17 decimals."""
    first, second = _long_double(old, message), _long_double(number, "value is not a valid float")
    if first is None or second is None:
        raise KvdbError("increment would produce NaN or Infinity")
    total = _rounded(first + second)
    if abs(total) >= _LONG_DOUBLE_LIMIT:
        raise KvdbError("increment would produce NaN or Infinity")
    scaled = round(total * 10**17)
    whole, decimals = divmod(abs(scaled), 10**17)
    sign = "-" if scaled < 0 else ""
    return f"{sign}{whole}.{decimals:017d}".rstrip("0").rstrip(".").encode()


def check_decimal(number: bytes) -> None:
    """Raise KvdbError if this is not a number."""
    _long_double(number, "value is not a valid float")


def _long_double(text: bytes, message: str) -> Fraction | None:
    """The nearest 80-bit long double to a number's text, None for infinity. Raises KvdbError."""
    lowered = text.lower()
    if not is_float(lowered):
        raise KvdbError(message)
    if b"inf" in lowered:
        return None
    if b"x" in lowered:
        return Fraction(parse_float(lowered, message))
    if len(text) > _LONGEST_NUMBER or abs(int(lowered.partition(b"e")[2] or 0)) > _LARGEST_EXPONENT:
        raise KvdbError(message)
    return _rounded(Fraction(text.decode()))


def _rounded(value: Fraction) -> Fraction:
    """Round to a mantissa of 64 bits, half to even."""
    if not value:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - _MANTISSA_BITS
    unit = Fraction(2) ** exponent
    mantissa = value / unit
    if abs(mantissa) >= 1 << _MANTISSA_BITS:
        mantissa /= 2
        unit *= 2
    return round(mantissa) * unit
