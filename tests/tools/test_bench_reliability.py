from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvdb_engine.dsml import ToolCall
from kvdb_tools.bench.agent_task import Task, evaluate, is_right
from kvdb_tools.bench.reliability import Cost, expected, make_result, successes, wilson


def test_every_request_is_right_when_done_right_and_wrong_otherwise() -> None:
    task = Task(random.Random(1))
    requests = [task.next() for _ in range(200)]
    assert {request.tool for request in requests} == {"calculator", "note_write", "note_read"}
    for request, other in pairwise(requests):
        assert is_right(request, (request.right,))
        assert not is_right(request, ())
        assert not is_right(request, (request.right, request.right))
        if request.outcome != other.outcome:
            assert not is_right(request, (other.right,))


def test_spelling_does_not_matter() -> None:
    task = Task(random.Random(2))
    request = next(request for request in iter(task.next, None) if "plus" in request.text)
    a, b = (int(word.strip("?")) for word in request.text.split() if word.strip("?").isdigit())
    assert is_right(request, (ToolCall("calculator", f'{{"expression": "{b} + {a}"}}'),))
    assert not is_right(request, (ToolCall("calculator", f'{{"expression": "{a} + {b} + 1"}}'),))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("-(4-9)", 5),
        ("7//2", 3),
        ("1/0", None),
        ("__import__('os')", None),
        ("9**9**9", None),
        ("", None),
    ],
)
def test_evaluate(text: str, value: int | None) -> None:
    assert evaluate(text) == value


def test_the_numbers() -> None:
    tries = [[1, 1, 2, 1, 1, 1, 1, 1, 1, 3], [1] * 10]
    assert successes(tries, 5, 1) == (2, 4)
    assert successes(tries, 5, 2) == (3, 4)
    assert successes(tries, 10, 3) == (2, 2)
    assert expected(0.9, 2, 1) == pytest.approx(0.81)
    assert expected(0.9, 2, 2) == pytest.approx(0.9801)
    low, high = wilson(9, 10)
    assert 0.59 < low < 0.61 and 0.98 < high < 0.99
    result = make_result(tries, Cost(8192, 5.0, 2000.0))
    assert [row[:3] for row in result.rows if row[1] == 1] == [[5, 1, 4], [10, 1, 2]]
    assert next(row[3] for row in result.rows if row[:2] == [5, 2]) == "75.0"
    assert "18 of 20" in result.notes[0]
    assert "400 times" in result.notes[3]
    assert [holds for _, holds in result.claims] == [True]
    assert make_result(tries, Cost(8192, 50.0, 2000.0)).claims[0][1] is False


def test_a_prediction_knows_that_some_steps_are_harder() -> None:
    """Half the failing steps never come out right: the formula promises nearly all, the measured share does not."""
    tries = [[11 if number == 7 else 2 if number == 3 else 1 for number in range(20)]]
    result = make_result(tries, Cost(2048, 5.0, 2000.0))
    row = next(row for row in result.rows if row[:2] == [20, 2])
    assert row[3] == "0.0"
    assert float(str(row[5])) > 80
    assert float(str(row[6])) < 40
    assert result.curves is not None and len(result.curves.panels) == 4
    assert not result.claims  # 2,048 tokens say nothing about 8,192
