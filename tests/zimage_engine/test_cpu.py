from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zimage_engine.cpu import Cores, plan_threads, read_cores, read_physical, read_quota, use_cores
from zimage_engine.errors import InvalidRequest

ALONE = Cores(allowed=8, physical=8)
IN_A_CONTAINER = Cores(allowed=64, physical=32, quota=2.5)


@pytest.mark.parametrize(
    ("cores", "told", "threads", "said"),
    [
        (ALONE, {}, 8, "8 threads: the process may run on 8 processors"),
        (Cores(8, 4), {}, 4, "its 8 processors are 4 cores"),
        (Cores(8), {}, 8, "8 processors"),
        (Cores(1, 1), {}, 1, "1 thread: the process may run on 1 processor"),
        (Cores(64, 64, 64.0), {}, 64, "64 processors"),
        (IN_A_CONTAINER, {}, 2, "2 threads: the container may use the time of 2.5 processors"),
        (IN_A_CONTAINER, {"torch_threads": 32}, 2, "2.5 processors"),
        (IN_A_CONTAINER, {"torch_threads": 64}, 2, "2.5 processors"),
        (IN_A_CONTAINER, {"torch_threads": 16}, 16, "as the program set it"),
        (IN_A_CONTAINER, {"wanted": 48}, 48, "as asked for"),
        (IN_A_CONTAINER, {"wanted": 48, "variable": "7", "torch_threads": 16}, 48, "as asked for"),
        (IN_A_CONTAINER, {"variable": "64"}, 64, "OMP_NUM_THREADS is 64"),
        (IN_A_CONTAINER, {"variable": "64", "torch_threads": 5}, 5, "OMP_NUM_THREADS is 64"),
        (IN_A_CONTAINER, {"variable": "many"}, 2, "2.5 processors"),
        (Cores(64, 32, 1.0), {}, 1, "the time of 1 processor"),
        (Cores(64, 32, 0.1), {}, 1, "0.1 processors"),
        (
            Cores(8, 8),
            {"workers": 3},
            2,
            "8 processors, shared by 3 workers; cpu_threads sets another number",
        ),
        (Cores(8, 8), {"workers": 30}, 1, "shared by 30 workers"),
        (Cores(8, 8), {"workers": 3, "wanted": 8}, 8, "as asked for"),
    ],
)
def test_threads_are_planned_by_the_tightest_bound(
    cores: Cores, told: dict[str, Any], threads: int, said: str
) -> None:
    plan = plan_threads(cores, **told)
    assert plan.threads == threads
    assert said in plan.because


@pytest.mark.parametrize("told", [{"variable": "4"}, {"torch_threads": 5}])
def test_what_someone_else_set_is_left_alone(told: dict[str, Any]) -> None:
    assert not plan_threads(IN_A_CONTAINER, **told).is_ours


V2 = "31 24 0:27 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 24 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "34 24 0:30 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("group", "mount", "files", "quota"),
    [
        pytest.param("0::/", V2.format(root="/"), {"": "150000 100000"}, 1.5, id="a container's own view"),
        pytest.param("0::/", V2.format(root="/"), {"": "max 100000"}, None, id="no limit"),
        pytest.param("0::/", V2.format(root="/"), {}, None, id="the host's root"),
        pytest.param(
            "0::/a/b", V2.format(root="/"), {"a": "400000 100000", "a/b": "max 100000"}, 4.0, id="above it"
        ),
        pytest.param(
            "0::/a/b", V2.format(root="/"), {"a": "400000 100000", "a/b": "50000 100000"}, 0.5, id="tightest"
        ),
        pytest.param(
            "0::/pod/c", V2.format(root="/pod/c"), {"": "200000 100000"}, 2.0, id="the mount is the group"
        ),
        pytest.param(
            "0::/../other", V2.format(root="/"), {"": "200000 100000"}, 2.0, id="outside the namespace"
        ),
        pytest.param("0::/", V2.format(root="/"), {"": "nonsense"}, None, id="cannot be read"),
        pytest.param(
            "3:memory:/m\n4:cpu,cpuacct:/box",
            MEMORY + "\n" + V1.format(root="/"),
            {"box": "-1"},
            None,
            id="v1: -1",
        ),
        pytest.param(
            "3:memory:/m\n4:cpu,cpuacct:/docker/x",
            MEMORY + "\n" + V1.format(root="/docker/x"),
            {"": "250000"},
            2.5,
            id="v1 in a container",
        ),
        pytest.param(
            "4:cpu,cpuacct:/a/b\n0::/a", V1.format(root="/"), {"a": "100000"}, 1.0, id="v1: above it"
        ),
    ],
)
def test_the_quota_of_control_groups_is_read(
    tmp_path: Path, group: str, mount: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    (tmp_path / "proc/self/mountinfo").write_text(mount + "\n")
    is_v2 = "cgroup2" in mount
    for place, text in files.items():
        folder = tmp_path / ("sys/fs/cgroup" if is_v2 else "sys/fs/cgroup/cpu,cpuacct") / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("cpu.max" if is_v2 else "cpu.cfs_quota_us")).write_text(text + "\n")
        if not is_v2:
            (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert read_quota(tmp_path) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert read_quota(tmp_path) is None


def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert read_physical(range(4), tmp_path) == 2
    assert read_physical([1, 3], tmp_path) == 1
    assert read_physical(range(5), tmp_path) is None


def test_this_machine_is_read() -> None:
    cores = read_cores()
    assert 1 <= cores.allowed <= (os.cpu_count() or 1)
    assert cores.physical is None or 1 <= cores.physical <= cores.allowed or sys.platform != "linux"


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="1 or more, got 0"):
        use_cores(0)


@pytest.mark.parametrize(
    ("environment", "before", "wanted", "after"),
    [
        ({}, "", "5", "5"),
        ({"OMP_NUM_THREADS": "1"}, "", "None", "1"),
        ({}, "torch.set_num_threads(9);", "None", "9"),
        # A thread that is started later computes with as many.
        ({}, "torch.set_num_threads(9);", "6", "6"),
    ],
)
def test_torch_computes_with_what_was_planned(
    environment: dict[str, str], before: str, wanted: str, after: str
) -> None:
    script = (
        f"import torch; {before} from zimage_engine.cpu import use_cores; use_cores({wanted})\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "print(torch.get_num_threads(), ThreadPoolExecutor(1).submit(torch.get_num_threads).result())"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        # In the thread that asked, and in one that is started later.
        [sys.executable, "-c", script],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [after, after]
