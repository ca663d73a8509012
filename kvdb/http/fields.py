"""Reading request bodies: typed access to JSON fields, with errors that name the field."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from kvdb.http.errors import BadRequest
from kvdb_engine.sampling import Sampling

_MISSING = object()
_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Fields:
    """The fields of a JSON object. `path` is put before the names in errors."""

    def __init__(self, tree: Any, path: str = "") -> None:
        if not isinstance(tree, Mapping):
            raise BadRequest(f"{path or 'the body'} must be a JSON object", path or None)
        self.tree = tree
        self.path = path

    def name(self, field: str) -> str:
        """A field's full name."""
        return f"{self.path}.{field}" if self.path else field

    def get(self, field: str, kind: type[Any], default: Any = None) -> Any:
        """A field of this JSON type; null counts as absent."""
        value = self.tree.get(field)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            raise BadRequest(f"{self.name(field)} must be {_NAMES[kind]}", self.name(field))
        return value

    def need(self, field: str, kind: type[Any]) -> Any:
        """A field that must be there."""
        value = self.get(field, kind)
        if value is None:
            raise BadRequest(f"{self.name(field)} is required", self.name(field))
        return value

    def integer(self, field: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer in a range."""
        value: int | None = self.get(field, int, default)
        if value is not None and value is not default and not low <= value <= high:
            raise BadRequest(f"{self.name(field)} must be between {low} and {high}", self.name(field))
        return value

    def number(self, field: str, low: float, high: float, default: float) -> float:
        """A number in a range."""
        value: float = self.get(field, float, default)
        if not low <= value <= high:
            raise BadRequest(f"{self.name(field)} must be between {low:g} and {high:g}", self.name(field))
        return value

    def strings(self, field: str, most: int) -> tuple[str, ...]:
        """A string or a list of strings, none of them empty."""
        value = self.tree.get(field)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found) or len(found) > most:
            raise BadRequest(f"{self.name(field)} must be a string or a list of at most {most}, none empty", field)
        return tuple(found)

    def refuse(self, field: str, harmless: tuple[Any, ...], why: str) -> None:
        """Refuse a field that would change the answer and is not supported; values without effect are let through."""
        value = self.tree.get(field)
        if value is not None and value not in harmless:
            raise BadRequest(f"{self.name(field)} is not supported: {why}", self.name(field))


def sampling_of(fields: Fields, *, highest_temperature: float = 2.0) -> Sampling:
    """The sampling fields that all dialects share. Without a seed each request draws its own."""
    top_p = fields.number("top_p", 0, 1, 1.0)
    if top_p == 0:
        raise BadRequest("top_p must be above 0", fields.name("top_p"))
    seed = fields.get("seed", int)
    return Sampling(
        temperature=fields.number("temperature", 0, highest_temperature, 1.0),
        top_k=fields.integer("top_k", 0, 1 << 31, 0) or 0,
        top_p=top_p,
        min_p=fields.number("min_p", 0, 1, Sampling().min_p),
        seed=secrets.randbits(63) if seed is None else seed & ((1 << 64) - 1),
    )
