"""Kills runs with SIGKILL at random moments, resumes each, and compares it with a run that nobody killed.

    python -m benchmarks.kill_test [--kills 50] [--stage all] [--seed 0] [--json FILE]

Each kill is a run of its own: started through a stage's entry point on a tiny model, killed in a rollout, in an
update, within a save, while the finished model is saved, or anywhere (start and end included), and resumed with
`--resume_from_checkpoint`. No run may leave a model that loads and is not the uninterrupted run's. It counts as
bit-identical if every logged number (times aside) and every byte of the final weights are those of the uninterrupted
run. Steps lost are those that had been finished and had to be run again; a checkpoint is written every two steps.
Processes are forked from this one, which has imported everything, so that a run takes seconds.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]

import tiny_models
import torch
from rich.console import Console
from rich.table import Table
from tiny_trainers import even_tokens

from trl_llava import train_ppo, train_reward, train_sft
from trl_llava.ppo_trainer import LlavaPPOTrainer
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.run import output_dir
from trl_llava.run.checkpoint_folders import checkpoints, step_of
from trl_llava.run.finished_model import CONFIG_FILES
from trl_llava.sft_trainer import LlavaSFTTrainer

MAINS = {"sft": train_sft.main, "reward": train_reward.main, "ppo": train_ppo.main}
TRAINERS = {"sft": LlavaSFTTrainer, "reward": LlavaRewardTrainer, "ppo": LlavaPPOTrainer}
PHASES = {"rollout": "rollout", "update": "update", "training_step": "update", "_save_checkpoint": "save"}
"""Method of a trainer -> the phase that it is."""
MOMENTS = (
    *(("ppo", "rollout"), ("ppo", "update"), ("ppo", "save"), ("sft", "save"), ("sft", "end")),
    *(("ppo", "end"), ("sft", "update"), ("reward", "update"), ("sft", "anywhere"), ("reward", "anywhere")),
    *(("ppo", "anywhere"), ("reward", "end"), ("reward", "save")),
)
STEPS = 5
TIMED = ("time/", "tokens_per_second", "eps", "train_runtime", "train_samples_per", "train_steps_per")
reward_function = even_tokens  # recipes name it as benchmarks.kill_test:reward_function


@dataclass
class Event:
    """A phase begins or ends, after so many finished steps."""

    phase: str
    begins: bool
    finished_steps: int
    at: float


@dataclass
class Moment:
    """When to kill: so many seconds after a phase has begun for the n-th time; `anywhere` begins with the process."""

    phase: str
    occurrence: int
    delay: float


@dataclass
class Kill:
    """One killed run, and what became of it."""

    stage: str
    aimed_at: str
    landed_in: str
    finished_steps: int
    resumed_at: int
    difference: str

    @property
    def lost(self) -> int:
        """Steps that had to be run again."""
        return max(self.finished_steps - self.resumed_at, 0)


class Runs:
    """The folder of the test: rows, a base model, and the words that start a stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_models.tiny_llava(folder / "base")
        self._write_rows()
        # Whatever reads the policy wants an adapter with a processor, as stage 1 leaves it.
        self.run("sft", "policy", "--max_steps", "1", must_end=True)

    def _write_rows(self) -> None:
        question = [{"role": "user", "content": "what is it?"}]
        rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in MAINS}
        for i in range(8):
            color = ("red", "blue")[i % 2]
            tiny_models.image(color).save(self.folder / f"{color}.png")
            row = {"images": [] if i % 3 == 2 else [f"{color}.png"], "prompt": question}
            right = [{"role": "assistant", "content": f"a {color} square" + " indeed" * i}]
            wrong = [{"role": "assistant", "content": "a dog"}]
            rows["sft"].append({**row, "completion": right})
            rows["reward"].append(
                {**row, "chosen": right, "rejected": wrong, "captions": [f"a {color} square", "one"]}
            )
            rows["ppo"].append({**row, "captions": [f"a {color} square"]})
        for stage, content in rows.items():
            (self.folder / f"{stage}.json").write_text(json.dumps(content))

    def words(self, stage: str, out: str) -> list[str]:
        """The command line of a stage."""
        words = [
            *("--use_cpu", "--bf16", "false", "--disable_tqdm", "--report_to", "none", "--learning_rate", "0.01"),
            *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1", "--logging_steps", "3"),
            *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
            *("--dataset_name", f"{self.folder}/{stage}.json", "--output_dir", f"{self.folder}/{out}"),
        ]
        if stage == "ppo":
            policy = ["--sft_model_path", f"{self.folder}/policy", "--value_init", "policy", "--logging_steps", "1"]
            reward = ["--reward_funcs", "benchmarks.kill_test:reward_function", "--normalize_scores", "first_batch"]
            size = ["--total_episodes", str(4 * STEPS), "--response_length", "6", "--stop_token", "eos"]
            return [*words, *policy, *reward, *size, "--num_ppo_epochs", "2", "--num_sample_generations", "0"]
        lora = ["--use_peft", "--lora_r", "2", "--lora_dropout", "0.3"]
        return [*words, "--model_name_or_path", str(self.base), *lora, "--max_steps", str(STEPS)]

    def run(
        self, stage: str, out: str, *more: str, kill: Moment | None = None, must_end: bool = False
    ) -> tuple[int, list[Event]]:
        """Run a stage in a process of its own; returns its exit status, negative for a signal, and its phases."""
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            self._in_child(stage, [*self.words(stage, out), *more], f"{self.folder}/{out}.log", writer)
        os.close(writer)
        with open(reader, "rb", buffering=0) as lines:
            events = _watch(process, lines, kill)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if must_end and status != 0:
            raise SystemExit((self.folder / f"{out}.log").read_text())
        return status, events

    def _in_child(self, stage: str, words: list[str], log: str, writer: int) -> NoReturn:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for method, phase in PHASES.items():
                if hasattr(TRAINERS[stage], method):
                    setattr(TRAINERS[stage], method, _reporting(getattr(TRAINERS[stage], method), phase, writer))
            output_dir.finish = _reporting(output_dir.finish, "end", writer)
            MAINS[stage](words)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)


