"""Run the three stages through their entry points, in this process, and keep what each of them did."""

import contextlib
import importlib
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl_llava.demo.data import PICTURES, Sizes, read_rows, write_data
from trl_llava.demo.evaluate import Evaluation, evaluate
from trl_llava.demo.weak_eyes import make_weak_eyed

BASE = Path(__file__).parent / "base"
RECIPES = Path(__file__).parent / "recipes"
WEAK_EYES = 12
"""Side, in pixels, of the pictures that a weak-eyed reward model sees; the policy sees 48."""
ROWS = {"sft": "sft", "reward": "preference", "ppo": "prompts"}


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        sizes: Numbers of rows.
        shorter: Command-line words by entry point that cut its recipe short.
    """

    sizes: Sizes = field(default_factory=Sizes)
    shorter: dict[str, tuple[str, ...]] = field(default_factory=dict)


FULL = Plan()
QUICK = Plan(
    Sizes(pictures=400, sft=960, preference=960, preference_test=200, prompts=512, unseen=60),
    {"ppo": ("--total_episodes", "384", "--per_device_train_batch_size", "64", "--save_steps", "2")},
)


@dataclass
class StageRecord:
    """What one stage did.

    Attributes:
        command: What does the same in a shell.
        recipe: Text of its recipe.
        seconds: How long it took.
        steps: Optimizer steps, or PPO steps in stage 3.
        log: The trainer's log.
    """

    command: str
    recipe: str
    seconds: float
    steps: int
    log: list[dict[str, float]]

    def last(self, name: str) -> float:
        """The last value logged under a name.

        Args:
            name: For example "eval_accuracy".

        Returns:
            The value.
        """
        return next(entry[name] for entry in reversed(self.log) if name in entry)


class Stages:
    """The stages of one seed, each in its own folder.

    Args:
        folder: Where everything goes.
        seed: Seed of rows and stages.
        plan: How much of everything.
        base: The base model.
    """

    def __init__(self, folder: Path, seed: int, plan: Plan = FULL, base: Path = BASE) -> None:
        self.folder = folder
        self.seed = seed
        self.plan = plan
        self.base = base
        self.records: dict[str, StageRecord] = {}
        self.evaluations: dict[str, Evaluation] = {}

    def prepare(self) -> float:
        """Write the rows and the weak-eyed copy of the base.

        Returns:
            How many seconds it took.
        """
        start = time.perf_counter()
        write_data(self.folder / "data", self.seed, self.plan.sizes)
        make_weak_eyed(self.base, self.folder / "weak_base", WEAK_EYES)
        self.unseen = read_rows(self.folder / "data" / "prompts" / "test.jsonl")
        (self.folder / "logs").mkdir()
        return time.perf_counter() - start

    def run(self, kind: str, recipe: str, result: str, *words: str) -> StageRecord:
        """Run one stage; its log lines go into a file, its progress bar stays on the terminal.

        Args:
            kind: The entry point: "sft", "reward" or "ppo".
            recipe: Name of a recipe of the demo.
            result: Name of the folder that gets the result.
            *words: Further words of the command line.

        Returns:
            What it did; also kept in `records`.
        """
        data, recipe_file = self.folder / "data", RECIPES / f"{recipe}.yaml"
        words = (
            *("--config", str(recipe_file)),
            *("--dataset_name", str(data / ROWS[kind]), "--image_folder", str(data / PICTURES)),
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
        """Stage 1, on the base.

        Returns:
            What it did.
        """
        return self.run("sft", "sft", "sft", "--model_name_or_path", str(self.base))

    def train_reward(self, recipe: str, *, sharp: bool = False) -> StageRecord:
        """Stage 2.

        Args:
            recipe: "reward" (with captions) or "reward_plain".
            sharp: `True` lets the reward model see the pictures as the policy does.

        Returns:
            What it did; the result's name ends in "_sharp" if it is.
        """
        base = self.base if sharp else self.folder / "weak_base"
        return self.run("reward", recipe, recipe + "_sharp" * sharp, "--model_name_or_path", str(base))

    def train_ppo(self, recipe: str, result: str, *words: str, reward: str | None = None) -> StageRecord:
        """Stage 3, from the result of stage 1.

        Args:
            recipe: "ppo" or "ppo_plain".
            result: Name of the folder that gets the result.
            *words: Further words of the command line.
            reward: Which result of stage 2 is the reward model; None leaves the reward to `words`.

        Returns:
            What it did.
        """
        rewards = ("--reward_model_path", "null" if reward is None else str(self.folder / reward))
        return self.run("ppo", recipe, result, "--sft_model_path", str(self.folder / "sft"), *rewards, *words)

    def evaluate(self, result: str, limit: int | None = None) -> Evaluation:
        """Ask the result of a stage about the unseen pictures.

        Args:
            result: Its folder's name, or a checkpoint in it.
            limit: Only so many descriptions, to be quick; None asks everything.

        Returns:
            Answers and their truth; kept in `evaluations`.
        """
        rows = self.unseen
        if limit is not None:
            rows = [row for row in rows if row["kind"] == "describe"][:limit]
        found = evaluate(self.base, self.folder / result, self.folder / "data", rows)
        self.evaluations[result] = found
        return found


def say(words: str) -> None:
    """Tell the person at the terminal, also while a stage's output goes elsewhere.

    Args:
        words: One line.
    """
    print(words, file=sys.stderr, flush=True)
