"""Loader matrix: every layout of weights loads, and computes what its stored values mean.

One set of random weights (tests/engine/layouts.py) is written in each layout. Its stored values, expanded by code that
is not the loader's, are written as plain float32 and loaded too. Then, at every position of a prompt:

    against its values      largest difference of logits between the layout and its own float32 values: bit for bit on
                            numpy; on MLX, where codes are multiplied as they are, float noise
    against the original    correlation of logits with those of the original weights: what the dtype itself costs; and
                            the relative error of the weights, which must be within the dtype's rounding

Row rounding is off, so that noise stays noise. Exit status 1 if anything is outside its tolerance.

    python tests/show/loader_matrix.py [--quick]
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb_engine import backend
from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.convert import convert
from kvdb_engine.model import Model, empty_layers, load_weights
from tests.engine import layouts
from tests.engine.checkpoints import Stored, stored, weights, write_folder

# Relative error that a dtype's rounding allows a weight matrix (rms).
FINE = {
    "F32": 0.0,
    "BF16": 2**-9,
    "F16": 2**-12,
    "FP8": 0.04,
    "FP4": 0.16,
    "8 bits": 0.01,
    "4 bits": 0.1,
    "2 bits": 0.45,
}
NOISE = {"numpy": 0.0, "mlx-cpu": 5e-5}  # logits have an rms of about 1


@dataclass(frozen=True)
class Case:
    """One layout: what was written, its stored values as float32, and the original weights if it was made of some."""

    layout: str
    dtype: str
    path: Path
    meaning: Path
    original: Path | None
    coarsest: str


def cases(folder: Path) -> Iterator[Case]:
    """Write everything."""
    tensors = weights()
    original = write_folder(folder / "original", stored(tensors))

    def plain(name: str, entries: Stored, meaning: dict[str, np.ndarray] | None, shards: int = 1) -> tuple[Path, Path]:
        path = write_folder(folder / name, entries, shards)
        return path, original if meaning is None else write_folder(folder / f"{name}-f32", stored(meaning))

    for kind in ("F32", "BF16", "F16"):
        meaning = None if kind != "F16" else {n: _half(v) for n, v in tensors.items()}
        yield Case(
            "Hugging Face, official names", kind, *plain(kind, stored(tensors, kind), meaning, 3), original, kind
        )
    prefixed = {f"model.{name}": entry for name, entry in stored(tensors, "BF16").items()}
    yield Case('Hugging Face, "model." in front', "BF16", *plain("prefixed", prefixed, None), original, "BF16")
    path, meaning_path = plain("own", stored(layouts.transformers_names(tensors, 4), "BF16"), None, 2)
    (path / "config.json").write_text(json.dumps(layouts.transformers_config()))
    yield Case("transformers' own names and config", "BF16", path, meaning_path, original, "BF16")
    entries, meaning = layouts.official(tensors)
    yield Case("Hugging Face, official files", "FP8 + FP4 experts", *plain("fp8", entries, meaning, 2), original, "FP4")
    if importlib.util.find_spec("mlx") is not None:
        for stacked in (False, True):
            packed, values = layouts.quantised_folder(folder / f"mlx{stacked}", stack_experts=stacked)
            name = "MLX, overrides, " + ("experts stacked" if stacked else "experts apart")
            original_5 = write_folder(folder / f"five{stacked}", stored(weights(5)))
            yield Case(name, "4 bits, head 8", packed, values, original_5, "4 bits")
        packed, values = layouts.quantised_folder(folder / "mxfp", stack_experts=True, mode="mxfp")
        yield Case("MLX, overrides, experts stacked", "mxfp4, head mxfp8", packed, values, original_5, "FP4")
    source = write_folder(folder / "recipe-source", stored(tensors, "BF16"))
    shutil.copy(open_model("dsv4-nano").path / "tokenizer.json", source)
    convert(str(source), folder / "recipe")
    packed_tensors = _expanded(open_model(str(folder / "recipe")))
    meaning_path = write_folder(folder / "recipe-f32", stored(packed_tensors))
    yield Case("kvdb-convert, the recipe", "2 and 8 bits", folder / "recipe", meaning_path, original, "2 bits")
    for kinds, other in (
        ({"w1": "IQ2_XXS", "w3": "IQ2_XXS", "w2": "Q2_K"}, "Q8_0"),
        ({"w1": "Q4_K", "w3": "Q4_K", "w2": "Q4_K"}, "Q8_0"),
        ({"w1": "Q8_0", "w3": "Q8_0", "w2": "Q8_0"}, "Q8_0"),
        ({"w1": "F16", "w3": "F16", "w2": "F16"}, "F16"),
    ):
        label = " + ".join(dict.fromkeys((*kinds.values(), other, "F16")))
        file = folder / f"{label.replace(' ', '')}.gguf"
        means = layouts.gguf_file(file, kinds, other)
        values = write_folder(folder / f"{file.stem}-f32", stored(means), **_changed())
        yield Case("GGUF, ds4's layout", label, file, values, None, "")


def _half(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.int32 else values.astype(np.float16).astype(np.float32)


def _changed() -> dict[str, object]:
    return {key: layouts.GGUF_CONFIG[key] for key in ("hidden_size", "moe_intermediate_size")}


def _expanded(info: ModelInfo) -> dict[str, np.ndarray]:
    """Every tensor of an MLX-quantised folder in float32, by MLX's own arithmetic written out."""
    tree = json.loads((info.path / "config.json").read_text())["quantization"]
    source = info.open_weights()
    found: dict[str, np.ndarray] = {}
    for name, values in weights().items():
        base = name.removesuffix(".weight")
        stacked, _, rest = base.partition(".experts.")
        expert, _, part = rest.partition(".")
        tensor = source.find_experts(int(base.split(".")[1]), part) if rest else source.find(base)
        assert tensor is not None
        codes = tensor.affine()
        if codes is None:
            found[name] = tensor.dense().astype(values.dtype)
            continue
        way = tree.get(f"{stacked}.experts.{part}" if rest else base, tree)
        packed, scales, biases = (
            array[int(expert)] if rest else array for array in (codes.codes, codes.scales, codes.biases)
        )
        shifts = np.arange(0, 32, way["bits"], dtype=np.uint32)
        numbers = (packed[..., None] >> shifts) & np.uint32((1 << way["bits"]) - 1)
        groups = numbers.reshape(*scales.shape, way["group_size"]).astype(np.float32)
        found[name] = (groups * scales[..., None] + biases[..., None]).reshape(values.shape)
    return found


