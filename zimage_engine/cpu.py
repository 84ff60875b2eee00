"""How many threads a process may compute with: reads what the machine grants it, decides, tells torch.

Torch starts a thread for each core that it sees. It sees an affinity mask; it does not see that a container
may use only two cores' worth of time out of 64, where 64 threads wait for one another. Knows no model.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]

from zimage_engine.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cores:
    """What of the machine this process may use; None where the system does not tell.

    `allowed` are the processors that it may run on, `physical` the cores that those are: two threads of one
    core share its arithmetic. `quota` is the time that its control groups grant it, in processors: 1.5 is
    three seconds of computing in two.
    """

    allowed: int
    physical: int | None = None
    quota: float | None = None


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """How many threads to compute with and why; `is_ours` False: someone else decided, and it stays so."""

    threads: int
    because: str
    is_ours: bool = True


def plan_threads(
    cores: Cores,
    *,
    wanted: int | None = None,
    variable: str | None = None,
    torch_threads: int | None = None,
    workers: int = 1,
) -> ThreadPlan:
    """The threads to compute with: what a person said, else every core that may be used, shared by `workers`.

    `wanted` is what was asked of us, `variable` what OMP_NUM_THREADS says, `torch_threads` what torch is set
    to at present: a number that torch would not have chosen by itself was set by the program, and stays.
    """
    if wanted is not None:
        return ThreadPlan(wanted, f"{_counted(wanted, 'thread')}, as asked for")
    if variable is not None and variable.isdecimal() and int(variable) > 0:
        said = torch_threads or int(variable)
        return ThreadPlan(said, f"{_counted(said, 'thread')}: OMP_NUM_THREADS is {variable}", False)
    if torch_threads is not None and torch_threads not in (cores.allowed, cores.physical):
        return ThreadPlan(torch_threads, f"{_counted(torch_threads, 'thread')}, as the program set it", False)
    usable, because = _usable(cores)
    if workers > 1:
        threads = max(1, usable // workers)
        because = f"{because}, shared by {workers} workers; cpu_threads sets another number"
    else:
        threads = usable
    return ThreadPlan(threads, f"{_counted(threads, 'thread')}: {because}")


def _usable(cores: Cores) -> tuple[int, str]:
    """The tightest bound, and what it is called; of equals the first."""
    bounds = [(cores.allowed, f"the process may run on {_counted(cores.allowed, 'processor')}")]
    if cores.physical is not None:
        bounds.append(
            (
                cores.physical,
                f"its {_counted(cores.allowed, 'processor')} are {_counted(cores.physical, 'core')}",
            )
        )
    if cores.quota is not None:
        # Rounded down: with two threads on the time of 1.5 processors each waits for one that is held back,
        # and a picture took several times as long as with one (measured, tests/benchmarks/REPORT.md).
        time_of = f"{cores.quota:g} processor" + ("" if cores.quota == 1 else "s")
        bounds.append((math.floor(cores.quota), f"the container may use the time of {time_of}"))
    usable, because = min(bounds, key=lambda bound: bound[0])
    return max(1, usable), because


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def read_cores() -> Cores:
    """What this process may use now."""
    if sys.platform == "linux":
        allowed = os.sched_getaffinity(0)
        return Cores(len(allowed), read_physical(allowed), read_quota())
    return Cores(os.cpu_count() or 1, psutil.cpu_count(logical=False))


def use_cores(wanted: int | None = None) -> ThreadPlan:
    """Let torch compute with `wanted` threads, None: with as many as the process has cores.

    That holds for this and all later threads of the process. What OMP_NUM_THREADS or the program has set
    stays. Raises InvalidRequest for less than one.
    """
    import torch

    if wanted is not None and wanted < 1:
        raise InvalidRequest(
            f"threads must be 1 or more, got {wanted}; leave it out for every core", "threads"
        )
    before = torch.get_num_threads()
    variable = os.environ.get("OMP_NUM_THREADS")
    plan = plan_threads(read_cores(), wanted=wanted, variable=variable, torch_threads=before)
    if not plan.is_ours or plan.threads == before:
        # Where nothing changes there is nothing to say on a terminal.
        logger.debug("cpu: %s", plan.because)
        return plan
    torch.set_num_threads(plan.threads)
    logger.info("cpu: %s", plan.because)
    return plan


def read_physical(allowed: Collection[int], root: Path = Path("/")) -> int | None:
    """How many cores the processors `allowed` are; None where the system does not tell."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({(root / topology.format(number)).read_text() for number in allowed})
    except OSError:
        return None


def read_quota(root: Path = Path("/")) -> float | None:
    """The processors' worth of time of this process's control group or, where tighter, of one above it.

    Reads version 1 and version 2 of Linux's control groups. None: no limit, or none that can be seen.
    """
    quotas = (_quota_in(folder) for folder in control_group_folders("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def control_group_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Where the control group of this process and those above it tell of `controller`, such as "memory".

    Empty where the system has none, or shows none.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    return [root / folder for folder in _group_folders(controller, groups, mounts)]


def _group_folders(controller: str, groups: list[str], mounts: list[str]) -> Iterator[str]:
    """Those folders without the leading slash. The formats: cgroups(7), proc(5)."""
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in groups)}
    in_v1 = next((path for controllers, path in own.items() if controller in controllers.split(",")), None)
    for mount in mounts:
        about, _, system = mount.partition(" - ")
        mount_root, mount_point = about.split()[3:5]
        kind, _, options = system.split(" ", 2)
        is_v1 = kind == "cgroup" and controller in options.split(",")
        path = own.get("") if kind == "cgroup2" else in_v1 if is_v1 else None
        if path is None:
            continue
        # In a container the mount may show the group itself, while the path is as the host sees it.
        group = PurePosixPath(path)
        inside = group.relative_to(mount_root) if group.is_relative_to(mount_root) else PurePosixPath()
        for folder in (inside, *inside.parents):
            yield str(PurePosixPath(mount_point) / folder).lstrip("/")


def _quota_in(folder: Path) -> float | None:
    """What one group grants: `cpu.max` is "max 100000" or "150000 100000"; -1 is no limit in version 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None
