"""docs/operations.md says what is so: names and defaults of the configuration, programs, service files that parse."""

from __future__ import annotations

import configparser
import plistlib
import re
from pathlib import Path

from kvdb.config import PARAMETERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    found = re.search(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def rows_of_configuration() -> list[list[str]]:
    table = TEXT.partition("| name | default | meaning |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_configuration_names_exist() -> None:
    rows = rows_of_configuration()
    assert len(rows) > 8
    for names, _, _ in rows:
        for name in re.findall(r"`([a-z-]+)`", names):
            assert name in PARAMETERS


def test_configuration_defaults_are_those_of_the_daemon() -> None:
    shown = {"0 (no limit)": "0", "none": "", "1 GiB": str(1 << 30), "`DIR/transfer`": ""}
    for names, defaults, _ in rows_of_configuration():
        found = re.findall(r"`([a-z-]+)`", names)
        parts = [part.strip() for part in defaults.split(",")]
        # One default may stand for several names: none of them is set.
        for name, part in zip(found, parts * (len(found) if len(parts) == 1 else 1), strict=True):
            expected = shown.get(part, part.strip("`"))
            assert PARAMETERS[name].show(PARAMETERS[name].default) == expected, name


def test_programs_are_there() -> None:
    for program in re.findall(r"`(tests/show/\w+\.py)`", TEXT):
        assert (ROOT / program).exists()


def test_service_files_parse() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(block("ini"))
    assert unit["Service"]["ExecStart"].split()[0].endswith("kvdb-server")
    plist = plistlib.loads(block("xml").encode())
    assert plist["ProgramArguments"][0].endswith("kvdb-server")
