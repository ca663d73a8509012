"""Numbers and options on the wire, as Redis reads them."""

from __future__ import annotations

import re
import time

from kvdb.errors import KvdbError

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
NOT_INTEGER = "value is not an integer or out of range"
NOT_FLOAT = "value is not a valid float"
SYNTAX = "syntax error"
_INF = float("inf")
_FLOAT = re.compile(rb"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?|0x[0-9a-f]+\.?[0-9a-f]*(?:p[+-]?\d+)?)")


def int_or_none(text: bytes) -> int | None:
    """A 64-bit signed integer in its shortest decimal form, else None."""
    if text.isdigit():
        if len(text) < 19:
            return int(text) if text[0] != 0x30 or len(text) == 1 else None
    elif text[:1] != b"-" or not text[1:].isdigit() or text[1] == 0x30:
        return None
    if len(text) > 20 or text[0] == 0x30:
        return None
    value = int(text)
    return value if INT_MIN <= value <= INT_MAX else None


def parse_int(text: bytes, message: str = NOT_INTEGER) -> int:
    """A 64-bit signed integer in its shortest decimal form. Raises KvdbError."""
    value = int_or_none(text)
    if value is None:
        raise KvdbError(message)
    return value


def is_float(lowered: bytes) -> bool:
    """Whether lower-case text is a number that strtod reads to its end, NaN apart."""
    return _FLOAT.fullmatch(lowered) is not None


def parse_float(text: bytes, message: str = NOT_FLOAT) -> float:
    """A double as strtod reads it, without spaces, not NaN, within the range of doubles. Raises KvdbError."""
    lowered = text.lower()
    if not _FLOAT.fullmatch(lowered):
        raise KvdbError(message)
    value = _strtod(lowered)
    is_out_of_range = value in (_INF, -_INF) or (value == 0 and _has_digits(lowered))
    if is_out_of_range and b"inf" not in lowered:
        raise KvdbError(message)
    return value


def parse_bound(text: bytes, message: str) -> float:
    """A bound of a score range. Redis reads it with a bare strtod: spaces in front, nothing (0) and overflow pass."""
    lowered = text.lower().lstrip(b" \t\n\v\f\r")
    if not lowered:
        return 0.0
    if not _FLOAT.fullmatch(lowered):
        raise KvdbError(message)
    return _strtod(lowered)


def _strtod(lowered: bytes) -> float:
    try:
        return float.fromhex(lowered.decode()) if b"x" in lowered else float(lowered)
    except OverflowError:
        return -_INF if lowered[:1] == b"-" else _INF


def _has_digits(lowered: bytes) -> bool:
    """Whether the mantissa of a decimal is not zero, so that a value of zero is an underflow."""
    return b"x" not in lowered and any(digit in b"123456789" for digit in lowered.partition(b"e")[0])


_EXPIRY_UNITS = {b"EX": (1000, False), b"PX": (1, False), b"EXAT": (1000, True), b"PXAT": (1, True)}


def is_expiry_option(word: bytes) -> bool:
    """Whether an upper-case word is EX, PX, EXAT or PXAT."""
    return word in _EXPIRY_UNITS


def expiry_ms(option: bytes, text: bytes, command: str) -> int:
    """The moment in Unix ms that EX, PX, EXAT or PXAT with its number means. Raises KvdbError."""
    unit, absolute = _EXPIRY_UNITS[option]
    number = parse_int(text)
    return absolute_ms(number, unit, absolute, command, positive=True)


def absolute_ms(number: int, unit: int, absolute: bool, command: str, *, positive: bool = False) -> int:
    """The moment in Unix ms. positive: refuse zero and less, as SET does and EXPIRE does not."""
    error = KvdbError(f"invalid expire time in '{command}' command")
    if positive and number <= 0:
        raise error
    moment = number * unit
    if not INT_MIN <= moment <= INT_MAX:
        raise error
    if not absolute:
        moment += now_ms()
        if moment > INT_MAX:
            raise error
    return moment


def now_ms() -> int:
    """Unix time in ms."""
    return int(time.time() * 1000)
