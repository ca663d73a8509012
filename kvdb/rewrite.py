"""CONFIG REWRITE: the values in force go into the configuration file; comments, order and blank lines stay."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvdb.config import PARAMETERS, Config
from kvdb.errors import KvdbError

_MARK = "# Written by CONFIG REWRITE"


def rewritten(old: str, lines: dict[str, str]) -> str:
    """The new text of a file: known names get their new line where they stood, new ones follow at the end."""
    left = dict(lines)
    out: list[str] = []
    for line in old.splitlines():
        name = line.split(None, 1)[0].lower() if line.strip() and not line.lstrip().startswith("#") else ""
        if name not in PARAMETERS:
            out.append(line)
        elif name in left:
            out.append(left.pop(name))
    if left:
        out += [*([] if _MARK in out else [_MARK]), *left.values()]
    return "\n".join(out) + "\n"


def rewrite_file(config: Config) -> None:
    """Replace the configuration file in one step. Raises KvdbError; then the old file is as it was."""
    assert config.file is not None
    temporary: str | None = None
    try:
        old = config.file.read_text() if config.file.exists() else ""
        handle, temporary = tempfile.mkstemp(dir=config.file.parent, prefix=config.file.name)
        with os.fdopen(handle, "w") as file:
            file.write(rewritten(old, config.lines()))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(config.file.stat().st_mode if config.file.exists() else 0o644)
        Path(temporary).replace(config.file)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise KvdbError(f"Rewriting config file: {error.strerror}") from None
