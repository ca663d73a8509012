from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvdb_protocol.dsv4 import encode_payload
from kvdb_protocol.layout import Codec, Layout
from kvdb_tools.bench import flash, main
from kvdb_tools.bench.bare_server import BareServer
from kvdb_tools.bench.commands import _measure
from kvdb_tools.bench.main import TERMINATED, cell_text
from kvdb_tools.bench.plot import draw
from kvdb_tools.bench.registry import SCENARIOS
from kvdb_tools.bench.scenario import Bars, Curve, Curves, MissingError, Result, Scenario, Settings
from kvdb_tools.bench.session50 import unique_bytes, whole_state
from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import Status

# The geometry of DeepSeek V4 Flash.
FLASH = Layout(
    vocab=129280,
    context=1 << 20,
    window=128,
    head_dim=512,
    rope_dim=64,
    index_dim=128,
    ratios=(0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, 43))),
    page_tokens=256,
    kv_codec=Codec.FP8_F16,
    index_codec=Codec.FP4,
)


@pytest.mark.parametrize("n_tokens", [128, 2048, 4096])
def test_whole_states_have_the_size_of_real_ones(n_tokens: int) -> None:
    # The size formula of ds4's format at this geometry; real files have these sizes.
    expected = 52 + 4 * n_tokens + 517120 + 344 + 11272192
    expected += 21 * (2560 * (n_tokens // 4) + 81920) + 20 * (2048 * (n_tokens // 128) + 524288)
    assert sum(len(piece) for piece in encode_payload(whole_state(FLASH, n_tokens))) == expected


def test_unique_bytes_count_rows_once_and_windows_each_time() -> None:
    one, two = unique_bytes(FLASH, [2048]), unique_bytes(FLASH, [1024, 2048])
    own = 4 * 129280 + 43 * 128 * 583 + 21 * 2 * 4 * (4 * 1024 + 4 * 256)
    assert two - one == own
    assert one == own + 4 * 2048 + 21 * 512 * (583 + 68) + 20 * 16 * 583


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Bars("s", ["a", "b"], {"x": [1.0, 2.0], "y": [2.0, 1.0]})
    result = Result("toy", ("what", "value"), [["a", 1], ["b", 12345.6]], ["a note"], bars)

    def fails(_: object) -> Result:
        raise MissingError("redis-server is not installed")

    monkeypatch.setitem(SCENARIOS, "commands", Scenario("commands", "", lambda _: result))
    monkeypatch.setitem(SCENARIOS, "session50", Scenario("session50", "", fails))


def test_a_scenario_prints_a_table_and_json(toy: None) -> None:
    shown = CliRunner().invoke(main, ["commands"])
    assert shown.exit_code == 0
    assert "12,346" in shown.stdout
    assert "a note" in shown.stdout
    done = CliRunner().invoke(main, ["commands", "--json"])
    assert json.loads(done.stdout)["results"]["commands"]["rows"] == [
        {"what": "a", "value": 1},
        {"what": "b", "value": 12345.6},
    ]


def test_what_cannot_run_fails_and_the_rest_goes_on(toy: None) -> None:
    done = CliRunner().invoke(main, ["session50", "commands"])
    assert done.exit_code == 1
    assert "redis-server is not installed" in done.stdout
    assert "a note" in done.stdout
    assert CliRunner().invoke(main, ["nope"]).exit_code == 2
    assert CliRunner().invoke(main, []).exit_code == 2


def test_a_claim_that_fails_is_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for holds in (True, False):
        result = Result("toy", ("what",), [["a"]], claims=[("one is more than two", holds), ("all is well", True)])
        monkeypatch.setitem(SCENARIOS, "commands", Scenario("commands", "", lambda _, found=result: found))
        done = CliRunner().invoke(main, ["commands"])
        assert done.exit_code == (0 if holds else 1)
        assert f"{'holds' if holds else 'DOES NOT HOLD'}: one is more than two" in done.stdout
        assert "holds: all is well" in done.stdout
        told = json.loads(CliRunner().invoke(main, ["commands", "--json"]).stdout)["results"]["commands"]["claims"]
        assert told[0] == {"claim": "one is more than two", "holds": holds}


def test_a_chart_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[Settings] = []
    monkeypatch.setitem(SCENARIOS, "commands", Scenario("commands", "", ran.append))  # type: ignore[arg-type]
    monkeypatch.setattr("kvdb_tools.bench.plot.find_spec", lambda _name: None)
    done = CliRunner().invoke(main, ["commands", "--plot", str(tmp_path / "a.png")])
    assert done.exit_code == 2
    assert "pip install 'kvdb[bench]'" in done.output
    assert ran == []


def test_a_chart_is_a_picture(toy: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(main, ["commands", "--plot", str(tmp_path / "a.png")])
    assert done.exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_curves_and_bars_in_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = Curve([90, 50], [80, 30], [95, 70])
    panels = {name: {"measured": measured, "formula": Curve([91, 49])} for name in ("one", "two")}
    curves = Result("curves", ("a",), curves=Curves("%", "steps", [5, 50], panels))
    bars = Result("bars", ("a",), bars=Bars("s", ["a"], {"x": [1.0]}))
    draw([curves, bars], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(Exception, match="has a chart"):
        draw([Result("t", ("a",))], tmp_path / "a.png")


def test_redis_benchmark_is_read_behind_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "WARNING: Could not fetch server CONFIG\n"
        '"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"\n'
        '"SET","1000.00","0.2","0.1","0.3","0.4","0.5","0.6"\n'
    )
    done = subprocess.CompletedProcess([], 0, text, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert _measure("redis-benchmark", 1, "set", (50, 1), 10) == (1000.0, 0.3, 0.5)


def test_cells_are_for_people() -> None:
    assert [cell_text(cell) for cell in (None, 1234567, 0.12345, 54321.9, "x")] == [
        "", "1,234,567", "0.123", "54,322", "x",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
def test_a_bench_that_is_terminated_leaves_no_daemon() -> None:
    command = [sys.executable, "-c", "from kvdb_tools.bench import main; main()", "fork"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        end = time.monotonic() + 30
        workers: list[int] = []
        while not workers and time.monotonic() < end:
            time.sleep(0.02)
            children = flash.children_of(bench.pid)
            workers = [pid for child in children for pid in flash.children_of(child)]
        assert workers  # it is in the midst of its work
        bench.terminate()
        assert bench.wait(30) == TERMINATED
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*children, *workers))


def test_the_bare_server_answers_what_is_measured() -> None:
    with BareServer() as server, Connection(server.target) as connection:
        assert connection.call("PING") == Status("PONG")
        assert connection.call("SET", "k", "abc") == Status("OK")
        assert connection.call("GET", "k") == b"abc" and connection.call("GET", "none") is None
        assert [connection.call("HSET", "h", "f", "1") for _ in range(2)] == [1, 0]
        process = server._process
    assert process.poll() is not None
