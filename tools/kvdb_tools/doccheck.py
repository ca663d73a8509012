"""Check the documentation: `python -m kvdb_tools.doccheck FOLDER`.

Every relative link in a Markdown file leads to a file, every link into a page to a heading, and every program of the
package is mentioned in the README. Prints what is wrong; exit status 1 if anything is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_SKIP = {".venv", ".git", "build", "dist", "scratch", "node_modules"}


def markdown_files(root: Path) -> list[Path]:
    """All Markdown files of a checkout, without what is generated or installed."""
    return sorted(path for path in root.rglob("*.md") if not _SKIP & set(path.relative_to(root).parts))


def broken_links(path: Path) -> Iterator[str]:
    """Relative links of one page that lead nowhere."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name) if name else path
        if not page.exists():
            yield f"link to {target}: no such file"
        elif anchor and page.suffix == ".md" and anchor not in anchors(page):
            yield f"link to {target}: no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


def unmentioned_programs(root: Path) -> Iterator[str]:
    """Programs that the package installs and the README does not name."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    scripts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name in scripts:
        if name not in readme:
            yield f"program {name} is not mentioned"


def problems(root: Path) -> list[str]:
    """Everything that is wrong, one line each."""
    found = [f"{path.relative_to(root)}: {what}" for path in markdown_files(root) for what in broken_links(path)]
    return found + [f"README.md: {what}" for what in unmentioned_programs(root)]


def main() -> int:
    """Check the folder named on the command line, or the current one."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    found = problems(root)
    for line in found:
        print(line)
    print(f"{len(markdown_files(root))} pages checked, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
