"""Whether a cluster's head still answers, asked while a call is awaited.

Ray ends a process with exit code 1 and no error when the head has been gone for a minute. So this is told before.
"""

from __future__ import annotations

import socket
import time

from qwen3_export.cluster.address import parsed
from qwen3_export.errors import ResourceError

# A head may be busy, or be started anew: it is lost when no connection succeeds for so many seconds.
_LOST_SECONDS, _CONNECT_SECONDS, _PAUSE_SECONDS = 15, 5, 1


class LostHeadError(ResourceError):
    """The cluster's head, or its process on this machine, does not answer any more."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint or "start the cluster again if it was yours, and repeat the command")


def check_head(address: str) -> None:
    """Raise LostHeadError when nobody listens at the head's address."""
    deadline = time.monotonic() + _LOST_SECONDS
    while True:
        try:
            with socket.create_connection(parsed(address), _CONNECT_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostHeadError(f"the head of the Ray cluster, {address}, was lost") from error
        time.sleep(_PAUSE_SECONDS)


def check_store(path: str) -> None:
    """Raise LostHeadError when nobody listens at the socket of the object store.

    It is that of the raylet on this machine, without which Ray ends this process with exit code 1.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise LostHeadError("Ray's process on this machine, the raylet, was lost") from error
        except OSError:
            return  # It is busy.
