"""Environment variables that Ray starts with: it is quiet, and leaves no token."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Of Ray's authentication: `token` or `disabled`, and the token.
_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
# Set where the user has not.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would kill workers when memory is short; the run has a memory limit of its own.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    # Ray would give workers a niceness of 15, so that every other process of the machine comes first.
    "RAY_worker_niceness": "0",
    # Ray would end this process a minute after the head is lost; `cluster.head` finds out before, and says so.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
}


@contextmanager
def own_token() -> Iterator[None]:
    """A token for a cluster that is started here.

    Ray would write one into the home folder, and from then on ask for it on clusters that the user starts.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    os.environ.setdefault(_TOKEN, _token())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@cache
def _token() -> str:
    """One for all clusters of this process, since Ray reads it once."""
    return secrets.token_hex(32)
