from __future__ import annotations

from pathlib import Path

from kvdb_tools.doccheck import anchors, problems


def test_dead_links_and_unnamed_programs_are_found(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project.scripts]\nkvdb-a = "x:y"\nkvdb-b = "x:y"\n')
    (tmp_path / "README.md").write_text(
        "# One `thing`: here\n[ok](docs/a.md#two-words)\n"
        "[no](docs/b.md) [web](https://x.y) [bad](docs/a.md#nope) kvdb-a\n"
        "[here](#one-thing-here)\n```\n[in code](nowhere.md)\n```\n"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("## Two words\n[up](../README.md)\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "x.md").write_text("[no](nowhere.md)")
    assert anchors(tmp_path / "README.md") == {"one-thing-here"}
    assert problems(tmp_path) == [
        "README.md: link to docs/b.md: no such file",
        "README.md: link to docs/a.md#nope: no such heading",
        "README.md: program kvdb-b is not mentioned",
    ]
