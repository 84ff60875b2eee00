"""Which of Serve's replicas this process is; in a test without Ray it is none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def replica_name() -> str:
    """Serve's name of this replica; "local" where no replica runs."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return "local"


def end_replica(exit_code: int) -> None:
    """End this process at once, where it is a replica: Serve starts another in its place, on a fresh device.

    Serve would replace one that says it is unhealthy too, but after three checks and a graceful shutdown.
    """
    if replica_name() != "local":
        os._exit(exit_code)


def own_ingresses() -> DeploymentHandle | None:
    """A handle to all ingresses of this replica's application; None where no replica runs."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        return None
    return serve.get_app_handle(context.app_name)


def own_deployment() -> DeploymentHandle | None:
    """A handle to all replicas of this process' deployment; None where no replica runs."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        return None
    return serve.get_deployment_handle(context.deployment, context.app_name)
