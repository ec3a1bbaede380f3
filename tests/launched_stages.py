"""What each process of a launched test runs: the stages of a plan one after another, through their real entry points.

accelerate launch ... tests/launched_stages.py PLAN.json

The plan is a list of `[stage, [word, ...]]`, each followed by what shall go wrong: `["killed_at", STEP]` or
`["fails_on", PROCESS]`. What comes out lies in the `output_dir` that the words name.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from transformers import Trainer

from trl_llava.data.contract import RowError
from trl_llava.publish import push as hub_push
from trl_llava.run import safe_checkpoints
from trl_llava.run.console import run_as_program


def waiting_to_be_stopped(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward of 0. At the second call it asks, by a file, for a signal to the run, and waits until it was sent."""
    asked = Path(os.environ["ASK_TO_STOP"])
    _calls.append(asked)
    if PartialState().is_main_process and len(_calls) == 2:
        asked.write_text("now")
        for _ in range(300):
            if asked.read_text() == "sent":
                break
            time.sleep(0.1)
    return [0.0] * len(completion_ids)


_calls: list[Path] = []


def killed_at(step: int) -> None:
    """End a process as `kill -9` does once all have written a checkpoint, before it is moved to its place."""
    finish = safe_checkpoints.finish_checkpoint

    def killed(run_dir: Path, at: int) -> Path:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(run_dir, at)

    safe_checkpoints.finish_checkpoint = killed


def fails_on(process: int) -> None:
    """Let one process find, after the first step, what ends it; the others go on to wait for it in the second."""

    def fail(self: Trainer, *args: Any) -> None:
        raise RowError("rows.json[3]", "its picture is gone", "Leave the row out")

    if int(os.environ["RANK"]) == process:
        Trainer.log = fail


def with_fsdp_on_cpus() -> None:
    """Let FSDP be FSDP on CPUs too, where accelerate leaves it out; all else of it runs there as it is."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    upstream = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        upstream(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = init


def without_operations_of_inference() -> None:
    """Keep DeepSpeed from compiling, before its first run on CPUs, an operation that its training has no use for.

    That takes a compiler and minutes, and one that was killed at it leaves a lock that all later ones wait for.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}


def main(plan: str) -> None:
    hub_push.FIRST_WAIT = 0.1
    with_fsdp_on_cpus()
    without_operations_of_inference()
    for stage, words, *trouble in json.loads(Path(plan).read_text()):
        for name, number in trouble:
            {"killed_at": killed_at, "fails_on": fails_on}[name](number)
        importlib.import_module(f"trl_llava.train_{stage}").main(words)
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1]))
