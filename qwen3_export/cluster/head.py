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
    """The cluster's head does not answer any more."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"the head of the Ray cluster, {address}, was lost",
            "start the cluster again if it was yours, and repeat the command",
        )
        self.address = address

    def __reduce__(self) -> tuple[type[LostHeadError], tuple[str]]:
        """As Ray sends it from worker to driver."""
        return type(self), (self.address,)


def check_head(address: str) -> None:
    """Raise LostHeadError when nobody listens at the head's address."""
    deadline = time.monotonic() + _LOST_SECONDS
    while True:
        try:
            with socket.create_connection(parsed(address), _CONNECT_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostHeadError(address) from error
        time.sleep(_PAUSE_SECONDS)
