"""The quick version of every program here must end well; the long one is for people (and `make show`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = sorted(
    path
    for path in Path(__file__).parent.glob("*.py")
    if not path.name.startswith("test_") and path.name != "records.py"
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_quick_version_ends_well(program: Path) -> None:
    done = subprocess.run([sys.executable, str(program), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
