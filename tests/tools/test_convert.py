"""kvdb-convert's command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_tools.convert import main
from tests.engine.test_official_vectors import write

NANO = open_model("dsv4-nano").path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_weights(tmp_path: Path) -> None:
    code, out, _ = run("weights", "dsv4-nano", str(tmp_path / "q"), "--gate-up", "4/64", "--json")
    assert code == 0
    found = json.loads(out)
    bits = {row["class"]: row["bits"] for row in found["classes"]}
    assert bits["routed gate and up"] == 4.5 and bits["routed down"] == 2.3125 and found["peak_memory_MiB"] > 0
    assert open_model(str(tmp_path / "q")).family == open_model("dsv4-nano").family
    code, _, err = run("weights", "dsv4-nano", str(tmp_path / "q"))
    assert code == 2 and "exists already" in err


def test_size() -> None:
    code, out, _ = run("size", str(NANO / "config.json"))
    assert code == 0 and "bits per weight" in out
    code, _, err = run("size", str(NANO / "tokenizer.json"))
    assert code == 2 and "model_type" in err


@pytest.mark.parametrize("way", ["2", "7/64", "2/100", "a/b"])
def test_bad_recipe(way: str, tmp_path: Path) -> None:
    code, _, err = run("weights", "dsv4-nano", str(tmp_path / "q"), "--down", way)
    assert code == 2 and way in err and not list(tmp_path.iterdir())


def test_verify_vectors(tmp_path: Path) -> None:
    code, _, err = run("verify-vectors", "--vectors", str(tmp_path))
    assert code == 2 and "official.vec" in err
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "p.txt").write_text("hello")
    (tmp_path / "official.vec").write_text("case a 100 1 p.txt\nstep 0 7a 1\ntop 7a -0.5\nend\n")
    code, out, err = run("verify-vectors", "--vectors", str(tmp_path), "--backend", "numpy")
    assert (
        code == 1
        and "FAIL a step 0" in out
        and "1 of 1 steps failed" in err
        and "of 4.0, missing from the top 20: " in out
    )
    code, out, _ = run("verify-vectors", "--vectors", str(tmp_path), "--backend", "numpy", "--json")
    assert json.loads(out)["passed"] is False


@pytest.fixture(scope="module")
def made_by_the_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the official format: what the model in full precision says, by numpy."""
    folder = tmp_path_factory.mktemp("vectors")
    write(folder, Engine(open_model("dsv4-nano"), backend_name="numpy"))
    return folder


def test_vectors_made_from_a_reference_model_pass_elsewhere(made_by_the_reference: Path, tmp_path: Path) -> None:
    """Another quantisation and another back end stay within the tolerance; a model of another mind does not."""
    arguments = ("--vectors", str(made_by_the_reference), "--backend", "numpy")
    eight = ("--gate-up", "8/64", "--down", "8/64", "--early-down", "8/64")
    assert run("weights", "dsv4-nano", str(tmp_path / "q8"), *eight)[0] == 0
    models = [("dsv4-nano", "numpy"), (str(tmp_path / "q8"), "numpy")]
    if importlib.util.find_spec("mlx") is not None:
        models.append(("dsv4-nano", "mlx-cpu"))
    for model, backend in models:
        code, out, err = run("verify-vectors", "--model", model, *arguments[:2], "--backend", backend)
        assert code == 0 and out.count("pass ") == 8 and "all 8 steps pass" in out, (model, backend, out, err)
    path = made_by_the_reference / "official.vec"
    text = path.read_text()
    path.write_text(text.replace("top ", "top 00", 1))
    code, out, err = run("verify-vectors", *arguments)
    path.write_text(text)
    assert (
        code == 1 and "FAIL sum step 0" in out and "missing from the top 20: 1" in out and "1 of 8 steps failed" in err
    )
