"""Addresses of running clusters, and whether a Ray head answers there.

    HOST:PORT      ray-head:6379, 192.0.2.7:6379
    [IPv6]:PORT    [2001:db8::7]:6379

A head speaks gRPC, which is HTTP/2: the client opens with a preface and a frame of SETTINGS, and so does the server.

    frame   u24 bytes of payload · u8 type (4: SETTINGS) · u8 flags (1: acknowledges) · u32 stream, 0 for SETTINGS
"""

from __future__ import annotations

import os
import socket
import time
from ipaddress import AddressValueError, IPv6Address

from qwen3_export.errors import InputError, MissingRuntimeError

# Seconds to wait for a connection, and for the frame.
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 10
_SETTINGS, _SETTING_BYTES, _FRAME_BYTES = 4, 6, 9
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0))


def parsed(address: str) -> tuple[str, int]:
    """Host without brackets, and port; InputError for a malformed address."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or any(letter.isspace() for letter in address) or not _is_port(port):
        raise InputError(f"--cluster {address}: local, local:N, auto or HOST:PORT was expected")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            IPv6Address(host)
        except AddressValueError as error:
            raise InputError(f"--cluster {address}: no IPv6 address is in the brackets ({error})") from error
    elif any(letter in host for letter in ":[]"):
        raise InputError(
            f"--cluster {address}: local, local:N, auto or HOST:PORT was expected",
            "an IPv6 address stands in brackets, such as '[::1]:6379'",
        )
    return host, int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535


def check_reachable(address: str) -> None:
    """Raise MissingRuntimeError at once where no Ray head answers; Ray would try for minutes."""
    host, port = parsed(address)
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS) as connection:
            # With Ray's TLS on, the head waits for certificates, which Ray itself brings.
            if not _uses_tls() and not _greets(connection):
                raise MissingRuntimeError(
                    f"--cluster {address}: something listens there, but does not answer as a Ray head does",
                    "give the address that ray start --head prints; a head with TLS needs RAY_USE_TLS=1",
                )
    except (OSError, UnicodeError) as error:
        raise MissingRuntimeError(
            f"--cluster {address}: no Ray cluster answers there ({error})",
            f"start one there: ray start --head --port={port}",
        ) from error


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _greets(connection: socket.socket) -> bool:
    """Whether the first frame of the other side is one of SETTINGS."""
    deadline, frame = time.monotonic() + _ANSWER_SECONDS, b""
    try:
        connection.sendall(_PREFACE)
        while len(frame) < _FRAME_BYTES:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            piece = connection.recv(_FRAME_BYTES - len(frame))
            if not piece or time.monotonic() > deadline:
                return False
            frame += piece
    except OSError:
        return False
    count, kind, flags, stream = int.from_bytes(frame[:3]), frame[3], frame[4], int.from_bytes(frame[5:])
    return (kind, flags & 1, stream) == (_SETTINGS, 0, 0) and count % _SETTING_BYTES == 0
