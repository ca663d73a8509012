"""Tokenizer: text <-> token ids, one class for tokenizer.json and for GGUF vocabularies.

Byte-level BPE in both cases. A few strings are control tokens (begin and end of sentence, User, Assistant, think,
DSML). Ordinary text never becomes one: `encode` treats such strings as plain characters unless the caller, who wrote
the text himself, says
`special=True`. So a user's message cannot end its own turn.

Needs the `tokenizers` package only; the daemon uses this module without an engine.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from kvdb_engine.errors import ModelError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
CONTROL_STRINGS = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML)

_PUNCTUATION = r"!-/:-@\[-`{-~"
_LETTERS = "A-Za-z\u0080-\U0010ffff"
# ds4's pre-tokenizer "joyai-llm", first match wins: digits by three; CJK, Hiragana, Katakana; punctuation with the
# ASCII letters after it; letters (every non-ASCII character counts as one); one other character with letters;
# punctuation with a space before and newlines after; white space up to a newline, or all but its last character before
# a word.
_JOYAI = "|".join(
    (
        r"[0-9]{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        rf"[{_PUNCTUATION}][A-Za-z]+",
        f"[{_LETTERS}]+",
        rf"[^\r\n{_PUNCTUATION}][{_LETTERS}]+",
        rf" ?[{_PUNCTUATION}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
        r"[\s\S]",
    )
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to the bytes they stand for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()

_LONG_TEXT = 4096


class Tokenizer:
    """Encodes and decodes for one model. Immutable."""

    def __init__(self, backend: Backend, plain: Backend, specials: dict[str, int]) -> None:
        """Use `from_json` or `from_gguf`.

        backend knows control strings, plain does not; specials: text -> id of control tokens.
        """
        self._backend = backend
        self._plain = plain
        self.specials = dict(specials)
        longest_first = sorted(specials, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if specials else None
        texts = {token: text for text, token in backend.get_vocab(with_added_tokens=True).items()}
        self.n_tokens = max(texts, default=-1) + 1
        self._bytes = [self._piece(texts.get(token, "")) for token in range(self.n_tokens)]
        for text, token in specials.items():
            self._bytes[token] = text.encode()
        self.bos_id = specials.get(BOS)
        self.eos_id = specials.get(EOS)
        self.user = specials.get(USER)
        self.assistant = specials.get(ASSISTANT)
        self.think = specials.get(THINK)
        self.think_end = specials.get(THINK_END)
        self.dsml = specials.get(DSML)

    @staticmethod
    def _piece(text: str) -> bytes:
        if all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        return text.encode()  # a literal token, not a byte-level piece

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text. special: whether control strings in it become control tokens."""
        chosen = self._backend if special else self._plain
        if len(text) < _LONG_TEXT:
            found = chosen.encode(text, add_special_tokens=False)
        else:
            # A batch of one: only batches let other threads of the process run meanwhile.
            [found] = chosen.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids

    def split_control(self, text: str) -> list[tuple[str, int | None]]:
        """Split a text at its control strings: (text, None) for what lies between, (string, id) for each of them."""
        if self._control is None:
            return [(text, None)] if text else []
        pieces = self._control.split(text)
        return [(piece, self.specials.get(piece) if n % 2 else None) for n, piece in enumerate(pieces) if piece]

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for; empty for an id that the vocabulary pads with."""
        return self._bytes[token] if 0 <= token < self.n_tokens else b""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a run of ids; may begin or end inside a UTF-8 character."""
        return b"".join(map(self.token_bytes, ids))

    @cached_property
    def _lengths(self) -> npt.NDArray[np.uint16]:
        """Bytes of each id's text, and a zero for ids outside the vocabulary."""
        return np.array([*(len(self.token_bytes(token)) for token in range(self.n_tokens)), 0], np.uint16)

    def text_bytes(self, ids: array[int]) -> int:
        """Bytes of the text of a run of ids, without making it: a prompt of a million ids takes a millisecond."""
        return int(self._lengths.take(np.frombuffer(ids, np.uint32), mode="clip").sum(dtype=np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a run of ids; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder that is fed id by id."""
        return StreamDecoder(self)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `from_json` reads back."""
        self._backend.save(str(path))

    @classmethod
    def from_json(cls, path: Path) -> Tokenizer:
        """Read a Hugging Face tokenizer.json. Raises ModelError naming the file."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            backend = Backend.from_str(json.dumps(tree))
            added = tree.get("added_tokens") or []
            plain = Backend.from_str(json.dumps({**tree, "added_tokens": [], "post_processor": None}))
        except FileNotFoundError as error:
            raise ModelError(f"{path}: missing; a model folder needs its tokenizer.json") from error
        except Exception as error:  # the package raises bare Exception for a bad file
            raise ModelError(f"{path}: not a readable tokenizer: {error}") from error
        specials = {entry["content"]: int(entry["id"]) for entry in added}
        return cls(backend, plain, specials)

    @classmethod
    def from_gguf(cls, metadata: Any, where: str) -> Tokenizer:
        """Build from GGUF metadata (`tokenizer.ggml.tokens`, `.merges`). Raises ModelError naming the file."""
        try:
            tokens: list[str] = list(metadata["tokenizer.ggml.tokens"])
            merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        except KeyError as error:
            raise ModelError(f"{where}: metadata {error.args[0]} is missing") from error
        if metadata.get("tokenizer.ggml.model") != "gpt2":
            raise ModelError(f"{where}: tokenizer model {metadata.get('tokenizer.ggml.model')!r} is not supported")
        vocab = {text: token for token, text in enumerate(tokens)}
        specials = {text: vocab[text] for text in CONTROL_STRINGS if text in vocab}

        def build() -> Backend:
            made = Backend(BPE(vocab=vocab, merges=merges))
            made.pre_tokenizer = PreTokenizers(
                [Split(Regex(_JOYAI), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            made.decoder = ByteLevelDecoder()
            return made

        try:
            backend, plain = build(), build()
        except Exception as error:
            raise ModelError(f"{where}: the vocabulary and merges do not fit together: {error}") from error
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
        return cls(backend, plain, specials)


class StreamDecoder:
    """Turns ids into text piece by piece; holds back bytes until they are whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
