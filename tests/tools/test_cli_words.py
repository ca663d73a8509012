from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb_tools.cli.words import QuoteError, quote, repr_bytes, split_line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  ", []),
        ("SET k v", [b"SET", b"k", b"v"]),
        ('SET "a b" ""', [b"SET", b"a b", b""]),
        (r'"\x00\xff\n\"\\\q"', [b'\x00\xff\n"\\q']),
        (r"'it\'s' 'a\nb'", [b"it's", rb"a\nb"]),
        ("caffè don't", ["caffè".encode(), b"don't"]),
    ],
)
def test_lines_split_as_in_redis_cli(line: str, words: list[bytes]) -> None:
    assert split_line(line) == words


@pytest.mark.parametrize("line", ['"open', "'open", '"a"b', "GET 'a'b", '"'])
def test_unbalanced_quotes_are_refused(line: str) -> None:
    with pytest.raises(QuoteError):
        split_line(line)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
def test_quoted_words_read_back(words: list[bytes]) -> None:
    assert split_line(" ".join(quote(word) for word in words)) == words


def test_bytes_show_with_escapes_and_readable_text() -> None:
    assert repr_bytes("è\t".encode() + b'\xfe"\x00') == r'"è\t\xfe\"\x00"'
