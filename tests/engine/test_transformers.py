"""The engine against transformers' DeepseekV4ForCausalLM (tests/vectors/transformers/make.py), section by section.

transformers rounds no rows, so rounding is off here; the rounding functions have their own tests.
`python -m pytest tests/engine/test_transformers.py -s` prints the table.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine import backend
from kvdb_engine.catalog import open_model
from kvdb_engine.config import from_hf
from kvdb_engine.model import Model, empty_layers, load_weights
from kvdb_engine.ops import Ops
from kvdb_engine.weights_safetensors import SafetensorsSource
from tests.engine.checkpoints import stored, weights, write_safetensors
from tests.engine.conftest import BACKEND

FOLDER = Path(__file__).parent.parent / "vectors" / "transformers"
spec = importlib.util.spec_from_file_location("golden", FOLDER / "make.py")
assert spec and spec.loader
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

# float32 noise of both sides; logits have an rms of about 1.
TOLERANCE = 1e-4


def load(name: str, ops: Ops, folder: Path) -> Model:
    config = from_hf(golden.case_config(name))
    write_safetensors(folder / "m.safetensors", stored(weights(golden.case_seed(name), config)))
    return Model(ops, config, load_weights(ops, config, SafetensorsSource(folder)))


def sections(model: Model, layers: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Our state under the names of the vectors. Their gates come without the positional bias."""
    ops, config = model.ops, model.config
    found: dict[str, np.ndarray] = {}
    for number, (ratio, layer) in enumerate(zip(config.ratios, layers, strict=True)):
        window = ops.host(layer.window)
        found[f"window.{number}"] = window[max(0, len(window) - config.window + 1) :]
        for part, state in (("compressor", layer.compressed), ("indexer", layer.index)):
            if state is None:
                continue
            attn = model.weights.layers[number].attn
            w = attn.compressor if part == "compressor" else attn.indexer.compressor
            ape = ops.host(w.ape)
            found[f"{part}.{number}"] = ops.host(ops.view(state.rows))
            found[f"{part}.open_kv.{number}"] = ops.host(state.open_kv)
            n_open = len(ids) % ratio
            found[f"{part}.open_gate.{number}"] = ops.host(state.open_score) - ape[:n_open]
    return found


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("backend_name", ["numpy", "mlx-cpu"] if BACKEND == "numpy" else [BACKEND])
def test_sections(name: str, backend_name: str, tmp_path: Path) -> None:
    if backend_name != "numpy":
        pytest.importorskip("mlx.core")
    ops = backend.select(backend_name)
    model = load(name, ops, tmp_path)
    ids = golden.case_ids(name)
    with np.load(FOLDER / f"{name}.npz") as file:
        theirs = dict(file)
    # In one piece, in uneven pieces, and (numpy, which is quick at it) token by token.
    cuts = {"one piece": [len(ids)], "pieces": [1, 2, 3, 127, 1, 60, len(ids)]}
    if backend_name == "numpy":
        cuts["token by token"] = [1] * len(ids)
    for way, sizes in cuts.items():
        layers, at, logits = empty_layers(ops, model.config), 0, {}
        for size in sizes:
            chunk = ids[at : at + size]
            layers, last = model.forward(layers, chunk, at)
            at += len(chunk)
            logits[at - 1] = ops.host(last)
        ours = sections(model, layers, ids)
        places = sorted(logits)
        ours["logits"] = np.stack([logits[place] for place in places])
        wanted = {**theirs, "logits": theirs["logits"][places]}
        assert ours.keys() == wanted.keys()
        for part, values in wanted.items():
            if not values.size:
                assert not ours[part].size
                continue
            gap = float(np.abs(ours[part] - values).max())
            print(f"{name:24} {backend_name:8} {way:15} {part:22} {values.shape!s:12} {gap:.1e}")
            assert gap < TOLERANCE, (name, way, part, gap)
        best = np.sort(wanted["logits"], axis=1)
        sure = best[:, -1] - best[:, -2] > 1e-3
        assert (ours["logits"].argmax(1) == wanted["logits"].argmax(1))[sure].all()


def test_a_folder_as_save_pretrained_writes_it(tmp_path: Path) -> None:
    """Tensor names and config.json as transformers itself wrote them; the values are made again."""
    saved = json.loads((FOLDER / "saved.json").read_text())
    config = golden.from_hf(golden.case_config(saved["case"]))
    top = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}
    top |= {f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("base", "fn", "scale")}
    tensors = {
        top.get(name, "model." + name.replace(".attn.kv_norm.", ".attn.norm.")): values
        for name, values in weights(golden.case_seed(saved["case"]), config).items()
    }
    assert sorted(tensors) == saved["names"]
    write_safetensors(tmp_path / "model.safetensors", stored(tensors))
    (tmp_path / "config.json").write_text(json.dumps(saved["config"]))
    shutil.copy(open_model("dsv4-nano").path / "tokenizer.json", tmp_path)
    info, ops = open_model(str(tmp_path)), backend.select("numpy")
    config = info.config.without_rounding()
    model = Model(ops, config, load_weights(ops, config, info.open_weights()))
    _, logits = model.forward(empty_layers(ops, config), golden.case_ids(saved["case"]), 0, every=True)
    with np.load(FOLDER / f"{saved['case']}.npz") as file:
        assert np.abs(logits - file["logits"]).max() < TOLERANCE
