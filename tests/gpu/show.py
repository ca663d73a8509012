"""The engine on this GPU, all of it: runs every program of this folder and the engine's tests, and prints one table.

    PYTHONPATH=.:engine:protocol python tests/gpu/show.py [--only WORD] [--out FOLDER]

About seven minutes on one H200. The output of each part goes to FOLDER. Exits 1 if any claim does not hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# float32 throughout, where arithmetic and not the precision of 16-bit products is compared.
EXACT = {"KVDB_MLX_EXACT": "1"}
GPU = {"KVDB_TEST_BACKEND": "mlx"}
TESTS = "tests/engine/test_"
PARTS: tuple[tuple[str, str, dict[str, str], list[str]], ...] = (
    ("kernels", "the kernels' tests pass on the device", {}, ["-m", "pytest", "-q", f"{TESTS}ops_mlx_cuda.py"]),
    (
        "suite",
        "the equivalence suite passes: restore, fork, chunking, 12 random timelines, transformers' vectors",
        GPU | EXACT,
        [
            *("-m", "pytest", "-q"),
            *(f"{TESTS}{name}.py" for name in ("equality", "trials", "state_records", "transformers")),
        ],
    ),
    ("equivalence", "traps, ds4's vectors in three chunkings, nano against numpy", EXACT, ["tests/gpu/equivalence.py"]),
    (
        "selfcheck",
        "with 16-bit products too, live, restored and forked states are equal bit by bit",
        {},
        ["-m", "kvdb_engine.selfcheck", "dsv4-nano", "mlx"],
    ),
    ("nano", "dsv4-nano's speed", {}, ["tests/gpu/nano.py"]),
    ("experts", "experts in every form they are stored in", {}, ["tests/gpu/experts.py"]),
    ("full", "the full geometry", {}, ["tests/gpu/full_geometry.py"]),
)


def main() -> int:
    """Run the parts one after the other; the last lines are the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts whose name holds this word")
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp(prefix="kvdb-gpu-")))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, bad = [], 0
    for name, what, environment, command in PARTS:
        if options.only not in name:
            continue
        print(f"--- {name}", flush=True)
        started, claims = time.monotonic(), []
        log = options.out / f"{name}.log"
        with (
            log.open("w", encoding="utf-8") as file,
            subprocess.Popen(
                [sys.executable, "-u", *command],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                print(f"    {line}", end="", flush=True)
                if line.startswith("CLAIM "):
                    claims.append(line.removeprefix("CLAIM ").rstrip())
        seconds = time.monotonic() - started
        fine = process.returncode == 0
        bad += not fine
        table += claims
        table.append(f"{'ok  ' if fine else 'BAD '}{what} ({seconds:.0f} s; {log.name})")
    print("\n".join(["", *table, "", "ALL CLAIMS HOLD" if not bad else f"{bad} PARTS FAILED"]), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
