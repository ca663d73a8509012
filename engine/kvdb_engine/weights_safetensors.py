"""Hugging Face folders: safetensors files under official DeepSeek tensor names, or transformers' own.

Reads headers and maps the data, so nothing is copied before a tensor is asked for. Kinds of tensors: plain (F32, F16,
BF16, whole numbers); FP8 e4m3 with one E8M0 (or F32) scale per 128 x 128 block; FP4 (two e2m1 per byte, low nibble
first) with one E8M0 scale per 32 inputs. A scale has the matrix's name with `.scale` (or `.weight_scale_inv`) instead
of `.weight`.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.errors import ModelError
from kvdb_engine.packing import E2M1, E4M3, F32
from kvdb_engine.weights import (
    AffineCodes,
    AffineTensor,
    BlockFloats,
    CompactTensor,
    Halves,
    StackedTensor,
    Tensor,
    release,
)
from kvdb_engine.weights_names import GATE_UP, official_name

_MODES = {"affine": 0, "mxfp4": 4, "mxfp8": 8}  # of MLX's tools; those of one width have it here
HEADER_LIMIT = 100 << 20  # the format's own limit for the JSON header
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "U16": "<u2",
    "U32": "<u4",
    "BOOL": "|u1",
    "F8_E4M3": "|u1",
    "F8_E8M0": "|u1",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one file: its stored kind, stored shape, and raw values (BF16 as u16, FP8 as u8).

    Implements weights.Tensor for tensors without a scale.
    """

    kind: str
    shape: tuple[int, ...]
    values: npt.NDArray[Any]

    def dense(self) -> F32:
        """Values as float32, without any scale."""
        match self.kind:
            case "BF16":
                return (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)
            case "F8_E4M3":
                values: F32 = E4M3[self.values]
                return values
            case "F8_E8M0":
                powers: F32 = np.exp2(self.values.astype(np.float32) - 127)  # whole exponents: exact
                return powers
            case _:
                return self.values.astype(np.float32)

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        return Entry(self.kind, self.shape[1:], self.values[index]).dense()

    def affine(self) -> AffineCodes | None:
        """See weights.Tensor."""
        return None

    def compact(self) -> Halves | None:
        """See weights.compact."""
        return Halves(self.values.view(np.uint16), self.kind) if self.kind in ("BF16", "F16") else None


