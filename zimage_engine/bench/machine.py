"""What a measurement was made with: the machine, the device, versions, and this program's commit."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from zimage_engine.cpu import read_cores
from zimage_engine.memory.snapshot import device_status

Row = dict[str, Any]

_LIBRARIES = ("zimage-turbo", "torch", "diffusers", "transformers", "accelerate", "pillow", "numpy")


def machine_facts(device: str) -> Row:
    """The host and the device. `load_at_start` is the load average of a minute: above the processes that
    measure, others were at work too, None where the system has none."""
    cores, status = read_cores(), device_status(device)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores_allowed": cores.allowed,
        "cores_physical": cores.physical,
        "cores_granted": cores.quota,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "device_name": status.name,
        "device_memory_bytes": status.total_bytes,
        "load_at_start": load(),
    }


def load() -> float | None:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> Row:
    """The libraries that decide how fast a picture is drawn; None for what is not installed as a package."""
    found: Row = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def commit_of_program() -> str | None:
    """The commit that runs, with "+" where files differ from it; None outside of a repository."""
    folder = Path(__file__).parent

    def asked(*words: str) -> str | None:
        try:
            told = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return told.stdout.strip()

    # A package that was installed below somebody else's repository is not that repository's commit.
    if not asked("ls-files", Path(__file__).name):
        return None
    commit = asked("rev-parse", "HEAD")
    return f"{commit}+" if commit and asked("status", "--porcelain", "--", str(folder.parent)) else commit


class MemoryPeak:
    """The most memory that was held: of a GPU since it was made, on a CPU of the process in all its life."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)

    def facts(self) -> Row:
        """Bytes; of the device None where it has no memory of its own."""
        on_device = self._device.startswith("cuda")
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self._device) if on_device else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) if on_device else None,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
