"""Runs that are killed at random moments and resumed end as the one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_five_kills(tmp_path: Path) -> None:
    report = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kill_test", "--kills", "5", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    result = json.loads(report.read_text())
    assert (result["kills"], result["identical"]) == (5, 5)
    assert [(kill["stage"], kill["aimed_at"]) for kill in result["each"]] == [
        *(("ppo", "rollout"), ("ppo", "update"), ("ppo", "save"), ("sft", "save"), ("sft", "end"))
    ]
    assert all(0 <= kill["lost"] <= 2 for kill in result["each"])  # a checkpoint is written every two steps
