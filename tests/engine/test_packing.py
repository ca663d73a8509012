"""Packing loses no bit, or declines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvdb_engine.packing import (
    E2M1,
    E4M3,
    FP4_BLOCK,
    FP8_BLOCK,
    block_exponents,
    pack_rows,
    pack_section,
    power_of_two,
    unpack_rows,
    unpack_section,
)
from kvdb_engine.rounding import round_fp4, round_fp8, round_kv, widen
from kvdb_protocol.layout import Codec, Part, Section, row_bytes

WIDTH, ROPE = 192, 64


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def rows(seed: int, n: int = 5, width: int = WIDTH, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, width)) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("codec", [Codec.FP8_F16, Codec.FP8_F32])
def test_rounded_rows_pack_without_loss(codec: Codec, scale: float) -> None:
    x = widen(round_kv(rows(1, scale=scale), ROPE))
    data = pack_rows(codec, x, ROPE)
    assert data is not None and len(data) == len(x) * row_bytes(codec, WIDTH, ROPE)
    assert same(unpack_rows(codec, data, len(x), WIDTH, ROPE), x)


def test_index_rows_pack_without_loss() -> None:
    x = round_fp4(rows(2, width=128))
    data = pack_rows(Codec.FP4, x, 0)
    assert data is not None and len(data) == len(x) * 68
    assert same(unpack_rows(Codec.FP4, data, len(x), 128, 0), x)


def test_negative_zero_survives() -> None:
    x = np.zeros((2, WIDTH), np.float32)
    x[:, 3::7] = -0.0
    x[0, 0], x[1, 100] = 1.0, -2.0
    for codec in (Codec.FP8_F16, Codec.FP8_F32, Codec.F16, Codec.F32):
        data = pack_rows(codec, x, ROPE)
        assert data is not None and same(unpack_rows(codec, data, 2, WIDTH, ROPE), x)
    y = np.zeros((1, 64), np.float32)
    y[0, 5] = -0.0
    data = pack_rows(Codec.FP4, y, 0)
    assert data is not None and same(unpack_rows(Codec.FP4, data, 1, 64, 0), y)


@pytest.mark.parametrize("codec", [Codec.FP8_F16, Codec.FP8_F32, Codec.FP4, Codec.F16])
@pytest.mark.parametrize("value", [1.0001, float("inf"), float("nan")])
def test_what_does_not_fit_is_declined(codec: Codec, value: float) -> None:
    x = np.zeros((1, WIDTH), np.float32)
    x[0, 0], x[0, 1] = value, 3.0
    if codec is Codec.F16 and not np.isfinite(value):
        return  # f16 holds infinity and NaN
    assert pack_rows(codec, x, 0) is None


def test_sections_fall_back() -> None:
    fp8 = Section(0, Part.WINDOW, WIDTH, Codec.FP8_F16)
    fp4 = Section(0, Part.INDEX, 128, Codec.FP4)
    x = widen(round_kv(rows(3), ROPE))
    wide = x.copy()
    wide[0, -1] = 1.0001  # not f16
    ugly = x.copy()
    ugly[0, 0] = 1.0001  # not e4m3
    for section, values, codec in (
        (fp8, x, Codec.FP8_F16),
        (fp8, wide, Codec.FP8_F32),
        (fp8, ugly, Codec.F32),
        (fp4, rows(4, width=128), Codec.F32),
    ):
        packed = pack_section(section, values, ROPE)
        assert packed.codec is codec
        assert same(unpack_section(section, packed, len(values), ROPE), values)


def test_no_rows() -> None:
    nothing = np.zeros((0, WIDTH), np.float32)
    for codec in Codec:
        data = pack_rows(codec, nothing, ROPE)
        assert data == b"" and unpack_rows(codec, data, 0, WIDTH, ROPE).shape == (0, WIDTH)


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack_rows(Codec.F16, b"123", 1, 8, 0)


@pytest.mark.parametrize(("block", "limit", "floor"), [(FP8_BLOCK, 448.0, 1e-4), (FP4_BLOCK, 6.0, 7.052966e-38)])
def test_exponents_are_the_exact_ceiling(block: int, limit: float, floor: float) -> None:
    """Against rational arithmetic, at the borders where a float logarithm would be wrong."""
    from fractions import Fraction

    values = [limit * 2.0**k for k in range(-20, 20)]
    values += [np.nextafter(np.float32(v), np.float32(np.inf)) for v in values]
    values += [np.nextafter(np.float32(v), np.float32(0)) for v in values]
    values += [0.0, floor, 1e-30]
    for value in np.array(values, np.float32):
        x = np.zeros((1, block), np.float32)
        x[0, 1] = -value
        (k,) = block_exponents(x, block)[0]
        amax = Fraction(float(max(value, np.float32(floor))))
        assert Fraction(2) ** int(k) * Fraction(limit) >= amax > Fraction(2) ** (int(k) - 1) * Fraction(limit)
        assert float(power_of_two(np.array([k], np.int32))[0]) == 2.0 ** int(k)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (2, 64), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_rounding_finds_the_nearest_code(x: np.ndarray) -> None:
    """Rounded values are codes, none is nearer, and rounding twice changes nothing."""
    x = np.clip(x, -1e30, 1e30)
    for function, block, table in ((round_fp8, FP8_BLOCK, E4M3), (round_fp4, FP4_BLOCK, E2M1)):
        y = function(x)
        scale = power_of_two(block_exponents(x, block)).astype(np.float64)
        v = (x.astype(np.float64).reshape(2, -1, block) / scale[..., None]).ravel()
        w = (y.astype(np.float64).reshape(2, -1, block) / scale[..., None]).ravel()
        codes = np.unique(table[np.abs(table) <= (448 if block == FP8_BLOCK else 6)].astype(np.float64))
        assert np.isin(w, codes).all()
        nearest = np.abs(codes[None] - v[:, None]).min(axis=1)
        assert (np.abs(w - v) <= nearest * (1 + 1e-6) + 1e-300).all()
        assert same(function(y), y)


def test_ties_go_to_the_even_code() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    assert round_fp4(x)[0, :8].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]
    y = np.zeros((1, 64), np.float32)
    y[0, :5] = [448, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10]
    assert round_fp8(y)[0, :5].tolist() == [448, 1.0, 1.25, 0, 2 * 2.0**-9]


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.uint32, (3, 64), elements=st.integers(0, 2**32 - 1)),
    st.sampled_from([Codec.FP8_F16, Codec.FP8_F32, Codec.FP4, Codec.F16]),
)
def test_any_bits_survive_a_section(bits: np.ndarray, codec: Codec) -> None:
    x = bits.view(np.float32)
    packed = pack_section(Section(0, Part.INDEX, 64, codec), x, 0)
    assert same(unpack_section(Section(0, Part.INDEX, 64, codec), packed, 3, 0), x)