def logits(info: ModelInfo, name: str, n_tokens: int) -> np.ndarray:
    """(T, vocab) logits at every position."""
    ops = backend.select(name)
    config = info.config.without_rounding()
    model = Model(ops, config, load_weights(ops, config, info.open_weights()))
    ids = np.random.default_rng(3).integers(0, config.vocab, n_tokens).astype(np.uint32)
    _, found = model.forward(empty_layers(ops, config), ids, 0, every=True)
    return ops.host(found)


def weight_error(case: Case) -> float:
    """The largest relative error (rms) of a matrix against the original."""
    assert case.original is not None
    ours, theirs = (open_model(str(path)).open_weights() for path in (case.meaning, case.original))
    worst = 0.0
    for name in ("layers.1.attn.wq_a", "layers.1.ffn.shared_experts.w2", "head", "embed"):
        a, b = ours.find(name), theirs.find(name)
        assert a is not None and b is not None
        worst = max(worst, _relative(a.dense(), b.dense()))
    for part in ("w1", "w2", "w3"):
        a, b = ours.find_experts(2, part), theirs.find_experts(2, part)
        assert a is not None and b is not None
        worst = max(worst, _relative(a.dense(), b.dense()))
    return worst


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Fewer tokens, and numpy only.")
def main(quick: bool) -> None:
    """Print the table."""
    names = ["numpy"]
    if not quick and importlib.util.find_spec("mlx") is not None:
        names.append("mlx-cpu")
    n_tokens = 40 if quick else 150
    table = Table(
        "layout", "stored as", *(f"{name}: largest" for name in names), "weights, relative", "correlation", ""
    )
    wrong = 0
    once: Callable[[Path], np.ndarray] = lambda path: logits(open_model(str(path)), "numpy", n_tokens)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="kvdb-loaders-") as scratch:
        for case in cases(Path(scratch)):
            wanted, info = once(case.meaning), open_model(str(case.path))
            gaps = {name: float(np.abs(logits(info, name, n_tokens) - wanted).max()) for name in names}
            fine = all(gap <= NOISE[name] for name, gap in gaps.items())
            error, correlation = "", ""
            if case.original is not None:
                relative = weight_error(case)
                fine = fine and relative <= FINE[case.coarsest]
                error = f"{relative:.1e} (at most {FINE[case.coarsest]:.1e})"
                correlation = f"{np.corrcoef(wanted.ravel(), once(case.original).ravel())[0, 1]:.5f}"
            wrong += not fine
            shown = [f"{gap:.1e}" if gap else "0" for gap in gaps.values()]
            table.add_row(case.layout, case.dtype, *shown, error, correlation, "same" if fine else "WRONG")
    Console(width=150).print(table)
    bounds = ", ".join(f"{name} {NOISE[name]:g}" for name in names)
    print(f"tolerance against a layout's own values: {bounds}; {wrong} layouts outside")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
