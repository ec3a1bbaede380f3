"""Run the three stages through their entry points, in this process, and keep what each of them did."""

import contextlib
import importlib
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_llava.demo.data import IMAGES, Sizes, read_rows, write_data
from trl_llava.demo.evaluate import Evaluation, evaluate
from trl_llava.demo.weak_eyes import make_weak_eyed

BASE = Path(__file__).parent / "base"
RECIPES = Path(__file__).parent / "recipes"
WEAK_EYES = 12
"""Side, in pixels, of the images that a weak-eyed reward model sees; the policy sees 48."""
ROWS = {"sft": "sft", "reward": "preference", "ppo": "prompts"}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    sizes: Sizes = field(default_factory=Sizes)
    shorter: dict[str, tuple[str, ...]] = field(default_factory=dict)  # words by entry point that cut its recipe short


FULL = Plan()
QUICK = Plan(
    Sizes(images=400, sft=960, preference=960, preference_test=200, prompts=512, unseen=60),
    {"ppo": ("--total_episodes", "384", "--per_device_train_batch_size", "64", "--save_steps", "2")},
)


@dataclass
class StageRecord:
    """What one stage did."""

    command: str  # that does the same in a shell
    recipe: str  # its text
    seconds: float
    steps: int  # optimizer steps, or PPO steps in stage 3
    log: list[dict[str, float]]

    def last(self, name: str) -> float:
        """The last value logged under a name, for example "eval_accuracy"."""
        return next(entry[name] for entry in reversed(self.log) if name in entry)


@dataclass
class Stages:
    """The stages of one seed, each in its own folder."""

    folder: Path
    seed: int
    plan: Plan = FULL
    base: Path = BASE
    records: dict[str, StageRecord] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    unseen: list[dict[str, Any]] = field(default_factory=list)  # rows of the evaluation, from `prepare`

    def prepare(self) -> float:
        """Write the rows and the weak-eyed copy of the base; returns how many seconds it took."""
        start = time.perf_counter()
        write_data(self.folder / "data", self.seed, self.plan.sizes)
        make_weak_eyed(self.base, self.folder / "weak_base", WEAK_EYES)
        self.unseen = read_rows(self.folder / "data" / "prompts" / "test.jsonl")
        (self.folder / "logs").mkdir()
        return time.perf_counter() - start

    def run(self, kind: str, recipe: str, result: str, *words: str) -> StageRecord:
        """Run one stage; its log lines go into a file, its progress bar stays on the terminal."""
        data, recipe_file = self.folder / "data", RECIPES / f"{recipe}.yaml"
        words = (
            *("--config", str(recipe_file)),
            *("--dataset_name", str(data / ROWS[kind]), "--image_folder", str(data / IMAGES)),
            *("--output_dir", str(self.folder / result), "--seed", str(self.seed)),
            *words,
            *self.plan.shorter.get(kind, ()),
        )
        start = time.perf_counter()
        log_file = self.folder / "logs" / f"{result}.txt"
        with log_file.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            trainer = importlib.import_module(f"trl_llava.train_{kind}").main(words)
        record = StageRecord(
            command=shlex.join(["trl-llava", kind, *words]),
            recipe=recipe_file.read_text(encoding="utf-8"),
            seconds=round(time.perf_counter() - start, 1),
            steps=trainer.state.global_step,
            log=trainer.state.log_history,
        )
        self.records[result] = record
        return record

    def train_sft(self) -> StageRecord:
        """Stage 1, on the base."""
        return self.run("sft", "sft", "sft", "--model_name_or_path", str(self.base))

    def train_reward(self, recipe: str, *, sharp: bool = False) -> StageRecord:
        """Stage 2; a `sharp` reward model sees the images as the policy does, and its result ends in "_sharp"."""
        base = self.base if sharp else self.folder / "weak_base"
        return self.run("reward", recipe, recipe + "_sharp" * sharp, "--model_name_or_path", str(base))

    def train_ppo(self, recipe: str, result: str, *words: str, reward: str | None = None) -> StageRecord:
        """Stage 3, from the result of stage 1, against a result of stage 2; None leaves the reward to `words`."""
        rewards = ("--reward_model_path", "null" if reward is None else str(self.folder / reward))
        return self.run("ppo", recipe, result, "--sft_model_path", str(self.folder / "sft"), *rewards, *words)

    def evaluate(self, result: str, limit: int | None = None) -> Evaluation:
        """Measure the result of a stage, or a checkpoint in it, on unseen images, or on `limit` descriptions only."""
        rows = self.unseen
        if limit is not None:
            rows = [row for row in rows if row["kind"] == "describe"][:limit]
        found = evaluate(self.base, self.folder / result, self.folder / "data", rows)
        self.evaluations[result] = found
        return found


def say(words: str) -> None:
    """Tell the person at the terminal, also while a stage's output goes elsewhere."""
    print(words, file=sys.stderr, flush=True)
