"""Catalog: what a model is, without running it. Opens a built-in model, a folder or a GGUF file; never imports MLX.

Fingerprints tell which states belong to which model:

    family       blake3 over geometry, rounding rules and the values of all norm vectors. Quantisation leaves norms
    alone
                 (every layout stores them in full), so all quantisations of one training share a family and no two
                 trainings do.
    fingerprint  blake3 over the family, the stored kind of every tensor, and the weights digest.

Weights digest: blake3 over, for each weight file in order of name, its size, then the whole file if it has at most 64
MiB; else its first 16 MiB (all of a safetensors or GGUF header) and 64 KiB at each of 256 evenly spaced places, the
last one at the end. That reads at most 32 MiB of a file of any size: seconds for 80 GB, and any re-quantisation or
fine-tuning changes it. A single changed bit between the samples of a large file does not: file checksums are not its
business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgpack
import numpy as np
from blake3 import blake3

from kvdb_engine import config as configs
from kvdb_engine.config import ModelConfig
from kvdb_engine.errors import ModelError
from kvdb_engine.tokenizer import Tokenizer
from kvdb_engine.weights import TensorSource
from kvdb_engine.weights_gguf import GgufSource
from kvdb_engine.weights_safetensors import SafetensorsSource, weight_files
from kvdb_protocol.layout import Layout

BUILT_IN = {"dsv4-nano": "dsv4_nano"}
# Raised when the engine begins to round kept rows otherwise: then old states no longer continue exactly.
ROUNDING_RULES = 1

_MiB = 1 << 20
_WHOLE_BYTES = 64 * _MiB
_HEAD_BYTES = 16 * _MiB
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 256


@dataclass(frozen=True)
class ModelInfo:
    """One model: its name here, where it is, its geometry, and who its states belong to.

    fingerprint, family: 32 bytes each (module docstring). kinds: stored kind of each tensor, by its name in the file.
    """

    name: str
    path: Path
    config: ModelConfig
    layout: Layout
    fingerprint: bytes
    family: bytes
    kinds: Mapping[str, str]

    is_synthetic = False

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file, rather than a folder."""
        return self.path.suffix == ".gguf"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded on first use. Raises ModelError."""
        if self.is_gguf:
            return Tokenizer.from_gguf(GgufSource(self.path).metadata, str(self.path))
        return Tokenizer.from_json(self.path / "tokenizer.json")

    @cached_property
    def quant(self) -> str:
        """Short name of the weights' quantisation: the kinds that hold most tensors' values, e.g.

        BF16 or IQ2_XXS+Q8_0.
        """
        big = sorted({kind for kind in self.kinds.values() if kind not in ("F32", "I32", "I64", "F8_E8M0")})
        return "+".join(big) or "F32"

    def open_weights(self) -> TensorSource:
        """The model's tensors, mapped. Raises ModelError."""
        if self.is_gguf:
            return GgufSource(self.path)
        tree = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return SafetensorsSource(self.path, tree.get("quantization"))


def open_model(spec: str) -> ModelInfo:
    """Open a model by built-in name, folder or .gguf file, optionally as NAME=PATH.

    Reads headers and samples of the weights, not the weights. `synthetic:...` names a geometry for load tests
    (synthetic_model.py). Raises ModelError with the file and the remedy.
    """
    if spec.startswith("synthetic:") or "=synthetic:" in spec:
        from kvdb_engine.synthetic_model import open_synthetic  # it builds on this module

        return open_synthetic(spec)
    name, path = _locate(spec)
    if path.is_dir():
        return _open_folder(name, path)
    if path.suffix == ".gguf" and path.is_file():
        source = GgufSource(path)
        model = configs.from_gguf(source.metadata, str(path))
        return _info(name, path, model, source, source.kinds(), [path])
    if not path.exists():
        known = ", ".join(sorted(BUILT_IN))
        raise ModelError(f"model {spec!r} not found: neither a built-in model ({known}) nor a folder or .gguf file")
    raise ModelError(f"{path}: a model is a folder with config.json and safetensors, or a .gguf file")


def _locate(spec: str) -> tuple[str, Path]:
    if not spec:
        raise ModelError("the model name is empty")
    name, sign, rest = spec.partition("=")
    if not sign:
        name, rest = "", spec
    if rest in BUILT_IN:
        return name or rest, Path(__file__).parent / "models" / BUILT_IN[rest]
    path = Path(rest).expanduser()
    return name or (path.stem if path.suffix == ".gguf" else path.resolve().name), path


def _open_folder(name: str, folder: Path) -> ModelInfo:
    where = folder / "config.json"
    try:
        tree = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{where}: missing; a model folder needs config.json, tokenizer.json and safetensors"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: unreadable: {error}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{where}: not a JSON object")
    model = configs.from_hf(tree, str(where))
    source = SafetensorsSource(folder, tree.get("quantization"))
    return _info(name, folder, model, source, source.kinds(), weight_files(folder))


def _info(
    name: str, path: Path, model: ModelConfig, source: TensorSource, kinds: Mapping[str, str], files: list[Path]
) -> ModelInfo:
    family = _family(model, source)
    hasher = blake3(b"kvdb model\0" + family)
    hasher.update(msgpack.packb(sorted(kinds.items())))
    hasher.update(weights_digest(files))
    return ModelInfo(name, path, model, model.layout(), hasher.digest(), family, dict(kinds))


def _family(model: ModelConfig, source: TensorSource) -> bytes:
    geometry = {field: getattr(model, field) for field in model.__dataclass_fields__}
    hasher = blake3(b"kvdb family\0")
    hasher.update(msgpack.packb([ROUNDING_RULES, sorted(geometry.items())]))
    names = ["norm"]
    for layer in range(model.n_layers):
        names += [f"layers.{layer}.{part}" for part in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm")]
    for tensor_name in names:
        tensor = source.find(tensor_name)
        if tensor is None:
            raise ModelError(f"{source.where}: tensor {tensor_name} is missing; is the download complete?")
        hasher.update(np.ascontiguousarray(tensor.dense(), "<f4").tobytes())
    return hasher.digest()


def weights_digest(files: list[Path]) -> bytes:
    """32 bytes that change with the weights; how they are sampled is stated in the module docstring."""
    hasher = blake3(b"kvdb weights\0")
    for path in sorted(files):
        size = path.stat().st_size
        hasher.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                hasher.update(file.read())
                continue
            hasher.update(file.read(_HEAD_BYTES))
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.digest()
