"""kvdb-convert on a model of more than 2 GB, and what it says to inputs it cannot use.

A synthetic checkpoint in bf16 (several shards, official names, experts one by one) is written and converted by the
program itself, in a process of its own: peak memory beside the largest shard, time, bits per weight of each class. Then
broken inputs, one after the other: the refusal must name what is wrong, exit with 2, and leave nothing behind.

Exit status 1 if the peak is not below three times the largest shard, or a refusal is not as it should be.

    python tests/show/convert_large.py [--quick]
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb_engine.catalog import open_model
from kvdb_engine.config import from_hf
from kvdb_engine.recipe import PARTS, tensor_shapes
from kvdb_tools.convert import main as kvdb_convert
from tests.engine.checkpoints import CONFIG, stored, weights, write_folder

LARGE = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 64, "vocab_size": 2560}
LARGE |= {"num_attention_heads": 8, "head_dim": 192, "qk_rope_head_dim": 64, "q_lora_rank": 512, "o_lora_rank": 256}
LARGE |= {"index_head_dim": 128}
RATIOS = (0, 4, 128, 4, 128, 4)


def write_large(folder: Path, n_layers: int, n_experts: int) -> tuple[int, int]:
    """Write the checkpoint layer by layer; returns (bytes of all shards, of the largest)."""
    tree = {**CONFIG, **LARGE, "n_routed_experts": n_experts, "num_hidden_layers": n_layers}
    tree["compress_ratios"] = list(RATIOS[:n_layers])
    config = from_hf(tree)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    shutil.copy(open_model("dsv4-nano").path / "tokenizer.json", folder)
    rng = np.random.default_rng(5)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in tensor_shapes(config).items():
        shards.setdefault(name.split(".")[1] if name.startswith("layers.") else "", []).append((name, shape))
    for layer in range(n_layers):
        for expert in range(n_experts):
            for part in PARTS:
                width, inner = config.expert_width, config.hidden
                shape = (inner, width) if part == "w2" else (width, inner)
                shards[str(layer)].append((f"layers.{layer}.ffn.experts.{expert}.{part}", shape))
    index, sizes = {}, []
    for number, tensors in enumerate(shards.values()):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        at = 0
        for name, shape in tensors:
            kind, item = ("I32", 4) if name.endswith("tid2eid") else ("BF16", 2)
            size = item * int(np.prod(shape))
            full = f"{name}.weight" if len(shape) == 2 and kind == "BF16" and not name.endswith("ape") else name
            full = f"{name}.weight" if name.endswith("norm") else full
            header[full] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
            index[full] = file.name
            at += size
        head = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            for name, shape in tensors:
                if name.endswith("tid2eid"):
                    out.write(rng.integers(0, n_experts, shape).astype("<i4").tobytes())
                    continue
                spread = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(spread) + (len(shape) == 1)
                out.write((values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
        sizes.append(file.stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(sizes), max(sizes)


def convert_it(console: Console, scratch: Path, quick: bool) -> bool:
    """Write, convert, print; whether the peak held."""
    began = time.perf_counter()
    total, largest = write_large(scratch / "large", 2 if quick else 6, 4 if quick else 64)
    console.print(
        f"checkpoint: {total:,} bytes, largest shard {largest:,}, written in {time.perf_counter() - began:.0f} s"
    )
    code = "import sys; from kvdb_tools.convert import main; main()"
    command = [sys.executable, "-c", code, "weights", str(scratch / "large"), str(scratch / "q"), "--json"]
    before = os.times().children_user
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    busy = os.times().children_user - before
    if done.returncode:
        console.print(done.stderr)
        return False
    found = json.loads(done.stdout)
    table = Table("tensors", "weights", "bytes", "bits per weight")
    for row in found["classes"]:
        table.add_row(row["class"], f"{row['weights']:,}", f"{row['bytes']:,}", f"{row['bits']:.3f}")
    console.print(table)
    peak, limit = found["peak_memory_MiB"], 3 * largest / 2**20
    # A short version's shards are smaller than Python and numpy themselves.
    holds = quick or peak < limit
    console.print(
        f"peak memory {peak:,.0f} MiB, three times the largest shard {limit:,.0f} MiB: "
        f"{'below' if peak < limit else 'above'}; {found['seconds']:.1f} s, {busy:.1f} s of processor time"
    )
    shutil.rmtree(scratch / "large")
    return holds


def damage(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """A good folder, then changed."""

    def make(scratch: Path) -> Path:
        folder = write_folder(scratch / "source", stored(weights(), "BF16"), 2)
        shutil.copy(open_model("dsv4-nano").path / "tokenizer.json", folder)
        change(folder)
        return folder

    return make


def without(tensor: str, values: np.ndarray | None = None) -> Callable[[Path], Path]:
    """A folder that lacks a tensor, or has another in its place."""

    def make(scratch: Path) -> Path:
        tensors = weights()
        del tensors[tensor]
        if values is not None:
            tensors[tensor] = values
        folder = write_folder(scratch / "source", stored(tensors, "BF16"), 2)
        shutil.copy(open_model("dsv4-nano").path / "tokenizer.json", folder)
        return folder

    return make


def configured(**changes: Any) -> Callable[[Path], Path]:
    """A folder with another config."""

    def change(folder: Path) -> None:
        tree = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return damage(change)


def llama_gguf(scratch: Path) -> Path:
    """A GGUF file of another architecture."""
    from gguf import GGUFWriter

    path = scratch / "other.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def truncate(path: Path, size: int) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:size])


SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
BROKEN: tuple[tuple[str, Callable[[Path], Path], tuple[str, ...]], ...] = (
    ("another architecture (folder)", configured(model_type="llama"), ("model_type is 'llama'", "deepseek_v4")),
    ("another architecture (GGUF)", llama_gguf, ("architecture is 'llama'", "deepseek4")),
    ("no such model", lambda scratch: scratch / "nothing", ("not found",)),
    ("config.json missing", damage(lambda f: (f / "config.json").unlink()), ("config.json: missing",)),
    ("config.json lacks a field", configured(hidden_size=None), ("hidden_size is missing",)),
    ("ratio that does not exist", configured(compress_ratios=[0, 8, 128, 4]), ("compression ratios", "known are")),
    ("a shard missing", damage(lambda f: (f / SHARD).unlink()), (SHARD, "named by the index, but missing")),
    ("a shard cut short", damage(lambda f: truncate(f / SHARD, 40_000)), (SHARD, "cut short")),
    ("a shard that is none", damage(lambda f: (f / SHARD).write_bytes(b"no")), (SHARD, "not a safetensors file")),
    ("an unreadable index", damage(lambda f: (f / INDEX).write_text("{")), ("unreadable index",)),
    ("a tensor missing", without("layers.2.attn.wo_a.weight"), ("layers.2.attn.wo_a is missing",)),
    ("an expert missing", without("layers.1.ffn.experts.3.w2.weight"), ("layers.1.ffn.experts.3.w2 is missing",)),
    ("a tensor of another shape", without("head.weight", np.zeros((3, 3), np.float32)), ("head has shape (3, 3)",)),
    ("no tokenizer", damage(lambda f: (f / "tokenizer.json").unlink()), ("tokenizer.json: missing",)),
)  # fmt: skip


def refuse_them(console: Console, scratch: Path) -> int:
    """Print each refusal; returns how many are wrong."""
    table = Table("input", "exit", "what kvdb-convert says", "")
    wrong = 0
    for number, (what, make, words) in enumerate(BROKEN):
        home = scratch / f"broken-{number}"
        home.mkdir()
        source, target = make(home), home / "target"
        result = CliRunner().invoke(kvdb_convert, ["weights", str(source), str(target)])
        said = " ".join(result.stderr.split())
        clean = not target.exists() and not list(home.glob("*.part"))
        holds = result.exit_code == 2 and all(word in said for word in words) and clean
        wrong += not holds
        table.add_row(what, str(result.exit_code), said.replace(str(home), "..."), "refused" if holds else "WRONG")
    console.print(table)
    return wrong


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A checkpoint of a few megabytes.")
def main(quick: bool) -> None:
    """Convert, then refuse."""
    console = Console(width=150, highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="kvdb-convert-") as name:
        holds = convert_it(console, Path(name), quick)
        wrong = refuse_them(console, Path(name))
    console.print(f"peak memory {'holds' if holds else 'DOES NOT HOLD'}; {wrong} of {len(BROKEN)} refusals wrong")
    sys.exit(0 if holds and not wrong else 1)


if __name__ == "__main__":
    main()
