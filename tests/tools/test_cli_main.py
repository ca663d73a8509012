from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvdb_tools.cli.connection import Target
from kvdb_tools.cli.prompt import run_prompt
from kvdb_tools.cli.run import Output, Runner

CLI = [sys.executable, "-c", "from kvdb_tools.cli import main; main()"]


def cli(port: int, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CLI, "-p", str(port), *args], input=stdin, capture_output=True, timeout=30, check=False)


def test_arguments_that_look_like_options_reach_the_server(fake_server) -> None:
    fake_server.answers[b"ZADD"] = b":1\r\n"
    done = cli(fake_server.port, "ZADD", "z", "-1", "--json", "\udcff")
    assert (done.returncode, done.stdout) == (0, b"1\n")
    assert fake_server.commands[-1] == [b"ZADD", b"z", b"-1", b"--json", b"\xff"]


def test_x_takes_the_last_argument_from_stdin_unchanged(fake_server) -> None:
    fake_server.answers[b"SET"] = b"+OK\r\n"
    assert cli(fake_server.port, "-x", "SET", "k", stdin=b"a\n\x00").returncode == 0
    assert fake_server.commands[-1] == [b"SET", b"k", b"a\n\x00"]
    assert cli(fake_server.port, "-x").returncode == 2


def test_a_pipe_is_run_line_by_line(fake_server) -> None:
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    done = cli(fake_server.port, "--json", stdin=b"PING\nNOPE\n")
    assert done.returncode == 1
    assert done.stdout == b'"PONG"\n{"error": "ERR unknown command"}\n'


def test_no_server_is_status_2_and_names_the_address() -> None:
    done = cli(1, "PING")
    assert done.returncode == 2
    assert b"127.0.0.1:1" in done.stderr


def test_help_has_examples() -> None:
    done = cli(1, "--help")
    assert done.returncode == 0
    assert b"kvdb-cli -x PREFILL" in done.stdout


def test_the_shell_completes_commands(fake_server) -> None:
    fake_server.answers[b"COMMAND"] = b"%1\r\n$4\r\nfork\r\n%0\r\n"
    code = "from kvdb_tools.cli import main; main(prog_name='kvdb-cli')"
    line = f"kvdb-cli -p {fake_server.port} FO"
    env = os.environ | {"_KVDB_CLI_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=30, check=False)
    assert b"FORK" in done.stdout


@pytest.mark.parametrize("leave", ["exit\n", "\x04"])
def test_the_prompt_runs_lines_and_keeps_secrets_out_of_its_history(fake_server, tmp_path: Path, leave: str) -> None:
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    fake_server.answers[b"COMMAND"] = b"%0\r\n"
    history = tmp_path / "history"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("PING\nAUTH secret\n'open\nhelp ping\n" + leave)
        runner = Runner(
            Target(port=fake_server.port), Output("people", True), timeout=5, out=(tmp_path / "o").open("wb")
        )
        assert run_prompt(runner, history) == 0
    assert [b"PING"] in fake_server.commands
    assert "PING" in history.read_text()
    assert "secret" not in history.read_text()


def test_the_prompt_stays_when_the_server_is_gone(tmp_path: Path, capsys) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("PING\nexit\n")
        assert run_prompt(Runner(Target(port=1), Output("people", True)), tmp_path / "history") == 0
    assert "Could not talk to kvdb" in capsys.readouterr().out