def _reporting(method: Callable[..., Any], phase: str, writer: int) -> Callable[..., Any]:
    """The method, reporting to the parent when it begins and ends."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        for begins in (True, False):
            if not begins:
                result = method(self, *args, **kwargs)
            event = Event(phase, begins, self.state.global_step, time.monotonic())
            os.write(writer, (json.dumps(asdict(event)) + "\n").encode())
        return result

    return wrapped


def _watch(process: int, lines: Any, kill: Moment | None) -> list[Event]:
    """Read what a process reports until it ends, and kill it when its moment has come."""
    events: list[Event] = []
    deadline = time.monotonic() + kill.delay if kill is not None and kill.phase == "anywhere" else None
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([lines], [], [], left)[0]:
            os.kill(process, signal.SIGKILL)
            deadline = None
            continue
        if not (line := lines.readline()).endswith(b"\n"):
            return events
        events.append(Event(**json.loads(line)))
        begun = sum(event.begins and kill is not None and event.phase == kill.phase for event in events)
        if deadline is None and kill is not None and events[-1].begins and begun == kill.occurrence + 1:
            deadline = time.monotonic() + (kill.delay if events[-1].phase == kill.phase else 0)


class Whole:
    """A run of a stage that nobody kills: what the others must equal, and how long its phases take."""

    def __init__(self, runs: Runs, stage: str) -> None:
        out = f"{stage}_whole"
        started = time.monotonic()
        _, events = runs.run(stage, out, must_end=True)
        self.spans: dict[str, list[float]] = {"anywhere": [time.monotonic() - started]}
        for begin, end in itertools.pairwise(events):
            if begin.begins and not end.begins and begin.phase == end.phase:
                self.spans.setdefault(begin.phase, []).append(end.at - begin.at)
        self.numbers, self.weights = _outcome(runs.folder / out)

    def draw(self, phase: str, chance: random.Random) -> Moment:
        """A random moment in a phase."""
        occurrence = chance.randrange(len(self.spans[phase]))
        lasts = min(self.spans[phase])  # the first time of anything takes longer, and would end in another phase
        return Moment(phase, occurrence, chance.random() * lasts)

    def difference(self, folder: Path) -> str:
        """What is not as here; empty if nothing."""
        numbers, weights = _outcome(folder)
        if numbers != self.numbers:
            return "logged numbers"
        return ", ".join(
            name for name in sorted({*weights, *self.weights}) if weights.get(name) != self.weights.get(name)
        )

    def left_half(self, folder: Path) -> str:
        """A model that loads from a killed run's folder though it is not the one here; empty if there is none."""
        loadable = [part for part in (".", "value_model") for file in CONFIG_FILES if (folder / part / file).is_file()]
        wanted = {name: text for name, text in self.weights.items() if str(Path(name).parent) in loadable}
        found = _weights(folder)
        return ", ".join(sorted(name for name in wanted if found.get(name) != wanted[name]))


