"""Freed memory is kept where the C library can."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from kvdb.malloc import keep_freed_memory

FAULTS = """
import resource, sys
from kvdb.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    return [b"x" * int(sys.argv[2]) for _ in range(int(sys.argv[3]))]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, n_bytes: int, n_objects: int) -> int:
    command = [sys.executable, "-c", FAULTS, how, str(n_bytes), str(n_objects)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


has_mallopt = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")


@has_mallopt
def test_a_value_in_pieces_costs_no_page_faults_again() -> None:
    assert faults("kept", 250_000, 4) < faults("as it is", 250_000, 4) / 10


@has_mallopt
@pytest.mark.parametrize("n_bytes", [100_000, 1_000_000, 1 << 20, 4 << 20])
def test_nor_does_one_object_of_any_size(n_bytes: int) -> None:
    """glibc adapts to single objects by itself, until one of its settings is changed."""
    assert faults("kept", n_bytes, 1) < 100


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
