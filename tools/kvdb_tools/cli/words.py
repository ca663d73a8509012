"""Split a typed line into arguments with redis-cli's quoting rules.

Inside double quotes \\n \\r \\t \\b \\a \\\\ \\" and \\xHH mean what they look like, inside single quotes only \\'.
A closing quote must be followed by a space or the end of the line.
"""

from __future__ import annotations

import re

_ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "b": b"\b", "a": b"\a"}
_WORD = re.compile(
    r"""\s*(?:
        "(?P<double>(?:\\x[0-9a-fA-F]{2}|\\.|[^"\\])*)"(?=\s|$)
      | '(?P<single>(?:\\'|[^'])*)'(?=\s|$)
      | (?P<bare>[^\s"']\S*)
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})|\\(.)|([^\\]+)", re.DOTALL)


class QuoteError(ValueError):
    """A quote is not closed, or text follows right after it."""


def split_line(line: str) -> list[bytes]:
    """Return the arguments of a line; an empty line has none. Raises QuoteError."""
    words = []
    at = 0
    line = line.rstrip()
    while at < len(line):
        match = _WORD.match(line, at)
        if not match:
            raise QuoteError("Invalid argument(s)")
        at = match.end()
        if (text := match["double"]) is not None:
            words.append(_unescape(text))
        elif (text := match["single"]) is not None:
            words.append(text.replace("\\'", "'").encode())
        else:
            words.append(match["bare"].encode())
    return words


def quote(word: bytes) -> str:
    """The shortest text that split_line reads back as `word`."""
    try:
        text = word.decode()
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable() and not re.search(r"""[\s"'\\]""", text):
        return text
    return repr_bytes(word)


def repr_bytes(data: bytes) -> str:
    """Show bytes as redis-cli does: double quotes, escapes; text in UTF-8 stays readable."""
    out = ['"']
    # Characters are shown as such where the bytes are UTF-8; a byte that is not comes out as \xHH.
    for char in data.decode("utf-8", "surrogateescape"):
        code = ord(char)
        if char in '"\\':
            out.append("\\" + char)
        elif char in "\n\r\t\a\b":
            out.append({"\n": "\\n", "\r": "\\r", "\t": "\\t", "\a": "\\a", "\b": "\\b"}[char])
        elif 0xDC80 <= code <= 0xDCFF:
            out.append(f"\\x{code - 0xDC00:02x}")
        elif char.isprintable():
            out.append(char)
        else:
            out.extend(f"\\x{byte:02x}" for byte in char.encode())
    out.append('"')
    return "".join(out)


def _unescape(text: str) -> bytes:
    out = bytearray()
    for match in _ESCAPE.finditer(text):
        code, escaped, plain = match.groups()
        if code is not None:
            out.append(int(code, 16))
        elif escaped is not None:
            out += _ESCAPES.get(escaped, escaped.encode())
        else:
            out += plain.encode()
    return bytes(out)
