"""Keys, users, and what each may do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import kvdb
from kvdb.errors import NoPermError
from kvdb.http.access import check_local
from kvdb_tools.daemon import Daemon, free_port

from .conftest import MODEL, Served

ASKED = {"model": MODEL, "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port = free_port()
    with Daemon(tmp_path_factory.mktemp("http") / "data", {"http-port": str(port)}) as daemon:
        redis = kvdb.Client("127.0.0.1", daemon.port)
        redis.execute_command("ACL", "SETUSER", "team", "on", ">team-key", "~team:*", "+@all")
        redis.execute_command("ACL", "SETUSER", "reader", "on", ">read-key", "~*", "+get")
        redis.execute_command("ACL", "SETUSER", "gone", "off", ">gone-key", "~*", "+@all")
        redis.config_set("requirepass", "main-key")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client


@pytest.mark.parametrize(
    ("headers", "status", "word"),
    [
        ({}, 401, "noauth"),
        ({"authorization": "Bearer wrong"}, 401, "wrongpass"),
        ({"authorization": "Bearer gone-key"}, 401, "wrongpass"),
        ({"authorization": "Bearer read-key"}, 403, "noperm"),
        ({"authorization": "Bearer main-key"}, 200, None),
        ({"authorization": "bearer team-key"}, 200, None),
        ({"x-api-key": "team-key"}, 200, None),
        ({"x-api-key": "team-key", "x-kvdb-session": "team:a"}, 200, None),
        ({"x-api-key": "team-key", "x-kvdb-session": "other:a"}, 403, "noperm"),
        ({"x-api-key": "team-key", "x-kvdb-snapshot": "other:a"}, 403, "noperm"),
        ({"x-api-key": "team-key", "x-kvdb-snapshot": "team:snap"}, 200, None),
    ],
)
def test_keys(http: httpx.Client, headers: dict[str, str], status: int, word: str | None) -> None:
    reply = http.post("/v1/completions", json=ASKED, headers=headers)
    assert reply.status_code == status
    if word is not None:
        assert reply.json()["error"]["code"] == word
    assert http.get("/v1/models", headers=headers).status_code == (401 if status == 401 else 200)


def test_errors_have_the_dialect_of_their_path(http: httpx.Client) -> None:
    found = http.post("/v1/messages", json={}).json()
    assert (found["type"], found["error"]["type"]) == ("error", "authentication_error")
    found = http.post("/v1/chat/completions", json={}).json()
    assert found["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nothing", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/messages", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b'{"prompt": "cut \\ud83d"}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\uDE00"}]}', 400),
    ],
)
def test_bad_requests(http: httpx.Client, method: str, path: str, body: bytes, status: int) -> None:
    reply = http.request(method, path, content=body, headers={"authorization": "Bearer main-key"})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_packed_bodies_are_refused_with_a_word(http: httpx.Client) -> None:
    headers = {"x-api-key": "main-key", "content-encoding": "zstd"}
    reply = http.post("/v1/responses", content=b"\x28\xb5\x2f\xfd", headers=headers)
    assert (reply.status_code, "zstd is not supported" in reply.json()["error"]["message"]) == (415, True)


def test_what_strangers_send_is_not_collected(http: httpx.Client) -> None:
    """The key is looked at before the body, which here is more than any body may be."""

    def body() -> Iterator[bytes]:
        for _ in range(1100):
            yield bytes(65536)

    assert http.post("/v1/messages", content=body()).status_code == 401
    assert http.post("/v1/messages", content=body(), headers={"x-api-key": "main-key"}).status_code == 413


def test_text_that_is_whole_is_welcome(http: httpx.Client) -> None:
    body = b'{"prompt": "\\ud83d\\ude00 \\\\ud83d", "max_tokens": 1}'
    assert http.post("/v1/completions", content=body, headers={"x-api-key": "main-key"}).status_code == 200


def test_responses_belong_to_their_user(http: httpx.Client) -> None:
    asked = {"model": MODEL, "input": "x", "max_output_tokens": 1}
    mine = http.post("/v1/responses", json=asked, headers={"authorization": "Bearer team-key"}).json()["id"]
    assert http.get(f"/v1/responses/{mine}", headers={"authorization": "Bearer team-key"}).status_code == 200
    assert http.get(f"/v1/responses/{mine}", headers={"authorization": "Bearer main-key"}).status_code == 404


@pytest.mark.parametrize(
    ("peer", "asked", "is_served"),
    [
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("127.0.0.1", "kvdb.localhost", True),
        (None, None, True),
        ("127.0.0.1", "evil.example", False),  # a page whose name points here
        ("127.0.0.1", "localhost.evil.example", False),
        ("192.168.1.7", "localhost", False),
        ("fe80::1%eth0", "localhost", False),
    ],
)
def test_without_a_password_only_this_machine_is_served(peer: str | None, asked: str | None, is_served: bool) -> None:
    if is_served:
        check_local(peer, asked)
        return
    with pytest.raises(NoPermError, match="protected mode"):
        check_local(peer, asked)


def test_a_page_whose_name_points_here_is_refused(served: Served) -> None:
    port = served.http.base_url.port
    assert served.http.get("/v1/models").status_code == 200
    reply = served.http.get("/v1/models", headers={"host": f"evil.example:{port}"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "noperm")


def test_no_cross_origin_headers(http: httpx.Client) -> None:
    reply = http.get("/v1/models", headers={"authorization": "Bearer main-key", "origin": "http://evil.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]
