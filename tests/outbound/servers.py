"""Small real servers and a recording dialler for tests of the outbound client."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from e2a.core.addresses import IPAddress

PUBLIC = "93.184.215.14"
OTHER_PUBLIC = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


@dataclass
class Dialled:
    """A dialler that notes every address and connects to a local port instead of the internet."""

    port: int
    addresses: list[str] = field(default_factory=list)

    def __call__(self, sock: socket.socket, address: IPAddress, port: int) -> None:
        self.addresses.append(str(address))
        if sock.family == socket.AF_INET6:
            raise ConnectionRefusedError("no IPv6 here")
        sock.connect(("127.0.0.1", self.port))


@dataclass
class Lookups:
    """A resolver that gives its answers one after the other; the last one stays."""

    answers: Sequence[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


@dataclass
class RawServer:
    """Accepts connections, notes what comes first on each, and answers with fixed bytes."""

    port: int
    received: list[bytes] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)

    @property
    def connections(self) -> int:
        return len(self.received)


@contextmanager
def raw_server(
    answer: bytes, *, tls: ssl.SSLContext | None = None, keep_open: bool = False
) -> Iterator[RawServer]:
    """Serves `answer` to each request. `keep_open`: holds the connection after it, until the server ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = RawServer(listener.getsockname()[1])
    ends = threading.Event()
    if tls is not None:
        tls.sni_callback = lambda connection, name, context: server.server_names.append(name)

    def serve(connection: socket.socket) -> None:
        connection.settimeout(10)
        try:
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                while request := connection.recv(65536):
                    server.received.append(request)
                    connection.sendall(answer)
                    if keep_open:
                        ends.wait(10)
                        return
        except OSError:
            return  # The client hung up: what these tests are about.

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        ends.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server context, client context that trusts it) of a self-signed certificate for one name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        alternative = x509.DNSName(name)
    today = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - dt.timedelta(days=1))
        .not_valid_after(today + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / f"{name.replace(':', '_')}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    client = ssl.create_default_context(cafile=str(pem))
    return server, client
