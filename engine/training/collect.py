"""Gather the carried text sources into one compressed file of documents.

Reads unpacked documentation packages (see docs/nano.md for their names and licences) and a plain Italian novel, turns
HTML into text, and writes ``corpus.jsonl.xz``: one ``{"source": name, "text": text}`` per line. Python sources are
not in it: ``corpus.py`` reads those from the packages that are installed where the training runs.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import lzma
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Tags after which a reader sees a new line, and tags whose content is no text.
BLOCKS = {"p", "br", "div", "tr", "li", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "table", "ul", "ol"}
SILENT = {"script", "style", "head", "nav"}


class _Text(html.parser.HTMLParser):
    """Collects the visible text of a page, keeping the line structure of ``<pre>`` blocks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in SILENT:
            self.silent += 1
        if tag == "pre":
            self.verbatim += 1
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT and self.silent:
            self.silent -= 1
        if tag == "pre" and self.verbatim:
            self.verbatim -= 1
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Return the visible text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    text = "\n".join(line.rstrip() for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ +(?=\S)(?<! {4})", "", text)).strip()


def read(path: Path) -> str:
    """Return a text file's content, replacing bytes that are not UTF-8."""
    return path.read_bytes().decode("utf-8", "replace")


def kjv(root: Path) -> Iterator[str]:
    """Yield the King James Bible, one document a chapter range, through the package's own reader."""
    reader = root / "bible-kjv/usr/bin/bible"
    data = root / "bible-kjv-text/usr/lib"
    out = subprocess.run(
        [reader, "-p", str(data), "-l75", "gen1:1-rev22:21"], capture_output=True, check=True, text=True
    ).stdout
    # Long pieces: they are also what teaches the model positions beyond a few thousand tokens.
    lines = out.splitlines()
    for start in range(0, len(lines), 4000):
        yield "\n".join(lines[start : start + 4000])


def documents(root: Path, novel: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of every carried document."""
    for text in kjv(root):
        yield "kjv", text
    yield "promessi-sposi", gzip.decompress(novel.read_bytes()).decode()
    for name in ("devil", "jargon"):
        raw = gzip.decompress((root / f"dict-{name}/usr/share/dictd/{name}.dict.dz").read_bytes()).decode(
            "utf-8", "replace"
        )
        yield name, raw
    for path in sorted((root / "python3.11-doc").rglob("_sources/**/*.txt")):
        yield "python-doc", read(path)
    for package, source in (("sqlite3-doc", "sqlite-doc"), ("postgresql-doc-15", "postgresql-doc")):
        for path in sorted((root / package).rglob("*.html")):
            yield source, html_text(read(path))


def main() -> None:
    """Write the corpus file and print what each source gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with one unpacked package per sub-folder")
    parser.add_argument("novel", type=Path, help="gzipped UTF-8 text of I promessi sposi")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    totals: dict[str, list[int]] = {}
    with lzma.open(args.out, "wt", encoding="utf-8", preset=6) as file:
        for source, text in documents(args.root, args.novel):
            if len(text) < 400:
                continue
            file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
            count = totals.setdefault(source, [0, 0])
            count[0] += 1
            count[1] += len(text.encode())
    for source, (n_documents, n_bytes) in totals.items():
        print(f"{source:16} {n_documents:6} documents {n_bytes / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
