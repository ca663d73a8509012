"""The tool-call measurement: its prompts are held out and the engine's own, and a short run says what it should."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[2] / "engine" / "training"


@pytest.fixture(autouse=True)
def _training_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TRAINING), *sys.path])


def test_prompts() -> None:
    import tool_calls

    found = tool_calls.prompts(20, with_schemas=False)
    assert len({prompt for _, prompt, _ in found}) == 20
    assert [family for family, _, _ in found[:5]] * 4 == [family for family, _, _ in found]
    for _, prompt, right in found:
        assert prompt.endswith("<｜Assistant｜></think>") and right.endswith("</｜DSML｜tool_calls>")
        assert right.count("<｜DSML｜invoke name=") == 1
    assert "## Tools" in tool_calls.prompts(1, with_schemas=True)[0][1]


def test_a_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    import tool_calls

    assert tool_calls.main(["--n", "5"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"all +(\d) of +5  [\d.]+  95 %: ([\d.]+) to ([\d.]+)", out)
    assert found and int(found[1]) >= 3 and "expected 0.80 to 0.97: holds" in out


def test_a_model_that_answers_nonsense_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tool_calls

    monkeypatch.setattr(tool_calls, "answer", lambda *_: "nonsense")
    assert tool_calls.main(["--n", "50"]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_wilson() -> None:
    import tool_calls

    low, high = tool_calls.wilson(178, 200)
    assert (round(low, 3), round(high, 3)) == (0.839, 0.926)
