from __future__ import annotations

import json

import pytest

from kvdb.client import calls


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("hi there", ("TEXT", "hi there")),
        (b"\xff", ("TEXT", b"\xff")),
        ([1, 2, 3], ("TOKENS", 3, 1, 2, 3)),
        ([], ("TOKENS", 0)),
        (range(2), ("TOKENS", 2, 0, 1)),
    ],
)
def test_prompts_are_told_apart_by_type(prompt: calls.Prompt, words: tuple[object, ...]) -> None:
    assert calls.prompt_words(prompt) == words


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "è"}], {"messages": [], "tools": []}])
def test_messages_go_as_json(prompt: calls.Prompt) -> None:
    word, data = calls.prompt_words(prompt)
    assert word == "CHAT"
    assert json.loads(str(data)) == prompt


@pytest.mark.parametrize("prompt", [["text"], [None], [{"role": "user"}, 3]])
def test_other_prompts_are_refused(prompt: calls.Prompt) -> None:
    with pytest.raises(TypeError, match="a prompt is text, token ids, or messages"):
        calls.prompt_words(prompt)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (calls.prefill("s", "t"), "PREFILL s TEXT t"),
        (calls.prefill("s", [7], model="m", reuse="ONLY"), "PREFILL s TOKENS 1 7 MODEL m REUSE ONLY"),
        (calls.extend("s", [1, 2]), "EXTEND s TOKENS 2 1 2"),
        (calls.generate("s"), "GENERATE s"),
        (
            calls.generate("s", 5, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, seed=3, stop=["x", "y"]),
            "GENERATE s MAXTOKENS 5 TEMPERATURE 0.5 TOPK 4 TOPP 0.9 MINP 0.1 SEED 3 STOP 2 x y",
        ),
        (calls.generate("s", temperature=0), "GENERATE s TEMPERATURE 0"),
        (calls.streamed(calls.generate("s", 5)), "GENERATE s MAXTOKENS 5 STREAM"),
        (calls.sample("k", 9, seed=0), "SAMPLE k COUNT 9 SEED 0"),
        (calls.logits("k", 3), "LOGITS k TOP 3"),
        (calls.logits_raw("k"), "LOGITS k RAW"),
        (calls.snapshot("s", "k"), "SNAPSHOT s k"),
        (
            calls.snapshot("s", "k", meta={"a": "b"}, ex=9, nx=True, pin=True),
            "SNAPSHOT s k META 1 a b EX 9 NX PIN",
        ),
        (calls.snapshot("s", "k", px=7, xx=True), "SNAPSHOT s k PX 7 XX"),
        (calls.snapshot_later("s", "k", pin=True), "SNAPSHOT s k PIN ASYNC"),
        (calls.wait_snapshot("k"), "WAITSNAP k"),
        (calls.restore("k", "s"), "RESTORE k s"),
        (calls.restore("k", "s", replace=True), "RESTORE k s REPLACE"),
        (calls.fork("k", "a", "b"), "FORK k a b"),
        (calls.rewind_to("s", "k"), "REWIND s TO k"),
        (calls.rewind_tokens("s", 4), "REWIND s TOKENS 4"),
        (calls.rewind_steps("s"), "REWIND s STEPS 1"),
        (calls.prefix([1], model="m"), "PREFIX TOKENS 1 1 MODEL m"),
        (calls.tokenize("m", "t"), "TOKENIZE m t"),
        (calls.detokenize("m", [1, 2]), "DETOKENIZE m 1 2"),
        (calls.engine_load(), "ENGINE LOAD"),
        (calls.engine_unload("m"), "ENGINE UNLOAD m"),
        (calls.engine_status(), "ENGINE STATUS"),
        (calls.engine_cancel("s"), "ENGINE CANCEL s"),
        (calls.store_verify(deep=True), "STORE VERIFY DEEP"),
        (calls.store_export("k", "f", format="KV"), "STORE EXPORT k FILE f FORMAT KV"),
        (calls.store_export_data("k"), "STORE EXPORT k DATA FORMAT ARCHIVE"),
        (calls.store_import("k", "f"), "STORE IMPORT k FILE f"),
    ],
)
def test_words(call: calls.Call[object], words: str) -> None:
    assert " ".join(map(str, call.words)) == words


def test_what_must_not_be_sent_twice() -> None:
    once = [
        calls.extend("s", "t"),
        calls.generate("s"),
        calls.streamed(calls.generate("s")),
        calls.fork("s", "d"),
        calls.restore("k", "s"),
        calls.rewind_steps("s"),
        calls.snapshot("s", "k", nx=True),
    ]
    assert not any(call.repeatable for call in once)
    assert calls.prefill("s", "t").repeatable
    assert calls.snapshot("s", "k").repeatable
