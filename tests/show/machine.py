"""The store against a dict: thousands of random operations, with restarts and crashes in between, and no difference.

SNAPSHOT, FORK, COPY, RENAME, SET (small and large), DEL, EXPIRE, PIN, FLUSHDB, evictions, collections, compactions,
restarts and crashes, in sequences of up to 50 that hypothesis chooses; after every step all keys are compared, after
every sequence the directory is checked deeply. A difference is shrunk to the shortest sequence that shows it.

    python tests/show/machine.py [--quick] [--steps N]
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import click
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb.store import compact, segments
from tests.kvdb.store.test_machine import StoreMachine


@click.command()
@click.option("--quick", is_flag=True, help="100 steps.")
@click.option("--steps", default=5000, show_default=True)
def main(quick: bool, steps: int) -> None:
    """Print the steps that were made; exit 1 (with the shortest failing sequence) at the first difference."""
    logging.disable(logging.CRITICAL)
    segments.SEGMENT_BYTES, compact.BATCH_BYTES = 300_000, 100_000
    steps = 100 if quick else steps
    began = time.time()
    done = 0
    while done < steps:
        run_state_machine_as_test(
            StoreMachine,
            settings=settings(
                max_examples=5 if quick else 25,
                stateful_step_count=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        # A sequence is compared once before its first step.
        done = StoreMachine.looks - StoreMachine.runs
    Console(highlight=False).print(
        f"{done} steps in {StoreMachine.runs} sequences, {time.time() - began:.0f} s: 0 differences, 0 findings"
    )


if __name__ == "__main__":
    main()
