"""What `synthetic:...` names: a geometry without weights, and a tokenizer of arithmetic.

    synthetic:dsv4-flash                     DeepSeek V4 Flash: 43 layers, 129,280 logits, contexts to 1,048,576 tokens
    synthetic:dsv4-nano                      the geometry of the built-in model
    synthetic:dsv4-flash,context=65536,...   either, with fields changed: context, vocab, window, head_dim, rope_dim,
                                             index_dim, page_tokens, layers (keeps the pattern of ratios), and
                                             verify=yes: every loaded row is compared with what belongs there

Never imports MLX. A synthetic model's states are of a family of their own and can never be taken for a real model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvdb_engine import config as configs
from kvdb_engine.catalog import ModelInfo
from kvdb_engine.config import ModelConfig
from kvdb_engine.errors import ModelError
from kvdb_engine.tokenizer import CONTROL_STRINGS, Tokenizer
from kvdb_engine.weights import TensorSource
from kvdb_protocol.errors import FormatError

PREFIX = "synthetic:"
_FIELDS = ("context", "vocab", "window", "head_dim", "rope_dim", "index_dim")
_N_CONTROL = len(CONTROL_STRINGS)
_FIRST_WORD = _N_CONTROL + 256
_WORD = re.compile(rb" [a-p]{5}")
_LETTERS = b"abcdefghijklmnop"

FLASH = ModelConfig(
    vocab=129280,
    hidden=4096,
    n_layers=43,
    n_heads=64,
    head_dim=512,
    rope_dim=64,
    q_rank=1024,
    o_rank=1024,
    o_groups=8,
    window=128,
    ratios=(0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, 43))),
    index_heads=64,
    index_dim=128,
    index_topk=512,
    n_experts=256,
    experts_per_token=6,
    n_shared_experts=1,
    expert_width=2048,
    n_hash_layers=3,
    route_scale=1.5,
    swiglu_limit=10.0,
    norm_eps=1e-6,
    hc_streams=4,
    hc_iterations=20,
    hc_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn_factor=16.0,
    yarn_original=65536,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    context=1 << 20,
    bos_id=0,
    eos_id=1,
)


@dataclass(frozen=True)
class SyntheticInfo(ModelInfo):
    """A model without weights. verify: whether the engine checks every row it loads."""

    verify: bool = False

    is_synthetic = True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Arithmetic between ids and bytes."""
        return SyntheticTokenizer(self.config.vocab)

    @cached_property
    def quant(self) -> str:
        """There are no weights."""
        return "synthetic"

    def open_weights(self) -> TensorSource:
        """Always raises ModelError."""
        raise ModelError(f"{self.name} has no weights: it is for load tests")


def open_synthetic(spec: str) -> SyntheticInfo:
    """The model a `synthetic:...` or `NAME=synthetic:...` names. Raises ModelError."""
    name, rest = ("", spec) if spec.startswith(PREFIX) else spec.split("=", 1)
    base, *options = rest.removeprefix(PREFIX).split(",")
    config = _base(base)
    page_tokens, verify = 0, False
    for option in options:
        field, _, value = option.partition("=")
        if field == "verify" and value in ("yes", "no"):
            verify = value == "yes"
        elif not value.isdecimal() or not int(value):
            raise ModelError(f"{spec}: option {option!r} is not FIELD=NUMBER")
        elif field == "page_tokens":
            page_tokens = int(value)
        elif field == "layers":
            n = int(value)
            pattern = config.ratios[2:4] or (4, 128)
            ratios = (*config.ratios[:2], *(pattern[layer % 2] for layer in range(max(0, n - 2))))[:n]
            config = replace(config, n_layers=n, ratios=ratios)
        elif field in _FIELDS:
            changed: dict[str, Any] = {field: int(value)}
            config = replace(config, **changed)
        else:
            raise ModelError(f"{spec}: no option {field!r}; there are {', '.join((*_FIELDS, 'layers'))}, page_tokens")
    if config.vocab < _FIRST_WORD:
        raise ModelError(f"{spec}: the vocabulary must hold at least {_FIRST_WORD} tokens")
    try:
        layout = config.layout()
        if page_tokens:
            layout = replace(layout, page_tokens=page_tokens)
    except FormatError as error:
        raise ModelError(f"{spec}: {error}") from error
    family = blake3(b"kvdb synthetic\0" + layout.to_bytes()).digest()
    return SyntheticInfo(
        name=name or rest,
        path=Path(rest),
        config=config,
        layout=layout,
        fingerprint=blake3(b"kvdb model\0" + family).digest(),
        family=family,
        kinds={},
        verify=verify,
    )


def _base(name: str) -> ModelConfig:
    if name == "dsv4-flash":
        return FLASH
    if name == "dsv4-nano":
        where = Path(__file__).parent / "models" / "dsv4_nano" / "config.json"
        return configs.from_hf(json.loads(where.read_text(encoding="utf-8")), name)
    raise ModelError(f"{PREFIX}{name} is unknown; there are {PREFIX}dsv4-flash and {PREFIX}dsv4-nano")


class SyntheticTokenizer(Tokenizer):
    """Ids to bytes and back by arithmetic.

    Ids in order: the control strings, the 256 bytes, then words: a space and five of the letters a to p, which spell
    the id in base 16. Six bytes a token is a little more than the four of English text.
    """

    def __init__(self, n_tokens: int) -> None:
        """n_tokens: size of the vocabulary."""
        self.specials = {text: token for token, text in enumerate(CONTROL_STRINGS)}
        self.n_tokens = n_tokens
        self._control = re.compile(f"({'|'.join(map(re.escape, CONTROL_STRINGS))})")
        self._control_bytes = [text.encode() for text in CONTROL_STRINGS]
        self.bos_id, self.eos_id, self.user, self.assistant, self.think, self.think_end, self.dsml = range(_N_CONTROL)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.uint16]:
        lengths = np.full(self.n_tokens + 1, 6, np.uint16)
        lengths[:_FIRST_WORD] = [len(self.token_bytes(token)) for token in range(_FIRST_WORD)]
        lengths[-1] = 0
        return lengths

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text: words that are one token's, else byte by byte."""
        if not special:
            return self._plain_ids(text)
        ids: list[int] = []
        for piece, token in self.split_control(text):
            ids += self._plain_ids(piece) if token is None else [token]
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        data = text.encode("utf-8", "surrogatepass")
        ids: list[int] = []
        at = 0
        for found in _WORD.finditer(data):
            token = 0
            for letter in found.group()[1:]:
                token = token << 4 | letter - _LETTERS[0]
            if _FIRST_WORD <= token < self.n_tokens:
                ids.extend(byte + _N_CONTROL for byte in data[at : found.start()])
                ids.append(token)
                at = found.end()
        ids.extend(byte + _N_CONTROL for byte in data[at:])
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for; empty outside the vocabulary."""
        if not 0 <= token < self.n_tokens:
            return b""
        if token < _N_CONTROL:
            return self._control_bytes[token]
        if token < _FIRST_WORD:
            return bytes((token - _N_CONTROL,))
        return b" " + bytes(_LETTERS[token >> shift & 15] for shift in (16, 12, 8, 4, 0))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a run of ids."""
        return b"".join(map(self.token_bytes, ids))
