"""Time and memory of `trl-llava check-data` on a set as large as the published PPO mixture.

    python benchmarks/check_data.py [--rows 72000] [--pictures 2000] [--num_proc 2]

Writes the rows and JPEG pictures of 640x480 pixels into a temporary folder, and prints one table. The processor is
LLaVA-1.5's layout (576 image tokens) with the small tokenizer of the tests, so that nothing is downloaded.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=72_000)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--num_proc", type=int, default=2)
    options = parser.parse_args()
    table = Table("rows", "pictures", "processes", "seconds", "CPU seconds", "peak memory, all processes (MiB)")
    for rows in (options.rows // 4, options.rows):
        with tempfile.TemporaryDirectory() as folder:
            recipe = write(Path(folder), rows, options.pictures)
            seconds, cpu, peak = run(
                [sys.executable, "-m", "trl_llava.cli", "check-data", "--config", str(recipe)], options
            )
        table.add_row(*map(str, (rows, options.pictures, options.num_proc, round(seconds), round(cpu), peak)))
    Console().print(table)


def write(folder: Path, rows: int, pictures: int) -> Path:
    """Writes rows, pictures, processor and recipe; returns the recipe."""
    import published
    import toy_models

    data = published.write(folder / "data", rows, pictures, size=(640, 480))
    base = toy_models.llava_1_5(folder / "base", "7b", 336)
    recipe = {
        "model_name_or_path": str(base),
        "dataset_name": f"{data}/ppo.json",
        "image_folder": f"{data}/coco",
        "captions_file": f"{data}/image_to_caption.json",
        "output_dir": "unused",
        "reward_funcs": ["math:fsum"],
        "max_prompt_length": 703,
        "overlong": "drop",
    }
    path = folder / "ppo.yaml"
    path.write_text(json.dumps(recipe))
    return path


def run(command: list[str], options: argparse.Namespace) -> tuple[float, float, int]:
    """Runs a command; returns its seconds, those of its CPUs, and the largest sum of its processes' memory in MiB."""
    started, cpu_before = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(
        [*command, "--dataset_num_proc", str(options.num_proc)], stdout=subprocess.DEVNULL, cwd=ROOT
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(5)  # asking for the memory of large processes slows them down

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise SystemExit(f"check-data ended with {status}")
    return time.monotonic() - started, cpu_seconds() - cpu_before, peak


def cpu_seconds() -> float:
    """CPU time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(pid: int) -> int:
    """Proportional memory of a process and its children in MiB (Linux); shared pages count once."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) // 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):  # it has just ended
        return total
    return total + sum(memory(int(child)) for child in children)


if __name__ == "__main__":
    main()
