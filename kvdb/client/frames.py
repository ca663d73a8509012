"""Push frames of streaming commands, read."""

from __future__ import annotations

from typing import Any

from kvdb.client.replies import Progress, Token, text


def token_frame(push: list[Any]) -> Token:
    """`generate session id text` as a Token."""
    return Token(int(push[2]), text(push[3]))


def progress_frame(push: list[Any]) -> Progress:
    """`progress session done total` as a Progress."""
    return Progress(int(push[2]), int(push[3]))
