from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_benchmark_of_loading_still_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.loading_time", "--gigabytes", "0.005", "--pairs", "1"]
    done = subprocess.run(
        [*command, "--skip-float32", "--quick", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for row in ("healthy, bfloat16", "repaired, found again"):
        assert done.stdout.count(row) == 6, done.stdout
