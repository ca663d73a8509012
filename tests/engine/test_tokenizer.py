"""Text to ids and back; control strings stay text unless asked for."""

from __future__ import annotations

import gzip
import json
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.tokenizer import CONTROL_STRINGS, Tokenizer

VECTORS = Path(__file__).parent.parent / "vectors" / "ds4"


@pytest.fixture(scope="module", params=["nano", "gguf"])
def tokenizer(request: pytest.FixtureRequest, nano_info: ModelInfo, tiny: Engine) -> Tokenizer:
    return nano_info.tokenizer if request.param == "nano" else tiny.info.tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    stream = tokenizer.stream()
    assert "".join(stream.feed([token]) for token in ids) + stream.finish() == text


@pytest.mark.parametrize("text", CONTROL_STRINGS)
def test_control_strings_need_to_be_asked_for(tokenizer: Tokenizer, text: str) -> None:
    token = tokenizer.specials[text]
    assert tokenizer.encode(f"a{text}b", special=True).count(token) == 1
    plain = tokenizer.encode(f"a{text}b")
    assert not set(plain) & set(tokenizer.specials.values())
    assert tokenizer.decode(plain) == f"a{text}b"
    assert tokenizer.token_bytes(token) == text.encode()


def test_control_ids_have_names(tokenizer: Tokenizer) -> None:
    named = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.user, tokenizer.assistant]
    named += [tokenizer.think, tokenizer.think_end, tokenizer.dsml]
    assert named == [tokenizer.specials[text] for text in CONTROL_STRINGS]


def test_split_control(tokenizer: Tokenizer) -> None:
    think, end = tokenizer.think, tokenizer.think_end
    assert tokenizer.split_control("a<think>b</think>") == [
        ("a", None),
        ("<think>", think),
        ("b", None),
        ("</think>", end),
    ]
    assert tokenizer.split_control("") == []


def test_ids_outside_the_vocabulary_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**6) == b""


def test_stream_holds_back_half_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("€")
    stream = tokenizer.stream()
    assert [stream.feed([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd" or len(ids) == 1


def test_same_ids_as_ds4(tiny: Engine) -> None:
    """ds4-server reported the number of tokens of each rendered prompt."""
    for case in json.loads((VECTORS / "rendered_prompts.json").read_text(encoding="utf-8")):
        assert len(tiny.info.tokenizer.encode(case["rendered"], special=True)) == case["prompt_tokens"]


def test_same_text_as_ds4(tiny: Engine) -> None:
    ids = np.fromfile(VECTORS / "tokens.i32", "<i4")
    assert b"".join(map(tiny.info.tokenizer.token_bytes, ids.tolist())) == tiny.info.tokenizer.decode_bytes(ids)
    assert gzip.decompress((VECTORS / "prefill.payload.gz").read_bytes())[52:72] == ids[:5].tobytes()


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        Tokenizer.from_json(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        Tokenizer.from_json(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.tokens is missing"):
        Tokenizer.from_gguf({}, "x.gguf")
    base = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    with pytest.raises(ModelError, match="'llama' is not supported"):
        Tokenizer.from_gguf({**base, "tokenizer.ggml.model": "llama"}, "x.gguf")
    bad = {**base, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x y"]}
    with pytest.raises(ModelError, match="do not fit together"):
        Tokenizer.from_gguf(bad, "x.gguf")


@pytest.mark.parametrize("name", ["dsv4-nano", "synthetic:dsv4-flash"])
def test_text_bytes_is_the_length_of_the_text(name: str) -> None:
    tokenizer = open_model(name).tokenizer
    ids = array("I", [0, 1, 5, 200, 300, tokenizer.n_tokens - 1, *tokenizer.encode("Quel ramo del lago di Como, così")])
    assert tokenizer.text_bytes(ids) == len(tokenizer.decode_bytes(ids))
    assert tokenizer.text_bytes(array("I")) == 0
    # Ids past the vocabulary, which a padded model may sample, have no text.
    assert tokenizer.text_bytes(array("I", [tokenizer.n_tokens, 1 << 31])) == 0
