"""How a builder of calls.py becomes a method: what the two clients share of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def show_signature(method: Callable[..., Any], build: Callable[..., Any], n_bound: int) -> None:
    """Let help() and completion show `self` and the builder's arguments after the first `n_bound`."""
    found = inspect.signature(build)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    later = list(found.parameters.values())[n_bound:]
    parameters = [own, *later]
    method.__signature__ = found.replace(parameters=parameters)  # type: ignore[attr-defined]
