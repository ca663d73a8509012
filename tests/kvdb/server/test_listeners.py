"""TCP, IPv6, unix sockets, TLS with and without client certificates, many connections."""

from __future__ import annotations

import resource
import shutil
import socket
import ssl
import stat
import subprocess
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb.acl import Acl
from kvdb.config import from_pairs
from kvdb.net.listeners import is_local, protected_mode_refusal, tune

from .conftest import StartDaemon, Wire, free_port, request

OK = ("+", b"OK")


def test_tcp_and_ipv6(start: StartDaemon) -> None:
    daemon = start(port=True)
    assert daemon.tcp()("PING") == ("+", b"PONG")
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        sock = socket.create_connection(("::1", daemon.port), timeout=5)
    except OSError:
        pytest.skip("no IPv6 here")
    sock.sendall(request("CLIENT", "INFO"))
    assert b"addr=[::1]:" in sock.recv(1000)


def test_probes_of_silent_connections() -> None:
    """None on this machine: a burst of probes overflows the loopback device, and connections that are well are cut."""
    found = []
    for local in (False, False, True):
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            sock, _ = server.accept()
            with sock:
                tune(sock, 30_000, is_local=local)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is not local
                if hasattr(socket, "TCP_KEEPIDLE") and not local:
                    idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                    assert 150_00 <= idle <= 30_000
                    found.append(idle)
    assert len(set(found)) == len(found), "not all at the same moment"


@pytest.mark.parametrize(
    ("peer", "local", "expected"),
    [
        ("127.0.0.2:4711", "127.0.0.1:6374", True),
        ("[::1]:4711", "[::1]:6374", True),
        ("[::ffff:127.0.0.1]:4711", "[::ffff:127.0.0.1]:6374", True),
        ("10.0.0.7:4711", "10.0.0.7:6374", True),
        ("10.0.0.8:4711", "10.0.0.7:6374", False),
        ("[fe80::2]:4711", "[fe80::1]:6374", False),
    ],
)
def test_who_is_on_this_machine(peer: str, local: str, expected: bool) -> None:
    client: Any = SimpleNamespace(peer=peer, local=local)
    assert is_local(client) is expected


def test_unix_socket_permissions(start: StartDaemon) -> None:
    daemon = start(unixsocketperm="700")
    assert stat.S_IMODE(Path(daemon.path).stat().st_mode) == 0o700
    assert b"flags=U" in daemon.wire()("CLIENT", "INFO")[1]  # type: ignore[operator]
    assert daemon.stop() == 0
    assert not Path(daemon.path).exists()
    assert start(daemon.folder).wire()("PING") == ("+", b"PONG")


def test_a_socket_file_left_behind_is_replaced(start: StartDaemon) -> None:
    daemon = start()
    daemon.stop(9)
    assert Path(daemon.path).exists()
    assert start(daemon.folder).wire()("PING") == ("+", b"PONG")


@pytest.mark.parametrize(
    ("peer", "options", "refused"),
    [
        ("192.0.2.1:5", {}, True),
        ("192.0.2.1:5", {"protected-mode": "no"}, False),
        ("192.0.2.1:5", {"requirepass": "x"}, False),
        ("127.0.0.1:5", {}, False),
        ("127.9.9.9:5", {}, False),
        ("[::1]:5", {}, False),
        ("[::ffff:127.0.0.1]:5", {}, False),
        ("[::ffff:192.0.2.1]:5", {}, True),
        ("[2001:db8::1]:5", {}, True),
    ],
)
def test_protected_mode(peer: str, options: dict[str, str], refused: bool) -> None:
    class Fake:
        config = from_pairs([(name, [value]) for name, value in options.items()])
        acl = Acl()

    class Peer:
        listener = "tcp"

    fake, client = Fake(), Peer()
    fake.acl.set_default_password(options.get("requirepass", ""))
    client.peer = peer  # type: ignore[attr-defined]
    answer = protected_mode_refusal(fake, client)  # type: ignore[arg-type]
    assert (answer is not None) is refused
    assert answer is None or answer.startswith("DENIED ")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates it signed for a server and a client; `other` is nobody's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(*new, "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca")
    openssl(*new, "-x509", "-days", "2", "-keyout", "other.key", "-out", "other.crt", "-subj", "/CN=other")
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                "-CAcreateserial", "-out", f"{name}.crt")  # fmt: skip
    return folder


