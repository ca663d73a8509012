"""The self-check passes here, and finds an engine that cheats."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine import selfcheck
from kvdb_engine.engine import Engine
from kvdb_engine.selfcheck import check_length, main, noise
from kvdb_engine.state import State
from kvdb_protocol.page import Page
from kvdb_protocol.tail import Tail


def test_passes(nano: Engine, stream: np.ndarray) -> None:
    assert check_length(nano, stream, 65) == []
    median, largest = noise(nano, stream[:60])
    assert 0 < median < largest < 0.5


def test_finds_a_wrong_restore(nano: Engine, stream: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Engine.load

    def forgetful(self: Engine, pages: list[Page], tail: Tail) -> State:
        state = load(self, pages, tail)
        state.layers[0].window[0, 0] += np.float32(0.5)
        return state

    monkeypatch.setattr(Engine, "load", forgetful)
    found = check_length(nano, stream, 20)
    assert found[0] == "restored state differs" and "restored state continues otherwise than a fork" in found


def test_command(
    nano: Engine, stream: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck, "LENGTHS", (3,))
    monkeypatch.setattr(selfcheck, "SPEED_LENGTHS", (16,))
    monkeypatch.setattr(selfcheck, "N_NOISE", 20)
    assert main(["dsv4-nano", "numpy"]) == 0
    assert "all equal" in capsys.readouterr().out
    monkeypatch.setattr(selfcheck, "check_length", lambda *_: ["restored state differs"])
    assert main(["dsv4-nano", "numpy"]) == 1
    assert "1 DIFFERENCES" in capsys.readouterr().out
    assert main(["--help"]) == 2
