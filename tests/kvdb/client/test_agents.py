"""Retry, best of n and tree search against a daemon with dsv4-nano."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import kvdb
from kvdb.agents import RetriesExhausted, abest_of, aretry, best_of, retry, tree_search
from kvdb.client import AsyncSession, Session
from kvdb_tools.daemon import Daemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("agents") / "data") as running:
        yield running


@pytest.fixture
def session(daemon: Daemon) -> Iterator[Session]:
    with kvdb.Client("127.0.0.1", daemon.port) as client:
        client.flushall()
        made = client.session("agent")
        made.prefill("The captain opened the letter and read:")
        yield made


def write(session: Session, number: int) -> str:
    return session.generate(4, temperature=1.5, seed=number).text


def state(session: Session) -> bytes:
    return session.logits_raw()


def keys(session: Session) -> set[bytes]:
    return set(session.client.scan_iter())


def test_a_retry_starts_from_the_very_same_state(session: Session) -> None:
    starts = []

    def step(session: Session, number: int) -> str:
        starts.append(state(session))
        return write(session, number)

    done = retry(session, step, lambda text: len(starts) == 3, k=5)
    assert done.tries == 3
    assert len(set(starts)) == 1
    with session.client.session() as other:
        other.prefill("The captain opened the letter and read:")
        assert write(other, 2) == done.result
        assert state(other) == state(session)
    assert keys(session) == {b"agent"}


def test_when_no_try_is_right_the_session_is_where_it_was(session: Session) -> None:
    before = state(session)
    with pytest.raises(RetriesExhausted, match="none of 2 tries") as found:
        retry(session, write, lambda text: False, k=2)
    assert len(found.value.results) == 2
    assert state(session) == before

    def broken(session: Session, number: int) -> str:
        write(session, number)
        raise KeyError("broken")

    with pytest.raises(KeyError):
        retry(session, broken, lambda text: True)
    assert state(session) == before
    assert keys(session) == {b"agent"}


def test_the_best_branch_goes_on(session: Session) -> None:
    best = best_of(session, 4, write, len)
    assert best.score == max(best.scores) == len(best.result)
    with session.client.session() as other:
        other.prefill("The captain opened the letter and read:")
        assert write(other, best.scores.index(best.score)) == best.result
        assert state(other) == state(session)
    assert keys(session) == {b"agent"}


def test_a_search_ends_at_the_best_sequence(session: Session) -> None:
    found = tree_search(session, write, lambda texts: sum(map(len, texts)), depth=2, branching=3, width=2)
    assert found.n_steps == 3 + 6
    assert len(found.results) == 2
    assert found.score == sum(map(len, found.results))
    goal = tree_search(session, write, lambda texts: 0, depth=5, is_goal=lambda texts: len(texts) == 2)
    assert len(goal.results) == 2
    before = state(session)
    with pytest.raises(ZeroDivisionError):
        tree_search(session, write, lambda texts: 1 / 0, depth=1)
    assert state(session) == before
    assert keys(session) == {b"agent"}


async def test_the_same_with_asyncio(daemon: Daemon) -> None:
    async def awrite(session: AsyncSession, number: int) -> str:
        return (await session.generate(4, temperature=1.5, seed=number)).text

    async with kvdb.AsyncClient("127.0.0.1", daemon.port) as client:
        await client.flushall()
        session = client.session("agent")
        await session.prefill("The captain opened the letter and read:")
        tries: list[str] = []
        done = await aretry(session, awrite, lambda text: tries.append(text) or len(tries) == 2)
        assert (done.tries, done.result) == (2, tries[1])
        before = await session.logits_raw()
        with pytest.raises(RetriesExhausted):
            await aretry(session, awrite, lambda text: False, k=2)
        assert await session.logits_raw() == before

        async def broken(session: AsyncSession, number: int) -> str:
            if number:
                raise KeyError("broken")
            await asyncio.sleep(60)
            return ""

        with pytest.raises(KeyError):
            await abest_of(session, 2, broken, len)
        assert await session.logits_raw() == before
        best = await abest_of(session, 3, awrite, len)
        assert best.score == max(best.scores)
        assert [key async for key in client.scan_iter()] == [b"agent"]