def tls_wire(port: int, folder: Path, certificate: str | None) -> Wire:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.check_hostname = False
    if certificate:
        context.load_cert_chain(folder / f"{certificate}.crt", folder / f"{certificate}.key")
    wire = Wire.__new__(Wire)
    wire.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10))
    wire.file = wire.sock.makefile("rb")
    return wire


TLS = [
    ("no", None, True),
    ("no", "client", True),
    ("optional", None, True),
    ("optional", "client", True),
    ("optional", "other", False),
    ("yes", None, False),
    ("yes", "client", True),
    ("yes", "other", False),
]


@pytest.fixture(scope="module")
def tls_ports(start: StartDaemon, certificates: Path) -> dict[str, int]:
    ports = {}
    for mode in ("no", "optional", "yes"):
        ports[mode] = free_port()
        start(
            tls_port=ports[mode],
            tls_cert_file=certificates / "server.crt",
            tls_key_file=certificates / "server.key",
            tls_ca_cert_file=certificates / "ca.crt",
            tls_auth_clients=mode,
            requirepass="pw",
        )
    return ports


@pytest.mark.parametrize(("mode", "certificate", "accepted"), TLS)
def test_tls(tls_ports: dict[str, int], certificates: Path, mode: str, certificate: str | None, accepted: bool) -> None:
    try:
        wire = tls_wire(tls_ports[mode], certificates, certificate)
        assert wire("GET", "k") == ("-", b"NOAUTH Authentication required.")
    except (ssl.SSLError, OSError):
        assert not accepted
        return
    assert accepted
    assert wire("AUTH", "pw") == OK
    value = bytes(range(256)) * 8192
    assert wire("SET", "k", value) == OK
    wire.raw(request("GET", "k") * 3)
    assert [wire.reply() for _ in range(3)] == [("$", value)] * 3


def test_plain_text_on_the_tls_port(tls_ports: dict[str, int]) -> None:
    with socket.create_connection(("127.0.0.1", tls_ports["no"]), timeout=10) as sock:
        sock.sendall(request("PING"))
        assert b"PONG" not in sock.recv(100)


def test_https(start: StartDaemon, certificates: Path) -> None:
    """The HTTP port over TLS, with the same files and the same demand for client certificates."""
    port = free_port()
    start(
        http_tls_port=port,
        tls_cert_file=certificates / "server.crt",
        tls_key_file=certificates / "server.key",
        tls_ca_cert_file=certificates / "ca.crt",
        tls_auth_clients="yes",
    )
    context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    context.check_hostname = False
    url = f"https://127.0.0.1:{port}/healthz"
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10, context=context).read()
    context.load_cert_chain(certificates / "client.crt", certificates / "client.key")
    with urllib.request.urlopen(url, timeout=10, context=context) as reply:
        assert reply.read() == b"ok\n"
    with pytest.raises(OSError):
        urllib.request.urlopen(url.replace("https", "http"), timeout=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "TLS needs tls-cert-file and tls-key-file"),
        ({"tls-cert-file": "nosuch", "tls-key-file": "nosuch"}, "cannot use the TLS files"),
    ],
)
def test_bad_tls_files(tmp_path: Path, options: dict[str, str], message: str) -> None:
    import sys

    words = [sys.executable, "-m", "kvdb", "--dir", str(tmp_path), "--model", "", "--port", "0", "--tls-port", "1"]
    for name, value in options.items():
        words += [f"--{name}", value]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and message in ran.stdout


def test_a_thousand_connections(start: StartDaemon) -> None:
    """Idle connections cost little, half-sent commands and clients that never read hurt nobody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    daemon = start()
    wire = daemon.wire()
    before = int(info(wire, "used_memory"))
    wires = []
    for _ in range(1000):
        wires.append(daemon.wire())
        assert wires[-1]("PING") == ("+", b"PONG")
    for number, each in enumerate(wires):
        if number % 3 == 1:
            each.raw(b"*2\r\n$3\r\nGET\r\n$10\r\nhalf")
        elif number % 3 == 2:
            each.raw(request("PING") * 100)
    assert int(info(wire, "connected_clients")) == 1001
    assert (int(info(wire, "used_memory")) - before) / 1000 < 20_000
    for each in wires:
        each.close()
    for _ in range(200):
        if int(info(wire, "connected_clients")) == 1:
            break
    assert int(info(wire, "connected_clients")) == 1


def info(wire: Wire, field: str) -> str:
    text: str = wire("INFO")[1].decode()  # type: ignore[attr-defined]
    return next(line.partition(":")[2] for line in text.splitlines() if line.startswith(field + ":"))
