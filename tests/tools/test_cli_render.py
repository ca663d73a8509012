from __future__ import annotations

import json

import pytest

from kvdb_tools.cli.render import as_json, for_people, raw
from kvdb_tools.cli.reply import ErrorReply, Map, Push, Reply, Set, Status, Verbatim

NESTED = Map(((b"tokens", 3), (b"ids", [1, 2]), (b"sampling", Map(((b"seed", None),))), (b"none", [])))


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Status("OK"), "OK"),
        (b"OK", '"OK"'),
        (ErrorReply("ERR no"), "(error) ERR no"),
        (7, "(integer) 7"),
        (True, "(true)"),
        (1.0, "(double) 1"),
        (0.1, "(double) 0.1"),
        (float("-inf"), "(double) -inf"),
        (None, "(nil)"),
        (Verbatim("txt", b"two\nlines"), "two\nlines"),
        ([], "(empty array)"),
        (Set(()), "(empty set)"),
        (Map(()), "(empty hash)"),
        ([b"a", [1, 2], None], '1) "a"\n2) 1) (integer) 1\n   2) (integer) 2\n3) (nil)'),
        (Set((b"a",)), '1~ "a"'),
        (Push((b"message", b"c")), '1) "message"\n2) "c"'),
        ([[1]] * 10, None),
    ],
)
def test_people_see_what_redis_cli_shows(reply: Reply, text: str | None) -> None:
    shown = for_people(reply)
    if text is not None:
        assert shown == text
    else:  # numbers are right aligned
        assert shown.splitlines()[0] == " 1) 1) (integer) 1"
        assert shown.splitlines()[9] == "10) 1) (integer) 1"


def test_maps_show_names_and_nested_values() -> None:
    assert for_people(NESTED).splitlines() == [
        '1# "tokens" => (integer) 3',
        '2# "ids" =>',
        "   1) (integer) 1",
        "   2) (integer) 2",
        '3# "sampling" =>',
        '   1# "seed" => (nil)',
        '4# "none" => (empty array)',
    ]


def test_raw_is_bytes_one_value_a_line() -> None:
    assert raw([b"\xff", 1, None, 2.5, Status("OK")]) == b"\xff\n1\n\n2.5\nOK"
    assert raw(Map(((b"k", b"v"),))) == b"k\nv"


def test_json_is_one_line_that_parses() -> None:
    line = as_json(NESTED)
    assert "\n" not in line
    assert json.loads(line) == {"tokens": 3, "ids": [1, 2], "sampling": {"seed": None}, "none": []}
    assert json.loads(as_json(ErrorReply("ERR no"))) == {"error": "ERR no"}
    assert json.loads(as_json([b"\xff", float("inf"), Map(((1, 2),))])) == ["\\xff", "inf", {"1": 2}]
