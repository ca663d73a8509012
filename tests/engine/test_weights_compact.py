"""Weights that are stored small stay small where a GPU multiplies with them, and mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.config import ModelConfig, from_hf
from kvdb_engine.engine import Engine
from kvdb_engine.model import load_weights, nbytes
from kvdb_engine.packing import E2M1, E4M3
from kvdb_engine.weights import (
    AffineTensor,
    BlockFloats,
    CompactTensor,
    Halves,
    HostTensor,
    StackedTensor,
    compact,
    regroup,
)
from kvdb_engine.weights_gguf import _affine_q4_k
from kvdb_engine.weights_safetensors import Entry, SafetensorsSource, ScaledTensor
from tests.engine.checkpoints import CONFIG, stored, weights, write_folder
from tests.engine.test_weights_safetensors import official

mx = pytest.importorskip("mlx.core")
from kvdb_engine.ops_mlx import MlxOps  # noqa: E402
from kvdb_engine.ops_mlx_cuda import Quantised  # noqa: E402

RNG = np.random.default_rng(8)
# Wide enough that matrices outweigh what stays float32.
WIDE = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 8, "q_lora_rank": 128, "vocab_size": 512}


class NoKernels:
    """Makes MlxOps load weights as on a GPU; nothing is computed with them here."""

    def launch(self, *arguments: Any) -> list[Any]:
        raise AssertionError


@pytest.fixture(scope="module")
def gpu_like() -> MlxOps:
    return MlxOps(cpu=True, launcher=NoKernels())  # type: ignore[arg-type]


def codes(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def fp8(out: int, inner: int) -> ScaledTensor:
    values = codes(out, inner)
    values[(values & 0x7F) == 0x7F] = 0  # NaN
    scale = RNG.integers(115, 125, (-(-out // 128), -(-inner // 128))).astype(np.uint8)
    return ScaledTensor(Entry("F8_E4M3", values.shape, values), Entry("F8_E8M0", scale.shape, scale))


def fp4(out: int, inner: int) -> ScaledTensor:
    values, scale = codes(out, inner // 2), RNG.integers(115, 125, (out, inner // 32)).astype(np.uint8)
    return ScaledTensor(Entry("I8", values.shape, values.view(np.int8)), Entry("F8_E8M0", scale.shape, scale))


def dequantised(weight: Quantised) -> np.ndarray:
    made = mx.dequantize(weight.codes, weight.scales, weight.biases, **weight.form)
    return np.array(made.astype(mx.float32))


@pytest.mark.parametrize("make", [fp8, fp4])
def test_small_floats_become_mlx_floats_bit_by_bit(gpu_like: MlxOps, make: Any) -> None:
    tensor = make(256, 192)
    weight = gpu_like.weight(tensor)
    assert isinstance(weight, Quantised) and weight.mode == ("mxfp8" if make is fp8 else "mxfp4")
    assert np.array_equal(dequantised(weight), tensor.dense())
    assert nbytes(weight) <= 1.07 * (tensor.entry.values.nbytes + tensor.scale.values.nbytes)
    apart = regroup(tensor, 2, 128)
    assert isinstance(apart, CompactTensor) and apart.shape == (2, 128, 192)
    assert np.array_equal(apart.dense(), tensor.dense().reshape(2, 128, 192))
    assert np.array_equal(apart.matrix(1), tensor.dense()[128:])
    stacked = StackedTensor((tensor, make(256, 192)))
    assert np.array_equal(dequantised(gpu_like.weight(stacked)), stacked.dense())


def test_what_has_no_mlx_form_is_expanded(gpu_like: MlxOps) -> None:
    tensor = fp8(128, 64)
    odd = ScaledTensor(tensor.entry, Entry("F32", (1, 1), np.array([[0.3]], np.float32)))
    assert odd.compact() is None and gpu_like.weight(odd).dtype == mx.float32
    assert fp8(16, 48).compact() is None  # 48 inputs are no whole groups
    assert StackedTensor((fp8(32, 32), fp4(32, 32))).compact() is None
    assert compact(HostTensor(np.zeros((2, 2), np.float32))) is None


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_halves_stay_halves(gpu_like: MlxOps, kind: str) -> None:
    values = RNG.integers(0x3000, 0x3F00, (4, 8)).astype(np.uint16)
    entry = Entry(kind, values.shape, values if kind == "BF16" else values.view(np.float16))
    weight = gpu_like.weight(entry)
    assert weight.dtype == (mx.bfloat16 if kind == "BF16" else mx.float16)
    assert np.array_equal(np.array(weight.astype(mx.float32)), entry.dense())
    assert gpu_like.weight(entry, exact=True).dtype == mx.float32
    assert MlxOps(cpu=True).weight(entry).dtype == mx.float32  # a processor multiplies float32 fastest
    both = StackedTensor((entry, entry))
    assert isinstance(both.compact(), Halves) and np.array_equal(CompactTensor(both.compact()).dense(), both.dense())  # type: ignore[arg-type]
    assert regroup(entry, 2, 2).shape == (2, 2, 8)


def test_q4_k_fits_16_bit_scales(gpu_like: MlxOps) -> None:
    """Five bits a weight instead of 4.5; a value moves by less than 1 % of the step between two codes."""
    raw = RNG.integers(0, 256, (6, 2 * 144), dtype=np.uint8)
    for block in (0, 144):
        raw[:, block : block + 4] = np.array([0.013, 0.021], np.float16).view(np.uint8)
    wanted = _affine_q4_k(raw.reshape(-1), 512)
    weight = gpu_like.weight(AffineTensor(wanted))
    assert weight.kind == mx.float16 and nbytes(weight) <= 1.12 * raw.nbytes
    exact = Quantised(
        weight.codes, *(part.astype(mx.float32) for part in (weight.scales, weight.biases)), 32, 4, mx.float32
    )
    # Minima of real files lie within the 16 steps that the codes span.
    step = np.repeat(np.maximum(np.abs(wanted.scales), np.abs(wanted.biases) / 16), 32, axis=-1)
    assert (np.abs(dequantised(exact) - wanted.dense()) < 0.01 * step).all()


def wide_folder(folder: Path, layout: str) -> Path:
    """A model whose matrices are stored in one way; random codes."""
    config: ModelConfig = from_hf({**CONFIG, **WIDE})
    if layout == "bf16":
        return write_folder(folder, stored(weights(1, config), "BF16"), **WIDE)
    entries = stored(weights(1, config), "BF16")
    for name, (_, shape, _) in list(entries.items()):
        is_expert = ".experts." in name
        if len(shape) != 2 or not (is_expert or ".attn.w" in name or "shared_experts" in name):
            continue
        tensor = fp4(*shape) if is_expert else fp8(*shape)
        entries[name] = (tensor.entry.kind, tensor.entry.shape, tensor.entry.values.tobytes())
        entries[name.removesuffix(".weight") + ".scale"] = (
            "F8_E8M0",
            tensor.scale.shape,
            tensor.scale.values.tobytes(),
        )
    return write_folder(folder, entries, 2, **WIDE)


@pytest.mark.parametrize("layout", ["bf16", "official"])
def test_memory_after_load(gpu_like: MlxOps, tmp_path: Path, layout: str) -> None:
    """At most 1.3 times the files where a GPU computes; numpy takes four bytes a weight."""
    folder = wide_folder(tmp_path / "m", layout)
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    info = open_model(str(folder))
    loaded = nbytes(load_weights(gpu_like, info.config, info.open_weights()))
    assert loaded < 1.3 * files, f"{loaded / files:.2f}"
    engine = Engine(info, backend_name="numpy")
    assert engine.stats()["weight_bytes"] == nbytes(engine.model.weights) > 1.9 * files


def test_official_layout_computes_alike_everywhere(tmp_path: Path) -> None:
    entries, _ = official(weights())
    info = open_model(str(write_folder(tmp_path / "q", entries, 2)))
    source = info.open_weights()
    assert isinstance(source, SafetensorsSource)
    found = []
    for name in ("numpy", "mlx-cpu"):
        engine = Engine(info, backend_name=name)
        state = engine.new_state()
        for _ in engine.prefill(state, np.arange(90) % 64):
            pass
        engine.step(state, 7)
        found.append(state.logits)
    assert np.corrcoef(*found)[0, 1] > 0.999


def test_block_floats_by_hand() -> None:
    nibbles = np.arange(32, dtype=np.uint8) % 16
    packed = (nibbles[0::2] | nibbles[1::2] << 4)[None].view("<u4")
    found = BlockFloats(packed, np.array([[128]], np.uint8), 4).dense()
    assert np.array_equal(found[0], 2 * E2M1[nibbles])
    found = BlockFloats(nibbles[None].view("<u4"), np.array([[126]], np.uint8), 8).dense()
    assert np.array_equal(found[0], E4M3[nibbles] / 2)
