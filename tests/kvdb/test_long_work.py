"""Work of seconds leaves the event loop: other clients do not wait for one that tokenises a book."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb import branches
from kvdb.commands import state
from kvdb_engine.catalog import open_model


def loop_goes_on() -> threading.Event:
    """An event that the loop sets as soon as it gets to it."""
    event = threading.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)
    return event


async def test_a_long_text_is_tokenised_in_a_thread() -> None:
    event = loop_goes_on()
    tokenizer = SimpleNamespace(bos_id=None, encode=lambda text: [7, 8] if event.wait(5) else [])
    model: Any = SimpleNamespace(info=SimpleNamespace(tokenizer=tokenizer))
    text = "x" * state.LONG_PROMPT_BYTES
    ids = await state.prompt_ids(model, ("text", text), [b"TEXT", text.encode()], is_start=True)
    assert list(ids) == [7, 8], "the loop stood still"


async def test_many_draws_are_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    event = loop_goes_on()

    async def logits(*_: object) -> tuple[None, int, bytes]:
        return None, 5, bytes(4 * 10)

    monkeypatch.setattr(branches, "logits", logits)
    monkeypatch.setattr(state, "sample", lambda logits, position, sampling: sampling.seed if event.wait(5) else -1)
    client: Any = SimpleNamespace(server=SimpleNamespace(sessions=None), db=0)
    handler: Any = state.sample_command
    drawn = await handler(client, [b"k", b"COUNT", b"9", b"SEED", b"0"])
    assert [one["id"] for one in drawn] == list(range(9)), "the loop stood still"


def test_long_and_short_texts_are_tokenised_alike() -> None:
    tokenizer = open_model("dsv4-nano").tokenizer
    piece = "for key in snapshots:\n    print(key)  # größer\n\n"
    text = piece * 200
    assert len(text) > 4096
    assert tokenizer.encode(text) == tokenizer._plain.encode(text, add_special_tokens=False).ids
