from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from kvdb_tools.cli.connection import Connection, Target, Tls
from kvdb_tools.cli.reply import Status


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One self-signed certificate with its key, for 127.0.0.1."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", path, "-out", f"{path}.crt"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("openssl cannot make a certificate here")
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture
def tls_port(fake_server, certificate: Path):
    """The scripted server behind TLS."""
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                    fake_server.serve(context.wrap_socket(client, server_side=True))
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("trust", ["cacert", "insecure"])
def test_tls_with_a_trusted_or_unchecked_certificate(tls_port: int, certificate: Path, trust: str) -> None:
    tls = Tls(cacert=str(certificate)) if trust == "cacert" else Tls(insecure=True)
    with Connection(Target(port=tls_port, tls=tls), timeout=10) as connection:
        assert connection.call("PING") == Status("PONG")


def test_an_unknown_certificate_is_refused(tls_port: int) -> None:
    with pytest.raises(OSError, match=r"(?i)certificate"):
        Connection(Target(port=tls_port, tls=Tls()), timeout=10)
