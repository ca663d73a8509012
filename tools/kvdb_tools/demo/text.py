"""The text the demo reads: chapters of a public-domain novel, shipped with the package (data/README.md)."""

from __future__ import annotations

from importlib.resources import files


def demo_text() -> str:
    """All of it."""
    return (files("kvdb_tools") / "data" / "promessi_sposi.txt").read_text(encoding="utf-8")


def cut_text(text: str, n_tokens: int, most_tokens: int) -> str:
    """Shorten a text of `n_tokens` to about `most_tokens`, at the end of a paragraph where there is one."""
    if n_tokens <= most_tokens:
        return text
    # Tokens are spread unevenly; five in a hundred spare is enough for prose.
    shorter = text[: int(len(text) * 0.95 * most_tokens / n_tokens)]
    end = shorter.rfind("\n\n")
    return shorter[: end + 1] if end > len(shorter) // 2 else shorter
