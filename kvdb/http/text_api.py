"""OpenAI's completions: a raw prompt, continued. Nothing is wrapped around it but the begin-of-sentence token."""

from __future__ import annotations

import secrets
import time
from typing import Any

from kvdb.errors import KvdbError
from kvdb.http.ask import Answer, Ask, Delta, Done, End, Event, TokenLogprob
from kvdb.http.chat_api import MAX_CHOICES, MAX_STOPS, extension, usage_body
from kvdb.http.errors import BadRequest, openai_body
from kvdb.http.fields import Fields, sampling_of
from kvdb.http.sse import sse

MAX_LOGPROBS = 5
MAX_TOKENS_DEFAULT = 16


def parse_text(fields: Fields, base: dict[str, Any]) -> Ask:
    """A request of /v1/completions."""
    prompt = fields.tree.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in prompt):
            raise BadRequest("prompt must be one text or one list of token ids", "prompt")
        vocab = base["model"].info.config.vocab
        if max(prompt) >= vocab:
            raise BadRequest(f"prompt: token id {max(prompt)} is out of range: the model has {vocab} tokens", "prompt")
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise BadRequest("prompt must be one text or one list of token ids", "prompt")
    fields.refuse("suffix", ("",), "the model continues text, it does not fill it in")
    fields.refuse("echo", (False,), "send the prompt's own text")
    fields.refuse("logit_bias", ({},), "logits are taken as the model gives them")
    fields.refuse("presence_penalty", (0,), "logits are taken as the model gives them")
    fields.refuse("frequency_penalty", (0,), "logits are taken as the model gives them")
    n = fields.integer("n", 1, MAX_CHOICES, 1) or 1
    fields.refuse("best_of", (1, n), "ask for n choices and pick")
    return Ask(
        **base,
        messages=None,
        prompt=prompt,
        sampling=sampling_of(fields),
        max_tokens=fields.integer("max_tokens", 1, 1 << 31, MAX_TOKENS_DEFAULT),
        n=n,
        stops=fields.strings("stop", MAX_STOPS),
        logprobs=fields.integer("logprobs", 0, MAX_LOGPROBS),
    )


def _logprobs(found: list[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets, at = [], offset
    for one in found:
        offsets.append(at)
        at += len(one.data.decode(errors="replace"))
    return {
        "tokens": [one.data.decode(errors="replace") for one in found],
        "token_logprobs": [one.logprob for one in found],
        "top_logprobs": [{data.decode(errors="replace"): lp for data, lp in one.top} for one in found],
        "text_offset": offsets,
    }


class TextDialect:
    """Writes one text completion."""

    keep_alive = b": keep-alive\n\n"

    def __init__(self, ask: Ask, *, include_usage: bool) -> None:
        self._ask = ask
        self._include_usage = include_usage
        self._length = [0] * ask.n
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": ask.model.info.name,
        }

    def _chunk(self, choice: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> bytes:
        one = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return sse({**self._head, "choices": [one]})

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def event(self, event: Event) -> bytes:
        """One event as chunks."""
        if isinstance(event, Delta):
            logprobs = _logprobs(list(event.logprobs), self._length[event.choice]) if event.logprobs else None
            self._length[event.choice] += len(event.text)
            return self._chunk(event.choice, event.text, None, logprobs)
        if isinstance(event, End):
            return self._chunk(event.choice, "", event.reason, None)
        if isinstance(event, Done):
            last = b""
            if self._include_usage:
                last = sse({**self._head, "choices": [], "usage": usage_body(event), **extension(event)})
            return last + b"data: [DONE]\n\n"
        return b""

    def failure(self, error: KvdbError) -> bytes:
        """An error in the middle of a stream."""
        return sse(openai_body(error))

    def error_body(self, error: KvdbError) -> dict[str, Any]:
        """An error response."""
        return openai_body(error)

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The completion."""
        choices = [
            {
                "index": number,
                "text": choice.content,
                "logprobs": _logprobs(choice.logprobs, 0) if self._ask.logprobs is not None else None,
                "finish_reason": choice.reason,
            }
            for number, choice in enumerate(answer.choices)
        ]
        done = answer.usage
        return {**self._head, "choices": choices, "usage": usage_body(done), **extension(done)}
