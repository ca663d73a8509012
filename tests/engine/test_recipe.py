"""The recipe's size at DeepSeek V4 Flash's geometry, worked out here a second time, and as docs/engine.md states it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvdb_engine.config import from_hf
from kvdb_engine.recipe import ClassReport, Recipe, expert_way, recipe_size, tensor_shapes, way_of
from kvdb_engine.synthetic_model import FLASH as SYNTHETIC
from tests.engine.test_config import FLASH

C = from_hf(FLASH)
PAGE = Path(__file__).parents[2] / "docs" / "engine.md"
GiB = 2**30


def by_class(recipe: Recipe | None = None) -> dict[str, ClassReport]:
    return {report.name: report for report in recipe_size(C, recipe)}


def total(recipe: Recipe | None = None) -> int:
    return sum(report.bytes for report in recipe_size(C, recipe))


def ds4_bits() -> dict[str, float]:
    """Mean bits of each class in ds4's file: IQ2_XXS gate and up, Q2_K down, Q8_0, F16 and F32 (its layout's types)."""
    found: dict[str, list[float]] = {}
    for name, shape in tensor_shapes(C).items():
        weights = float(shape[0] * (shape[1] if len(shape) == 2 else 1))
        kind = "unquantised"
        bits = 32.0 if len(shape) == 1 or name.endswith("tid2eid") else 16.0
        if name == "head" or way_of(Recipe(), name, shape[-1], C.n_layers):
            kind = "embedding and head" if name in ("head", "embed") else "attention and shared expert"
            bits = 16.0 if name == "embed" else 8 * 34 / 32
        count = found.setdefault(kind, [0.0, 0.0])
        count[0] += weights
        count[1] += weights * bits
    return {
        "routed gate and up": 8 * 66 / 256,
        "routed down": 8 * 84 / 256,
        **{kind: bits / weights for kind, (weights, bits) in found.items()},
    }


def test_flash_has_284_g_weights_in_81_gib() -> None:
    reports = by_class()
    assert sum(report.weights for report in reports.values()) == pytest.approx(284.3e9, rel=1e-3)
    routed = C.n_layers * C.n_experts * C.expert_width * C.hidden
    assert reports["routed gate and up"].weights == 2 * routed and reports["routed down"].weights == routed
    assert reports["routed gate and up"].bits_per_weight == 2 + 32 / 128
    early = C.n_layers // 4
    down = (early * (2 + 32 / 64) + (C.n_layers - early) * (2 + 32 / 128)) / C.n_layers
    assert reports["routed down"].bits_per_weight == pytest.approx(down) and down > 2.25
    assert round(total() / GiB) == 81


def test_ds4s_file_of_81_gb_is_as_large() -> None:
    """ds4 says "about 81 GB" of its file; in its own types it is that in units of 2^30 bytes."""
    bits = ds4_bits()
    size = sum(report.weights * bits[name] / 8 for name, report in by_class().items())
    assert round(size / GiB) == 81 and total() / size == pytest.approx(1, abs=0.005)


def test_what_other_groups_would_cost() -> None:
    wide, narrow = Recipe(down=(2, 64)), Recipe(early_down=(2, 128))
    assert total(wide) / GiB == pytest.approx(83.0, abs=0.05)
    assert total(narrow) / GiB == pytest.approx(80.3, abs=0.05)
    assert expert_way(C, Recipe(), 9, "w2") == (2, 64) and expert_way(C, Recipe(), 10, "w2") == (2, 128)


def test_the_page_states_these_numbers() -> None:
    bits, rows = ds4_bits(), {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"[\d,]+", cells[1]):
            rows[cells[0]] = cells[1:]
    reports = by_class()
    all_of_it = ClassReport("all", sum(r.weights for r in reports.values()), total())
    theirs = sum(report.weights * bits[name] / 8 for name, report in reports.items())
    for name, report in {**reports, "all": all_of_it}.items():
        size = theirs if name == "all" else report.weights * bits[name] / 8
        assert rows.pop(name) == [
            f"{report.weights:,}",
            f"{report.bits_per_weight:.3f}",
            f"{report.bytes / GiB:.2f}",
            f"{8 * size / report.weights:.3f}",
            f"{size / GiB:.2f}",
        ]
    assert not rows


def test_the_built_in_geometry_is_the_same() -> None:
    assert recipe_size(SYNTHETIC) == recipe_size(C)
