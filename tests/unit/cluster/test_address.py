"""Addresses of clusters: what is malformed, and what listens but is no Ray head."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from qwen3_export.cluster import address
from qwen3_export.cluster.address import check_reachable, parsed
from qwen3_export.errors import InputError, MissingRuntimeError

# An empty frame of SETTINGS, and one that acknowledges the client's, which may not come first.
SETTINGS, ACKNOWLEDGED = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), bytes((0, 0, 0, 4, 1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("head:6379", "head", 6379), ("[::1]:6379", "::1", 6379), ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535)],
)
def test_hosts_and_ports(text: str, host: str, port: int) -> None:
    assert parsed(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *("head:0", "head:65536", "head:99999999999999999999999", "head:٣٣٣٣", "head:", ":6379", "head", "he ad:6379"),
        *("::1:6379", "[::1:6379", "::1]:6379", "[head]:6379", "[]:6379", "[127.0.0.1]:6379", "[::1]", "ray://head:1"),
    ],
)
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(InputError, match="--cluster"):
        parsed(text)


@contextmanager
def listening(answer: Callable[[socket.socket], None], family: socket.AddressFamily = socket.AF_INET) -> Iterator[str]:
    """A server on this machine that accepts one connection and answers it; its address."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:

        def serve() -> None:
            with suppress(OSError), server.accept()[0] as connection:
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{host}:{server.getsockname()[1]}" if host != "::1" else f"[::1]:{server.getsockname()[1]}"
        thread.join(30)


def _greets(connection: socket.socket) -> None:
    assert connection.recv(100).startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    for byte in SETTINGS:  # the network may cut a frame in pieces
        connection.sendall(bytes((byte,)))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_what_greets_is_reachable(family: socket.AddressFamily) -> None:
    with listening(_greets, family) as place:
        check_reachable(place)


def _is_silent(connection: socket.socket) -> None:
    while connection.recv(100):
        pass


def _drips(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"\0")
        time.sleep(0.2)


def _says(text: bytes) -> Callable[[socket.socket], None]:
    def say(connection: socket.socket) -> None:
        connection.sendall(text)
        _is_silent(connection)

    return say


@pytest.mark.parametrize(
    "answer",
    [_is_silent, _drips, socket.socket.close, *map(_says, (b"SSH-2.0-OpenSSH_9.6\r\n", ACKNOWLEDGED, SETTINGS[:5]))],
)
def test_what_is_no_ray_head_is_refused_soon(
    answer: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "_ANSWER_SECONDS", 0.5)
    with listening(answer) as place:
        with pytest.raises(MissingRuntimeError, match=f"--cluster {place}: .* does not answer as a Ray head") as caught:
            check_reachable(place)
        _is_one_short_line(caught.value.hint)


def test_where_nothing_listens_the_hint_is_one_short_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(MissingRuntimeError, match="no Ray cluster answers there") as caught:
        check_reachable(f"127.0.0.1:{port}")
    _is_one_short_line(caught.value.hint)


def _is_one_short_line(hint: str | None) -> None:
    assert hint is not None
    assert "ray start --head" in hint
    assert "\n" not in hint
    assert len(hint) < 90


def test_a_web_server_is_no_ray_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(MissingRuntimeError, match="does not answer as a Ray head"):
            check_reachable(f"127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_head_with_tls_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening(socket.socket.close) as place:
        check_reachable(place)