def read_file(path: Path) -> tuple[dict[str, Entry], mmap.mmap]:
    """All tensors of a safetensors file, and the mapping that holds them. Raises ModelError naming the file."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", head) if len(head) == 8 else (0,)
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ModelError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(mapped)[8 + length :]
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; is the download complete?") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: unreadable: {error}") from error
    found = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape = info["dtype"], tuple(int(n) for n in info["shape"])
            first, last = info["data_offsets"]
            dtype = np.dtype(_DTYPES[kind])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: tensor {name} has an unknown kind or bad header entry: {info}") from error
        if last - first != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or last > len(data):
            raise ModelError(f"{path}: tensor {name} is cut short; is the download complete?")
        found[name] = Entry(kind, shape, np.frombuffer(data[first:last], dtype).reshape(shape))
    return found, mapped


@dataclass(frozen=True, slots=True)
class ScaledTensor:
    """An FP8 or FP4 matrix with its block scales."""

    entry: Entry
    scale: Entry

    @property
    def is_fp4(self) -> bool:
        """FP4 packs two values into a byte, which official files call I8."""
        return self.entry.kind in ("I8", "U8")

    @property
    def shape(self) -> tuple[int, ...]:
        """See weights.Tensor."""
        out, inner = self.entry.shape
        return (out, 2 * inner) if self.is_fp4 else (out, inner)

    def dense(self) -> F32:
        """See weights.Tensor."""
        out, inner = self.shape
        scale = self.scale.dense()
        if self.is_fp4:
            raw = self.entry.values.view(np.uint8)
            values = np.empty((out, inner), np.float32)
            values[:, 0::2], values[:, 1::2] = E2M1[raw & 15], E2M1[raw >> 4]
        else:
            values = self.entry.dense()
        rows, columns = -(-out // scale.shape[0]), -(-inner // scale.shape[1])
        spread = np.repeat(np.repeat(scale, rows, axis=0)[:out], columns, axis=1)[:, :inner]
        return np.ascontiguousarray(values * spread)

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        raise ValueError("FP8 and FP4 matrices are not stacked")

    def affine(self) -> AffineCodes | None:
        """See weights.Tensor."""
        return None

    def compact(self) -> BlockFloats | None:
        """See weights.compact. As MLX's mxfp8 an FP8 scale is repeated for every row and every 32 inputs."""
        out, inner = self.shape
        rows, columns = -(-out // self.scale.shape[0]), -(-inner // self.scale.shape[1])
        if inner % 32 or columns % 32 or (self.is_fp4 and (rows, columns) != (1, 32)):
            return None
        bits = self.scale.dense().view(np.uint32)
        if np.any(bits & np.uint32(0x807FFFFF)):  # not all powers of two
            return None
        powers = (bits >> np.uint32(23)).astype(np.uint8)
        scales = np.repeat(np.repeat(powers, rows, axis=0)[:out], columns // 32, axis=1)[:, : inner // 32]
        codes = np.ascontiguousarray(self.entry.values).view("<u4")
        return BlockFloats(codes, np.ascontiguousarray(scales), 4 if self.is_fp4 else 8)


class SafetensorsSource:
    """A folder of safetensors files. Implements weights.TensorSource."""

    def __init__(self, folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
        """quantization: what config.json says under that name (MLX's form), if it does."""
        self.where = str(folder)
        # Overrides are under a module's name in the file.
        self._quantization = {
            official_name(key) if isinstance(value, dict) else key: value for key, value in (quantization or {}).items()
        }
        self._entries: dict[str, Entry] = {}
        self._maps: list[mmap.mmap] = []
        for path in weight_files(folder):
            entries, mapped = read_file(path)
            self._entries.update(entries)
            self._maps.append(mapped)
        names = {official_name(name): name for name in self._entries}
        if len(names) < len(self._entries):
            twice = next(name for name in self._entries if names[official_name(name)] != name)
            raise ModelError(f"{folder}: {twice} and {names[official_name(twice)]} are the same tensor")
        self._entries = _split_gate_up({name: self._entries[old] for name, old in names.items()})

    def kinds(self) -> dict[str, str]:
        """Stored kind of each tensor, by its name in the file."""
        return {name: entry.kind for name, entry in self._entries.items()}

    def release(self) -> None:
        """See weights.TensorSource."""
        for mapped in self._maps:
            release(mapped)

    def find(self, name: str) -> Tensor | None:
        """See weights.TensorSource."""
        entry = self._entries.get(f"{name}.weight", self._entries.get(name))
        if entry is None:
            return None
        if entry.kind == "U32" and f"{name}.scales" in self._entries:
            return self._quantised(name, entry)
        for suffix in (".scale", ".weight_scale_inv", ".weight_scale"):
            scale = self._entries.get(name + suffix)
            if scale is not None and len(scale.shape) == 2 and len(entry.shape) == 2:
                return ScaledTensor(entry, scale)
        return entry

    def find_experts(self, layer: int, part: str) -> Tensor | None:
        """See weights.TensorSource."""
        stacked = self.find(f"layers.{layer}.ffn.experts.{part}")
        if stacked is not None:
            return stacked
        found: list[Tensor] = []
        while (tensor := self.find(f"layers.{layer}.ffn.experts.{len(found)}.{part}")) is not None:
            found.append(tensor)
        if not found:
            return None
        if len({tensor.shape for tensor in found}) > 1:
            raise ModelError(f"{self.where}: experts of layer {layer} ({part}) differ in shape")
        return StackedTensor(tuple(found))

    def _quantised(self, name: str, entry: Entry) -> Tensor:
        """A matrix that MLX's tools quantised: codes in .weight, and .scales, in mode affine .biases too."""
        scales, biases = self._entries[f"{name}.scales"], self._entries.get(f"{name}.biases")
        own = self._quantization.get(name, self._quantization)
        mode, group_size, bits = own.get("mode", "affine"), own.get("group_size"), own.get("bits")
        if mode not in _MODES:
            raise ModelError(f"{self.where}: {name} is quantised in mode {mode!r}; supported are {', '.join(_MODES)}")
        if not isinstance(group_size, int) or not isinstance(bits, int):
            raise ModelError(f"{self.where}: config.json does not say how {name} is quantised (group_size, bits)")
        inner = entry.shape[-1] * 32 // bits
        shape = (*entry.shape[:-1], inner // group_size)
        if scales.shape != shape or (biases is not None and biases.shape != shape):
            raise ModelError(
                f"{self.where}: {name} has codes {entry.shape} and scales {scales.shape}; config.json says "
                f"{bits} bits in groups of {group_size}"
            )
        if mode == "affine":
            if biases is None:
                raise ModelError(f"{self.where}: tensor {name}.biases is missing")
            return AffineTensor(AffineCodes(entry.values, scales.dense(), biases.dense(), group_size, bits))
        if (group_size, bits, scales.kind) != (32, _MODES[mode], "U8"):
            raise ModelError(f"{self.where}: {name} is not {mode}: it has groups of 32 and scales of kind U8")
        return CompactTensor(BlockFloats(entry.values, scales.values, bits))


def _split_gate_up(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Routed experts' gate and up as tensors of their own: views of the one that transformers writes."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if not name.endswith(GATE_UP):
            found[name] = entry
            continue
        layer, half = name.removesuffix(GATE_UP), entry.shape[1] // 2
        for part, rows in (("w1", slice(0, half)), ("w3", slice(half, None))):
            shape = (entry.shape[0], half, *entry.shape[2:])
            found[f"{layer}ffn.experts.{part}"] = Entry(entry.kind, shape, entry.values[:, rows])
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted: those the index names, or all there are. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: unreadable index: {error}") from error
        paths = sorted(folder / str(name) for name in names)
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ModelError(f"{folder}: {', '.join(missing)} named by the index, but missing")
        return paths
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{folder}: holds no .safetensors file")
    return found
