"""The three layers of compression in one table: what each saves, here and at full size, and what it costs.

architecture    a row for 4 or 128 tokens, and an index row, instead of a row a token in every layer
precision       rows in FP8 and FP4 instead of bf16
weights         the asymmetric recipe (kvdb_engine/recipe.py) instead of 16 bits

The built-in model is measured: bytes of packed pages and of converted files, and its next-token distributions over
held-out text. The full geometry is computed from its layout and recipe.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kvdb_engine import backend
from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.config import ModelConfig
from kvdb_engine.convert import convert
from kvdb_engine.engine import Engine
from kvdb_engine.model import Model, load_weights
from kvdb_engine.recipe import Recipe, plain_size, recipe_size
from kvdb_engine.synthetic_model import FLASH
from kvdb_protocol.layout import row_bytes
from kvdb_tools.bench.compression_quality import Quality, compare, sequences, texts
from kvdb_tools.bench.scenario import Cell, Result, Settings

BF16_BYTES = 2
EIGHT = Recipe((8, 64), (8, 64), (8, 64), (8, 64))
COLUMNS = (
    *("", "measured", "ratio", "full geometry", "its ratio"),
    *("KL nats", "KL, unrounded", "same best %", "best, unrounded", "bits/byte", "bits, unrounded"),
)
_GB = 1e9


def run(settings: Settings) -> Result:
    """Convert the model three ways, compare all of them over the held-out text, and put the table together."""
    info = open_model(settings.model)
    n_texts, length, calibration = (2, 256, 1) if settings.quick else (14, 2048, 14)
    folders: dict[str, tuple[Path, int]] = {"16 bits": (info.path, _file_bytes(info.path))}
    for name, recipe, text in (
        ("8 bits", EIGHT, ""),
        ("the recipe", Recipe(), ""),
        ("the recipe, calibrated", Recipe(), "\n".join(texts("calibration")[:calibration])),
    ):
        settings.say(f"converting: {name}")
        folder = settings.scratch / name.replace(" ", "-")
        reports = convert(str(info.path), folder, recipe, calibration=text)
        folders[name] = folder, sum(report.bytes for report in reports)
    settings.say(f"comparing {2 * len(folders)} models over {n_texts} stretches of at most {length:,} tokens")
    stretches = sequences(info.tokenizer, n_texts, length)
    models = {}
    for name, (folder, _) in folders.items():
        models[name, True], models[name, False] = _models(open_model(str(folder)))
    by_name = {f"{name} {rounded}": model for (name, rounded), model in models.items()}
    found = compare(models["16 bits", False], by_name, info.tokenizer, stretches)
    quality = {name: (found[f"{name} True"], found[f"{name} False"]) for name in folders}
    packed = packed_bytes(info, 1024 if settings.quick else 8192)
    return make_result(info.config, packed, {name: size for name, (_, size) in folders.items()}, quality)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _models(info: ModelInfo) -> tuple[Model, Model]:
    """With rows rounded, and not; the weights are shared."""
    ops = backend.select()
    weights = load_weights(ops, info.config, info.open_weights())
    rounded = replace(info.config, kv_rounding=True)
    return Model(ops, rounded, weights), Model(ops, rounded.without_rounding(), weights)


def packed_bytes(info: ModelInfo, n_tokens: int) -> float:
    """Bytes a token of the rows in full pages, packed as they are stored."""
    engine = Engine(info)
    state = engine.new_state()
    ids = np.random.default_rng(1).integers(7, info.config.vocab, n_tokens).astype(np.uint32)
    for _ in engine.prefill(state, ids):
        pass
    n_pages = info.layout.n_pages(n_tokens)
    size = sum(
        len(bytes(piece))
        for page in range(n_pages)
        for section in engine.page_sections(state, page)
        for piece in [section.data]
    )
    return size / (n_pages * info.layout.page_tokens)


def row_bytes_a_token(config: ModelConfig) -> tuple[float, float, float]:
    """Bytes a token: a bf16 row in every layer; compressed and index rows in bf16; the same as they are packed."""
    layout = config.layout()
    plain = BF16_BYTES * config.head_dim * config.n_layers
    rows = [(section, layout.ratios[section.layer]) for section in layout.streams]
    halves = sum(BF16_BYTES * section.width / ratio for section, ratio in rows)
    packed = sum(row_bytes(section.codec, section.width, layout.rope_dim) / ratio for section, ratio in rows)
    return float(plain), halves, packed


def make_result(
    config: ModelConfig, packed: float, sizes: dict[str, int], quality: dict[str, tuple[Quality, Quality]]
) -> Result:
    """The table. packed: measured bytes a token; sizes: of each form of the weights; quality: rounding on and off."""
    result = Result("Compression: what it saves and what it costs", COLUMNS)
    plain, halves, computed = row_bytes_a_token(config)
    flash_plain, flash_halves, flash_packed = row_bytes_a_token(FLASH)

    def costs(pair: tuple[Quality, Quality]) -> list[Cell]:
        on, off = pair
        return [
            *(round(on.mean_kl, 4), round(off.mean_kl, 4)),
            *(round(100 * on.agreement, 2), round(100 * off.agreement, 2)),
            *(f"{on.bits_per_byte:.4f}", f"{off.bits_per_byte:.4f}"),
        ]

    nothing: list[Cell] = [None] * 6
    result.rows = [
        ["a bf16 row a token and layer, B/token", plain, 1.0, flash_plain, 1.0, *nothing],
        [
            "architecture: compressed rows, bf16",
            halves,
            plain / halves,
            flash_halves,
            flash_plain / flash_halves,
            *nothing,
        ],
        [
            "precision: FP8 and FP4, packed",
            packed,
            halves / packed,
            flash_packed,
            flash_halves / flash_packed,
            *nothing,
        ],
        ["rows, stacked", packed, plain / packed, flash_packed, flash_plain / flash_packed, *costs(quality["16 bits"])],
    ]
    flash_sizes = {
        "16 bits": plain_size(FLASH),
        "8 bits": sum(report.bytes for report in recipe_size(FLASH, EIGHT)),
        "the recipe": sum(report.bytes for report in recipe_size(FLASH)),
    }
    flash_sizes["the recipe, calibrated"] = flash_sizes["the recipe"]
    for name, size in sizes.items():
        flash = flash_sizes[name]
        result.rows.append(
            [
                *(
                    f"weights: {name}, GB",
                    size / _GB,
                    sizes["16 bits"] / size,
                    flash / _GB,
                    flash_sizes["16 bits"] / flash,
                ),
                *costs(quality[name]),
            ]
        )
    before, after = (
        _whole(config, size, row) for size, row in ((sizes["16 bits"], plain), (sizes["the recipe"], packed))
    )
    flash_before, flash_after = (
        _whole(FLASH, flash_sizes[name], row) for name, row in (("16 bits", flash_plain), ("the recipe", flash_packed))
    )
    best = quality["the recipe, calibrated"]
    result.rows.append(
        [
            *("weights and a full context, stacked, GB", after / _GB, before / after, flash_after / _GB),
            *(flash_before / flash_after, *costs(best)),
        ]
    )
    on, off = quality["16 bits"]
    result.notes += [
        f"measured on a model of {config.n_layers} layers; full geometry: {FLASH.n_layers} layers, computed. Ratios "
        "are to the line above for rows, to 16 bits for weights, to a bf16 row a token and 16 bits where stacked",
        "one shared row is key and value of all heads; a cache of every head's own key and value would take "
        f"{2 * config.n_heads} and {2 * FLASH.n_heads} times the first line",
        f"quality over {on.positions:,} tokens of held-out text, against 16 bits without rounding: KL of the next "
        f"token's distribution, positions with the same most likely token; a full context is {config.context:,} and "
        f"{FLASH.context:,} tokens; the fixed part of a state (windows, frontiers) is not in the table",
    ]
    plain_recipe, fitted, eight = (quality[name] for name in ("the recipe", "the recipe, calibrated", "8 bits"))
    result.claims += [
        ("pages hold exactly the bytes that the layout says", abs(packed - computed) < 1e-6),
        (
            "the full model in the recipe is about 81 GB, in units of 2^30",
            round(flash_sizes["the recipe"] / 2**30) == 81,
        ),
        (
            "rounding rows costs less than 0.02 nats and 3 % of the best tokens",
            on.mean_kl < 0.02 and on.agreement > 0.97,
        ),
        ("8 bits cost less than 0.01 nats", eight[1].mean_kl < 0.01),
        (
            "calibration lessens what the recipe costs",
            all(a.mean_kl < b.mean_kl for a, b in zip(fitted, plain_recipe, strict=True)),
        ),
        ("the reference is itself", off.kl == 0.0),
    ]
    return result


def _whole(config: ModelConfig, weights: int, row: float) -> float:
    """Bytes of the weights and of the rows of one full context."""
    return weights + row * config.context
