from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from kvdb_protocol.frames import FrameReader


def start_worker(spec: str) -> tuple[subprocess.Popen[bytes], socket.socket, list[dict[str, object]]]:
    """A worker process, our end of its socket, and its first messages."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "kvdb_engine", spec, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    theirs.close()
    ours.settimeout(60)
    reader = FrameReader()
    messages: list[dict[str, object]] = []
    while not messages and (data := ours.recv(1 << 16)):
        messages += reader.feed(data)
    return process, ours, messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_only_the_closed_socket_ends_the_worker(number: signal.Signals) -> None:
    process, ours, messages = start_worker("synthetic:dsv4-nano")
    assert messages[0]["ev"] == "ready"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    ours.close()
    assert process.wait(30) == 0


def test_a_model_that_is_not_there_is_said_so() -> None:
    process, ours, messages = start_worker("/no/such/model")
    assert messages[0]["ev"] == "fatal"
    assert "/no/such/model" in str(messages[0]["message"])
    assert process.wait(30) == 1
    ours.close()
