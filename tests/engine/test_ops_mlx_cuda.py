# ruff: noqa: E402 - the module is skipped before it imports what needs a compiler
"""The CUDA kernels against the op-level forms they replace: on a GPU if there is one, else emulated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
ON_GPU = hasattr(mx, "cuda") and mx.cuda.is_available()
if shutil.which("g++") is None and not ON_GPU:
    pytest.skip("needs a CUDA GPU, or g++ to emulate one", allow_module_level=True)

from kvdb_engine import backend
from kvdb_engine.engine import Engine
from kvdb_engine.model import Model, empty_layers, load_weights
from kvdb_engine.ops import ExpertWeights
from kvdb_engine.ops_mlx import MlxOps
from kvdb_engine.ops_mlx_cuda import TILE, Fused, Kernels, Quantised
from kvdb_engine.ops_numpy import NumpyOps
from kvdb_engine.state import State
from kvdb_engine.synthetic_model import FLASH
from kvdb_engine.weights import BlockFloats
from kvdb_engine.weights_random import random_model
from tests.engine.cuda_emulation import EmulatedKernels, build

# Emulated, a warp's matrix products take seconds.
slow = pytest.mark.slow if not ON_GPU else pytest.mark.filterwarnings("default")

RNG = np.random.default_rng(4)
# As small as the kernels' limits allow, with every kind of layer.
SMALL = replace(
    FLASH,
    vocab=512,
    hidden=512,
    n_layers=4,
    n_heads=4,
    head_dim=128,
    rope_dim=64,
    q_rank=512,
    o_rank=256,
    o_groups=2,
    ratios=(0, 4, 128, 4),
    index_heads=4,
    index_dim=64,
    index_topk=4,
    n_experts=4,
    experts_per_token=2,
    expert_width=512,
    n_hash_layers=1,
    context=4096,
)


class CountedKernels(Kernels):
    """Kernels on the GPU. calls: how often each ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def launch(self, name: str, *arguments: Any) -> list[Any]:
        self.calls[name] = self.calls.get(name, 0) + 1
        return super().launch(name, *arguments)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels | CountedKernels:
    return CountedKernels() if ON_GPU else EmulatedKernels(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture(scope="module")
def plain() -> MlxOps:
    """Op by op, on the same device."""
    ops = backend.select("mlx" if ON_GPU else "mlx-cpu")
    assert isinstance(ops, MlxOps)
    ops.fused, ops.fuses_attention = None, False
    return ops


@pytest.fixture(scope="module")
def fused(kernels: EmulatedKernels | CountedKernels, plain: MlxOps) -> MlxOps:
    return MlxOps(cpu=not ON_GPU, launcher=kernels)


def f32(*shape: int) -> Any:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


def gap(a: Any, b: Any) -> float:
    return float(np.abs(np.array(a.astype(mx.float32)) - np.array(b.astype(mx.float32))).max())


def quantised(out: tuple[int, ...], inner: int, bits: int, group: int, kind: Any) -> Quantised:
    """kind: of scales and biases; "mxfp" for small floats with E8M0 scales."""
    words = mx.array(RNG.integers(0, 1 << 32, (*out, inner * bits // 32), dtype=np.uint64).astype(np.uint32))
    if kind == "mxfp":
        if bits == 8:
            words = mx.where((words & 0x7F7F7F7F) == words, words, words & 0xBFBFBFBF)  # no NaN code
        powers = mx.array(RNG.integers(118, 123, (*out, inner // 32)).astype(np.uint8))
        return Quantised(words, powers, None, 32, bits, mx.bfloat16, f"mxfp{bits}")
    scale = (f32(*out, inner // group) / (8 << bits)).astype(kind)
    return Quantised(words, scale, (scale.astype(mx.float32) * -(2 ** (bits - 1))).astype(kind), group, bits, kind)


def wide(weight: Quantised) -> Any:
    if weight.biases is None:
        return mx.array(BlockFloats(np.array(weight.codes), np.array(weight.scales), weight.bits).dense())
    parts = (weight.codes, weight.scales.astype(mx.float32), weight.biases.astype(mx.float32))
    return mx.dequantize(*parts, **weight.form)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16, "mxfp"])
def test_products_of_one_token(fused: MlxOps, kind: Any) -> None:
    x = f32(1, 1024)
    pair = (quantised((24,), 1024, 8, 64, kind), quantised((40,), 1024, 8, 64, kind))
    for weights in (pair, pair[:1]):
        found = fused.fused_linears(weights, x)
        assert found is not None
        for weight, result in zip(weights, found, strict=True):
            wanted = x @ wide(weight).T
            assert gap(result, wanted) < 1e-5 * max(10.0, float(mx.abs(wanted).max()))
    groups = quantised((2, 16), 512, 8, 64, kind)
    both = f32(1, 2, 512)
    wanted = mx.einsum("tgi,goi->tgo", both, wide(groups))
    assert gap(fused.grouped_linear(groups, both), wanted) < 1e-5 * max(10.0, float(mx.abs(wanted).max()))
    matrices = [f32(rows, 1024).astype(mx.bfloat16) for rows in (8, 16, 24, 8, 64)]
    for count in (1, 2, 4, 5):
        found = fused.fused_linears(matrices[:count], x)
        assert found is not None and len(found) == count
        for weight, result in zip(matrices, found, strict=False):
            assert gap(result, x @ weight.astype(mx.float32).T) < 1e-4


def test_products_outside_the_limits_go_op_by_op(fused: MlxOps) -> None:
    narrow = quantised((24,), 256, 8, 64, mx.bfloat16)
    assert fused.fused_linears((narrow,), f32(1, 256)) is None
    assert fused.fused_linears((quantised((24,), 512, 8, 64, mx.float32),), f32(1, 512)) is None
    assert fused.fused_linears((quantised((24,), 512, 8, 64, mx.bfloat16),), f32(2, 512)) is None
    x = f32(1, 256)
    assert gap(fused.linear(narrow, x), x @ wide(narrow).T) < 0.05


def test_mixing_of_streams(fused: MlxOps, plain: MlxOps) -> None:
    from kvdb_engine.hyper import HyperWeights, join_streams, split_streams

    dim = 96
    weights = HyperWeights(f32(24, 4 * dim) / 10, (0.7, 0.9, 1.3), f32(24))
    norm = f32(dim)
    for n_tokens in (1, 3):
        streams = f32(n_tokens, 4, dim)
        x, post, comb = split_streams(plain, weights, streams, iterations=20, hc_eps=1e-6, norm_eps=1e-6)
        found = fused.fused_split(weights, streams, norm, 20, 1e-6, 1e-6)
        assert found is not None
        for ours, theirs in zip(found, (plain.norm(x, norm, 1e-6), post, comb), strict=True):
            assert gap(ours, theirs) < 1e-5
        a, b = f32(n_tokens, dim), f32(n_tokens, dim)
        assert gap(fused.fused_join(streams, (a,), post, comb), join_streams(streams, a, post, comb)) < 1e-5
        assert gap(fused.fused_join(streams, (a, b), post, comb), join_streams(streams, a + b, post, comb)) < 1e-5


def test_rows(fused: MlxOps, plain: MlxOps) -> None:
    for n_tokens, heads, dim, pairs in ((1, 1, 128, 32), (5, 3, 192, 32), (2, 2, 48, 8)):
        x, weight = f32(n_tokens, heads, dim) * 3, f32(dim)
        table = (f32(n_tokens, pairs), f32(n_tokens, pairs))
        turned = plain.rotate(plain.norm(x, weight, 1e-6), table) * 0.25
        found = fused.fused_rows(x, table, norm=True, weight=weight, eps=1e-6, scale=0.25)
        assert gap(found, turned) < 1e-5
        assert gap(fused.fused_rows(x, table, inverse=True), plain.rotate(x, table, inverse=True)) < 1e-5
        # Rounding is compared on equal inputs: without a norm both sides see the same bits but for RoPE's products.
        still = (mx.ones((n_tokens, pairs)), mx.zeros((n_tokens, pairs)))
        rounded = fused.fused_rows(x, still, kv=True)
        assert np.array_equal(np.array(rounded), NumpyOps().round_kv(np.array(x), 2 * pairs))
        flat, older = x[:, 0], f32(7, dim).astype(mx.float16)
        after = fused.fused_rows(flat, still, older=older, kv=True)
        assert np.array_equal(np.array(after[:7]), np.array(older)) and np.array_equal(
            np.array(after[7:]), NumpyOps().round_kv(np.array(flat), 2 * pairs)
        )
    x, still = f32(4, 2, 128), (mx.ones((4, 32)), mx.zeros((4, 32)))
    ours, theirs = fused.fused_rows(x, still, index=True), plain.round_index(x)
    assert np.mean(np.array(ours) != np.array(theirs)) < 1e-2
    assert fused.fused_rows(flat, still, older=f32(7, 48), kv=True) is None  # f32 rows do not go before f16 ones
    halved = fused.fused_rows(x, still, index=True, half=True)
    assert np.array_equal(np.array(halved), np.array(plain.round_f16(ours)))


@pytest.mark.parametrize("ratio", [4, 128])
def test_compressor(fused: MlxOps, plain: MlxOps, ratio: int) -> None:
    from kvdb_engine.compressor import CompressorState, CompressorWeights, Geometry, compress

    width, hidden = 32, 16
    columns = width * (2 if ratio == 4 else 1)
    weights = CompressorWeights(f32(columns, hidden), f32(columns, hidden), f32(ratio, columns), f32(width))
    states = []
    for ops in (plain, fused):
        nothing = mx.zeros((0, columns))
        state = CompressorState(ops.no_rows(width, False), nothing, nothing)
        x = mx.array(np.random.default_rng(1).standard_normal((2 * ratio + 3, hidden)).astype(np.float32))
        for token in range(x.shape[0]):
            row = x[token : token + 1]
            state = compress(ops, weights, Geometry(ratio, width, 1e-6), state, row, token, lambda rows, first: rows)
        states.append(state)
    one, two = states
    assert one.rows.n_rows == two.rows.n_rows == 2
    assert gap(plain.view(one.rows), plain.view(two.rows)) < 1e-5
    assert gap(one.open_kv, two.open_kv) < 1e-5 and gap(one.open_score, two.open_score) < 1e-5


def test_selection(fused: MlxOps, plain: MlxOps) -> None:
    for n, count in ((40, 6), (1500, 40), (300, 300), (2500, 1)):
        for levels in (2, 1000):
            scores = (RNG.integers(-levels, levels, (2, n)) / 7).astype(np.float32)
            scores[:, 5], scores[:, 9] = -0.0, -1e30
            found, wanted = (np.array(ops.top_rows(mx.array(scores), count)) for ops in (fused, plain))
            assert np.array_equal(found, wanted), (n, count, levels)


def test_index_scores(fused: MlxOps) -> None:
    for heads, dim, n in ((3, 64, 5), (2, 128, 130), (4, 36, 64)):
        queries, share, rows = f32(1, heads, dim), f32(1, heads), f32(n, dim).astype(mx.float16)
        wanted = share @ mx.maximum(queries[0] @ rows.astype(mx.float32).T, 0.0)
        assert gap(fused.fused_scores(queries, share, rows), wanted) < 1e-3
    assert fused.fused_scores(f32(2, 3, 64), f32(2, 3), f32(5, 64).astype(mx.float16)) is None
    assert fused.fused_scores(f32(1, 3, 64), f32(1, 3), f32(5, 64)) is None


@pytest.mark.parametrize("case", ["bias", "no bias", "given"])
def test_routing(fused: MlxOps, plain: MlxOps, case: str) -> None:
    logits = mx.array((RNG.integers(-30, 30, (5, 72)) / 8).astype(np.float32))  # many ties
    bias = f32(72) if case == "bias" else None
    given = mx.array(RNG.integers(0, 72, (5, 6)).astype(np.int32)) if case == "given" else None
    found = fused.fused_route(logits, bias, given, 6, 2.0**-14, 1.5)
    assert found is not None
    scores = plain.router_scores(logits)
    chosen = given if given is not None else plain.top_experts(scores if bias is None else scores + bias, 6)
    share = plain.take_columns(scores, chosen)
    share = share / share.sum(-1)[:, None] * 1.5
    assert gap(found[1], share) < 1e-5
    if case != "bias" or len({tuple(row) for row in np.array(chosen)}) > 1:
        assert np.array_equal(np.array(found[0]), np.array(chosen))


def reference(weights: ExpertWeights, x: Any, ids: Any, share: Any, limit: float) -> np.ndarray:
    gate, up, down = (np.array(wide(part)).astype(np.float64) for part in (weights.gate, weights.up, weights.down))
    x, ids, share = np.array(x).astype(np.float64), np.array(ids), np.array(share)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e, s in zip(ids[t], share[t], strict=True):
            g, u = np.minimum(gate[e] @ x[t], limit), np.clip(up[e] @ x[t], -limit, limit)
            out[t] += down[e] @ (g / (1 + np.exp(-g)) * u * s)
    return out


@pytest.mark.parametrize(("n_tokens", "spread"), [(1, 5), (3, 5), pytest.param(66, 2, marks=slow)])
@pytest.mark.parametrize(
    ("kind", "bits"), [(mx.bfloat16, 2), (mx.float16, 2), (mx.bfloat16, 4), (mx.float16, 4), ("mxfp", 4)]
)
def test_experts(
    fused: MlxOps,
    plain: MlxOps,
    kernels: EmulatedKernels | CountedKernels,
    n_tokens: int,
    spread: int,
    kind: Any,
    bits: int,
) -> None:
    """One token, few, and one expert with more rows than a tile. Expert 4 or more may have none at all."""
    if n_tokens > 1 and (kind == mx.float16 or (n_tokens > 3 and bits == 4)):
        pytest.skip("the same code as bf16 or two bits, and slow where it is emulated")
    hidden, width = (512, 512) if n_tokens == 1 else (256, 128)
    weights = ExpertWeights(
        quantised((5, width), hidden, bits, 128 if bits == 2 else 32, kind),
        quantised((5, width), hidden, bits, 128 if bits == 2 else 32, kind),
        quantised((5, hidden), width, bits, 64 if bits == 2 else 32, kind),
    )
    x, share = f32(n_tokens, hidden), mx.abs(f32(n_tokens, 2))
    ids = mx.array(np.stack([RNG.permutation(spread)[:2] for _ in range(n_tokens)]).astype(np.int32))
    before = kernels.calls.get("kvdb_experts_up_tiles", 0)
    found = np.array(fused.experts(weights, x, ids, share, 1.5))
    assert kernels.calls.get("kvdb_experts_up_tiles", 0) == before + (n_tokens > 1)
    wanted = reference(weights, x, ids, share, 1.5)
    # Many tokens multiply in bf16, one token in float32.
    assert np.abs(found - wanted).max() < (0.02 if n_tokens > 1 else 1e-4) * np.abs(wanted).max()
    # MLX on processors adds up in bf16.
    op_by_op = np.array(plain.experts(weights, x, ids, share, 1.5))
    assert np.abs(op_by_op - wanted).max() < 0.1 * np.abs(wanted).max()


def test_tiles_hold_every_entry_once(kernels: EmulatedKernels | CountedKernels) -> None:
    ids = RNG.integers(0, 7, (90, 3)).astype(np.int32)
    ids[ids == 5] = 2
    n_tiles = ids.size // TILE + 7
    owner, entries = kernels.launch(
        "kvdb_experts_plan",
        [mx.array(ids)],
        [((n_tiles,), mx.int32), ((n_tiles, TILE), mx.int32)],
        [ids.size, 7, n_tiles],
        (7, 1),
        256,
        28,
    )
    owner, entries = np.array(owner), np.array(entries)
    assert sorted(entries[entries >= 0]) == list(range(ids.size))
    for tile, held in zip(owner, entries, strict=True):
        held = held[held >= 0]
        assert (tile < 0) == (len(held) == 0) and np.all(ids.ravel()[held] == tile) and np.all(np.diff(held) > 0)


def test_attention_of_one_token(fused: MlxOps, plain: MlxOps) -> None:
    heads, dim, pairs = 3, 256, 32
    for n_near, n_far, pick in ((1, 0, False), (20, 0, False), (128, 9, False), (40, 60, True)):
        q, sinks = f32(1, heads, dim) / 16, f32(heads)
        near, far = f32(n_near, dim).astype(mx.float16), f32(max(n_far, 1), dim).astype(mx.float16)
        table = (f32(1, pairs), f32(1, pairs))
        picked = mx.array(np.sort(RNG.permutation(60)[:33])[None].astype(np.int32)) if pick else None
        keys = near if not n_far else mx.concatenate([near, far if picked is None else far[picked[0]]])
        keys = keys.astype(mx.float32)
        scores = mx.concatenate([q[0] @ keys.T, sinks[:, None]], axis=1)
        wanted = plain.rotate((mx.softmax(scores, axis=-1)[:, :-1] @ keys)[None], table, inverse=True)
        found = fused.fused_attend(q, near, far if n_far else None, picked, sinks, table)
        assert gap(found, wanted) < 1e-5


@pytest.fixture(scope="module")
def engines(fused: MlxOps) -> tuple[Engine, Engine]:
    """The same random model op by op on numpy, and with the kernels."""
    info = random_model(SMALL)
    reference = Engine(info, backend_name="numpy")
    engine = Engine(info, backend_name="mlx" if ON_GPU else "mlx-cpu")
    engine.ops = fused
    engine.model = Model(fused, info.config, load_weights(fused, info.config, info.open_weights()))
    return reference, engine


@slow
def test_engine_with_all_kernels(
    engines: tuple[Engine, Engine],
    kernels: EmulatedKernels | CountedKernels,
    round_trip: Callable[[Engine, State], State],
    fingerprint_of: Callable[[Engine, State], bytes],
) -> None:
    """Decode over group borders, past the index top-k; near numpy, and bit-equal after restore and fork."""
    plain_engine, engine = engines
    ids = np.random.default_rng(3).integers(0, SMALL.vocab, 40).astype(np.uint32)
    states = []
    for each in (plain_engine, engine):
        state = State(each.ops, each.info.layout, empty_layers(each.ops, SMALL), np.zeros(0, np.uint32), None)
        for token in ids[:22]:
            each.step(state, int(token))
        states.append(state)
    ours, theirs = states[1].logits, states[0].logits
    assert np.corrcoef(ours, theirs)[0, 1] > 0.999
    wanted = ("gemv_bf16", "gemv_q8", "experts_up", "experts_down", "attend", "route", "top_rows", "rows", "hc_mix")
    assert {f"kvdb_{name}" for name in wanted} <= set(kernels.calls)
    live = states[1]
    restored, fork = round_trip(engine, live), live.clone()
    for token in ids[22:27]:
        for state in (live, restored, fork):
            engine.step(state, int(token))
    for _ in zip(*(engine.prefill(state, ids[27:40]) for state in (live, restored, fork)), strict=True):
        pass
    assert live.logits.tobytes() == restored.logits.tobytes() == fork.logits.tobytes()
    assert fingerprint_of(engine, live) == fingerprint_of(engine, restored) == fingerprint_of(engine, fork)


@pytest.mark.skipif(not ON_GPU, reason="an emulated kernel cannot be part of a compiled graph")
def test_compiled_steps_give_the_same_bits(fused: MlxOps, engines: tuple[Engine, Engine]) -> None:
    _, engine = engines
    ids = np.random.default_rng(3).integers(0, SMALL.vocab, 30).astype(np.uint32)
    found = []
    for compiles in (True, False):
        fused.compiles = compiles
        state = State(fused, engine.info.layout, empty_layers(fused, SMALL), np.zeros(0, np.uint32), None)
        for token in ids:
            engine.step(state, int(token))
            found.append(state.logits.tobytes())
    fused.compiles = True
    assert found[:30] == found[30:]


def test_random_weights_are_the_same_everywhere(plain: MlxOps) -> None:
    source = random_model(SMALL).open_weights()
    for name in ("layers.1.attn.wq_a", "layers.1.attn.compressor.wkv", "layers.0.ffn.gate", "norm"):
        tensor = source.find(name)
        assert tensor is not None
        made = tensor.on_device()  # type: ignore[attr-defined]
        values = wide(made) if isinstance(made, Quantised) else made
        assert gap(values, mx.array(tensor.dense())) < 1e-6
    dense = source.find("layers.0.attn.wq_b").dense()  # type: ignore[union-attr]
    assert abs(float(dense.std()) * 512**0.5 - 1) < 0.05 and abs(float(dense.mean())) < 1e-3
    assert source.find("layers.0.attn.compressor.wkv") is None and source.find("nonsense") is None


def test_a_source_that_does_not_compile_says_why() -> None:
    from kvdb_engine.errors import ModelError
    from kvdb_engine.ops_mlx_cuda import compile_source

    with pytest.raises(ModelError, match=r"libnvrtc is missing|do not compile"):
        compile_source(b"this is no CUDA", "sm_90")


def test_fused_needs_nothing_but_a_launcher(kernels: EmulatedKernels | CountedKernels) -> None:
    assert Fused(kernels).swiglu(f32(2, 3), f32(2, 3), 1.0).shape == (2, 3)
