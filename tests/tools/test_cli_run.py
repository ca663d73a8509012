from __future__ import annotations

import io

import pytest

from kvdb_tools.cli.connection import Connection, RefusedError, Target
from kvdb_tools.cli.reply import ErrorReply, Push, Status
from kvdb_tools.cli.run import Output, Runner, follow

STREAMED = (
    b">4\r\n$8\r\nprogress\r\n$1\r\ns\r\n:1\r\n:2\r\n"
    b">4\r\n$8\r\ngenerate\r\n$1\r\ns\r\n:5\r\n$2\r\na\xc3\r\n"
    b">4\r\n$8\r\ngenerate\r\n$1\r\ns\r\n:6\r\n$1\r\n\xa8\r\n"
    b"%3\r\n$4\r\ntext\r\n$3\r\na\xc3\xa8\r\n$3\r\nids\r\n*2\r\n:5\r\n:6\r\n$6\r\nfinish\r\n$6\r\nlength\r\n"
)


def runner(server, style: str, streams: bool = False) -> tuple[Runner, io.BytesIO]:
    out = io.BytesIO()
    return Runner(Target(port=server.port), Output(style, streams), timeout=5, out=out), out


def test_an_error_reply_gives_status_1(fake_server) -> None:
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    run, out = runner(fake_server, "people")
    assert run.run([b"PING"]) == 0
    assert run.run([b"NOPE"]) == 1
    assert out.getvalue() == b"PONG\n(error) ERR unknown command\n"
    assert fake_server.n_connections == 1


def test_generated_text_appears_in_whole_characters(fake_server) -> None:
    fake_server.answers[b"GENERATE"] = STREAMED
    run, out = runner(fake_server, "people", streams=True)
    assert run.run([b"generate", b"s"]) == 0
    assert out.getvalue().decode() == 'aè\n1# "finish" => "length"\n'
    assert fake_server.commands[-1] == [b"generate", b"s", b"STREAM"]


def test_a_program_gets_what_it_asked_for(fake_server) -> None:
    fake_server.answers[b"GENERATE"] = STREAMED
    run, out = runner(fake_server, "raw")
    run.run([b"GENERATE", b"s", b"STREAM"])
    assert out.getvalue().decode() == "aè\n"
    run.run([b"GENERATE", b"s"])
    assert fake_server.commands[-1] == [b"GENERATE", b"s"]


def test_json_writes_every_frame_on_its_line(fake_server) -> None:
    fake_server.answers[b"GENERATE"] = STREAMED
    run, out = runner(fake_server, "json")
    run.run([b"GENERATE", b"s", b"STREAM"])
    lines = out.getvalue().decode().splitlines()
    assert lines[0] == '["progress", "s", 1, 2]'
    assert lines[-1] == '{"text": "aè", "ids": [5, 6], "finish": "length"}'
    assert len(lines) == 4


def test_lines_are_commands_and_comments(fake_server, capsys) -> None:
    fake_server.answers[b"SET"] = b"+OK\r\n"
    run, out = runner(fake_server, "raw")
    assert run.run_lines([b"# note\n", b"\n", b'SET k "a b"\n', b'SET "k\n']) == 2
    assert fake_server.commands[-1] == [b"SET", b"k", b"a b"]
    assert out.getvalue() == b"OK\n"
    assert "line 4" in capsys.readouterr().err


def test_a_lost_connection_is_opened_for_the_next_command(fake_server) -> None:
    fake_server.answers[b"PING"] = b"CLOSE"
    run, _ = runner(fake_server, "raw")
    with pytest.raises(ConnectionError):
        run.run([b"PING"])
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    assert run.run([b"PING"]) == 0
    assert sum(words == [b"PING"] for words in fake_server.commands) == 2  # never sent twice by itself


def test_push_frames_come_before_the_reply(fake_server) -> None:
    fake_server.answers[b"X"] = b">1\r\n+a\r\n>1\r\n+b\r\n:1\r\n"
    seen: list[Push] = []
    with Connection(Target(port=fake_server.port)) as connection:
        assert connection.call("X", on_push=seen.append) == 1
    assert seen == [Push((Status("a"),)), Push((Status("b"),))]


def test_the_greeting_carries_password_and_database(fake_server) -> None:
    fake_server.answers[b"SELECT"] = b"+OK\r\n"
    with Connection(Target(port=fake_server.port, password="p", database=3)):
        pass
    assert fake_server.commands == [[b"HELLO", b"3", b"AUTH", b"default", b"p"], [b"SELECT", b"3"]]


def test_a_refused_greeting_closes_the_connection(fake_server) -> None:
    fake_server.answers[b"AUTH"] = b"-WRONGPASS no\r\n"
    with pytest.raises(RefusedError, match="WRONGPASS"):
        Connection(Target(port=fake_server.port, password="p", protocol=2))


def test_without_a_login_one_may_still_authenticate(fake_server) -> None:
    fake_server.answers[b"HELLO"] = b"-NOAUTH HELLO must be called with the client already authenticated\r\n"
    fake_server.answers[b"GET"] = b"-NOAUTH Authentication required.\r\n"
    with Connection(Target(port=fake_server.port)) as connection:
        assert connection.call("GET", "k") == ErrorReply("NOAUTH Authentication required.")


def test_a_server_that_was_told_to_end_need_not_answer(fake_server) -> None:
    fake_server.answers[b"SHUTDOWN"] = b"CLOSE"
    assert runner(fake_server, "raw")[0].run([b"SHUTDOWN"]) == 0


def test_a_new_connection_stands_where_the_lost_one_stood(fake_server) -> None:
    fake_server.answers |= {b"SELECT": b"+OK\r\n", b"AUTH": b"+OK\r\n", b"PING": b"CLOSE"}
    run, _ = runner(fake_server, "raw")
    run.run([b"select", b"3"])
    run.run([b"AUTH", b"me", b"secret"])
    assert str(run.target).endswith("[3]")
    with pytest.raises(ConnectionError):
        run.run([b"PING"])
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    run.run([b"PING"])
    assert fake_server.commands[-3:] == [[b"HELLO", b"3", b"AUTH", b"me", b"secret"], [b"SELECT", b"3"], [b"PING"]]


def test_a_refused_select_changes_nothing(fake_server) -> None:
    fake_server.answers[b"SELECT"] = b"-ERR DB index is out of range\r\n"
    run, _ = runner(fake_server, "raw")
    run.run([b"SELECT", b"99"])
    assert run.target.database == 0


def test_what_reset_and_hello_leave() -> None:
    target = Target(user="me", password="x", database=3)
    assert follow(target, [b"RESET"]) == Target(protocol=2)
    assert follow(target, [b"HELLO", b"2"]).protocol == 2
    assert follow(target, [b"GET", b"k"]) is target


def test_messages_of_a_subscription_are_shown_as_they_come(fake_server) -> None:
    def answer(words: list[bytes]) -> bytes:
        return b">3\r\n+subscribe\r\n+c\r\n:1\r\n>3\r\n+message\r\n+c\r\n$2\r\nhi\r\n"

    fake_server.answers[b"SUBSCRIBE"] = answer
    out = io.BytesIO()
    run = Runner(Target(port=fake_server.port), Output("people", False), timeout=0.3, out=out)
    with pytest.raises(TimeoutError):
        run.run([b"SUBSCRIBE", b"c"])
    assert out.getvalue().decode().endswith('1) message\n2) c\n3) "hi"\n')