def _outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What a finished run has logged, and the hashes of its weights."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    numbers = [{name: value for name, value in entry.items() if not name.startswith(TIMED)} for entry in log]
    return numbers, _weights(folder)


def _weights(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), *folder.glob("value_model/*.safetensors")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_and_resume(runs: Runs, stage: str, out: str, moment: Moment, whole: Whole) -> Kill | None:
    """One kill; None if the run had ended before its moment came."""
    status, events = runs.run(stage, out, kill=moment)
    if status != -signal.SIGKILL:
        return None
    folder = runs.folder / out
    resumed_at = max(map(step_of, checkpoints(folder)), default=0)
    begun = (folder / "recipe.yaml").is_file()  # else it was killed before there was a run to resume
    if half := whole.left_half(folder):
        half = f"left half a model: {half}"
    status, _ = runs.run(stage, out, *(["--resume_from_checkpoint"] if begun else []))
    difference = half or (whole.difference(folder) if status == 0 else f"exit status {status}")
    landed_in = events[-1].phase if events and events[-1].begins else "between"
    finished = events[-1].finished_steps if events else 0
    return Kill(stage, moment.phase, landed_in, finished, resumed_at, difference)


def kill_all(folder: Path, kills: int, stages: list[str], seed: int) -> list[Kill]:
    """Kill and resume so many runs, the stages and phases in turn."""
    torch.set_num_threads(1)  # what is forked must have no threads
    runs = Runs(folder)
    whole: dict[str, Whole] = {}
    moments = [moment for moment in MOMENTS if moment[0] in stages]
    done: list[Kill] = []
    for attempt in range(4 * kills):
        stage, phase = moments[len(done) % len(moments)]
        if stage not in whole:
            whole[stage] = Whole(runs, stage)
        moment = whole[stage].draw(phase, random.Random(f"{seed}-{attempt}"))
        kill = kill_and_resume(runs, stage, f"{stage}_{attempt}", moment, whole[stage])
        if kill is not None:
            done.append(kill)
            print(f"{len(done)}/{kills} {kill}", flush=True)
        if len(done) == kills:
            return done
    raise SystemExit(f"only {len(done)} of {kills} runs were caught before they ended: the machine is too busy")


def show(kills: list[Kill]) -> None:
    """Print the table."""
    table = Table("stage", "killed in", "kills", "bit-identical", "steps lost: mean", "most")
    places = sorted({(kill.stage, kill.landed_in) for kill in kills})
    for stage, place in [*places, ("all", "")]:
        those = [kill for kill in kills if (kill.stage, kill.landed_in) == (stage, place) or stage == "all"]
        lost = [kill.lost for kill in those]
        same = sum(not kill.difference for kill in those)
        table.add_row(stage, place, *map(str, (len(those), same, round(sum(lost) / len(lost), 2), max(lost))))
    Console().print(table)


def main() -> int:
    """Runs the test; returns 1 if a run did not end as the uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stage", choices=[*MAINS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for every kill")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_all(
            Path(folder), options.kills, [*MAINS] if options.stage == "all" else [options.stage], options.seed
        )
    show(kills)
    if options.json:
        rows = [{**asdict(kill), "lost": kill.lost, "identical": not kill.difference} for kill in kills]
        summary = {"kills": len(kills), "identical": sum(row["identical"] for row in rows), "each": rows}
        Path(options.json).write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(kill.difference for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
