"""Imports point downwards only, and the daemon and the checking tools run without MLX."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "kvdb_protocol": ROOT / "protocol" / "kvdb_protocol",
    "kvdb_engine": ROOT / "engine" / "kvdb_engine",
    "kvdb": ROOT / "kvdb",
    "kvdb_tools": ROOT / "tools" / "kvdb_tools",
}
ALLOWED = {
    "kvdb_protocol": {"kvdb_protocol"},
    "kvdb_engine": {"kvdb_engine", "kvdb_protocol"},
    "kvdb": {"kvdb", "kvdb_engine", "kvdb_protocol"},
    "kvdb_tools": set(FOLDERS),
}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_point_downwards(package: str) -> None:
    files = list(FOLDERS[package].rglob("*.py"))
    assert files
    for path in files:
        upward = (imported_packages(path) & set(FOLDERS)) - ALLOWED[package]
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("module", ["kvdb.server", "kvdb_tools.cli", "kvdb_tools.dump", "kvdb_tools.check"])
def test_mlx_stays_out_of(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted(name for name in sys.modules if name.split('.')[0] in ('mlx', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_package_is_typed() -> None:
    assert all((folder / "py.typed").exists() for folder in FOLDERS.values())
