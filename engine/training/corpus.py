"""Documents for training: the carried corpus file and Python sources of installed, permissively licensed packages."""

from __future__ import annotations

import importlib.util
import json
import lzma
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# BSD, MIT, Apache-2.0 or PSF-style licences only (docs/nano.md lists them); a package that is not installed is skipped.
PACKAGES = (  # noqa: SIM905
    "numpy scipy sklearn pandas networkx sympy jax flax optax matplotlib statsmodels skimage xarray rich requests "
    "urllib3 jinja2 click werkzeug aiohttp pygments httpcore attr joblib markdown toolz einops"
).split()


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
