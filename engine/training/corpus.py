"""Documents for training: the carried corpus file and Python sources of installed, permissively licensed packages."""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# BSD, MIT, Apache-2.0 or PSF-style licences only (docs/nano.md lists them); a package that is not installed is skipped.
PACKAGES = (  # noqa: SIM905
    "numpy scipy sklearn pandas networkx sympy jax flax optax matplotlib statsmodels skimage xarray rich requests "
    "urllib3 jinja2 click werkzeug aiohttp pygments httpcore attr joblib markdown toolz einops"
).split()

HELD_OUT_SEED = 2_000_000_000  # the seeds of training episodes stay below


@dataclass(slots=True)
class Corpus:
    """Training documents, held-out documents and the word and excerpt pools that episodes draw from."""

    training: dict[str, list[str]]
    held_out: dict[str, list[str]]
    lexicon: list[str]
    excerpts: list[str]


def load_carried(path: Path) -> dict[str, list[str]]:
    """Return the carried documents by source."""
    documents: dict[str, list[str]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            documents.setdefault(record["source"], []).append(record["text"])
    return documents


def package_folders() -> Iterable[Path]:
    """Yield the folder of the standard library, then of each installed package of the list."""
    yield Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            yield Path(next(iter(spec.submodule_search_locations)))


def python_sources(limit: int = 100_000_000, seed: int = 0) -> list[str]:
    """Return up to ``limit`` characters of Python files, shuffled: the order is the same for the same installation."""
    paths = [
        path
        for folder in package_folders()
        for path in sorted(folder.rglob("*.py"))
        # Packages that live inside the standard library's folder come under their own name or not at all, and generated
        # tables teach nothing.
        if "site-packages" not in path.relative_to(folder).parts and "tests" not in path.parts[-3:-2]
    ]
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    size = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 500 < len(text) < 200_000:
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    return texts


def load_corpus(carried: Path, python_bytes: int) -> Corpus:
    """Read all documents and set a part of each source aside: whole documents, or the end of the novel.

    python_bytes: how much of the installed packages' sources; 0 leaves them out.
    """
    documents = load_carried(carried)
    if python_bytes:
        documents["python"] = python_sources(python_bytes)
    training: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for source, texts in documents.items():
        if len(texts) < 3:
            cut = [len(text) * 19 // 20 for text in texts]
            training[source] = [text[:c] for text, c in zip(texts, cut, strict=True)]
            held_out[source] = [text[c:] for text, c in zip(texts, cut, strict=True)]
        else:
            n = max(1, min(60, len(texts) // 20))
            order = random.Random(5).sample(range(len(texts)), len(texts)) if source != "python" else range(len(texts))
            held_out[source] = [texts[i] for i in order[-n:]]
            training[source] = [texts[i] for i in order[:-n]]
    words = " ".join(training["kjv"][:3] + training["jargon"][:1]).split()
    lexicon = sorted({w.lower() for w in words if w.isascii() and w.isalpha() and 3 <= len(w) <= 9})
    excerpts = training["kjv"] + training["promessi-sposi"] + training["devil"] + training.get("python", [])[:300]
    return Corpus(training, held_out, lexicon, [text[:200_000] for text in excerpts])
