"""Every field of a stage's config with a few values, on the tiny model: each runs two steps, or is explained.

Values that pass the parser run together, one of each field at a time, for most have nothing to do with each other.
What fails in company is tried alone, so that each ends as `ran` or `refused`, or as a traceback.
"""

import contextlib
import dataclasses
import enum
import importlib
import io
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from stage_runs import write_rows

from trl_llava.configs.recipe import make_parser
from trl_llava.errors import ExplainedError

SECONDS = 100
LEFT_OUT = {
    "push_to_hub": "the Hub is not there",
    "output_dir": "each run has its own",
    "env": "no field",
    **dict.fromkeys(("dataset_name", "datasets", "model_name_or_path"), "what runs"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "minutes of compiling"),
}
"""Fields that are not tried, with the reason."""
OWN_VALUES: dict[str, list[Any]] = {
    "use_cpu": [],
    "optim": ["sgd", "adafactor", "adamw_8bit", "nonsense"],
    "report_to": ["none", "tensorboard", "nonsense"],
    "num_train_epochs": [0, -1, 0.5],
    "max_steps": [0, 1],
    "dataloader_num_workers": [-1, 1],
    "dataset_num_proc": [0, -1, 1],
    "total_episodes": [0, -1, 4],
}


def values_of(config: type, item: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """A few values of a field by its type, right ones and wrong ones."""
    if item.name in OWN_VALUES:
        return OWN_VALUES[item.name]
    default = None if item.default is dataclasses.MISSING else item.default
    found: list[Any] = [None] if type(None) in get_args(hint) and default is not None else []
    for part in (hint, *get_args(hint)):
        if part is bool:
            found.append(not default)
        elif part is int:
            found += [0, -1, 2]
        elif part is float:
            found += [0.0, -1.0, 0.5]
        elif part is str:
            found += ["", "nonsense"]
        elif get_origin(part) is list:
            found += [[], ["nonsense"] if str in get_args(part) else [-1]]
        elif get_origin(part) is dict or part is dict:
            found += [{}, {"nonsense": 1}]
        elif isinstance(part, enum.EnumMeta):
            found += [member.value for member in part]
        elif get_origin(part) is Literal:
            found += list(get_args(part))
    return [value for i, value in enumerate(found) if value != default and value not in found[:i]]


@dataclass
class Sweep:
    """The sweep of one stage: `results` is (field, value) to (`ran`, `refused` or `traceback`, what was said)."""

    stage: str
    folder: Path
    base: Path
    trained_elsewhere: frozenset[str] = frozenset()  # fields of another stage's sweep too, only parsed here
    results: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        if not (self.folder / "sft.json").exists():
            write_rows(self.folder)
        self.parser = make_parser(self.stage)

    def tries(self) -> list[tuple[str, Any]]:
        """Every field with each of its values."""
        found = []
        for config in self.parser.dataclass_types:
            for item in dataclasses.fields(config):
                if item.init and item.name not in LEFT_OUT:
                    hint = self.parser._hints[item.name]
                    found += [(item.name, value) for value in values_of(config, item, hint)]
        return found

    def run(self) -> None:
        """Parse each value, then run those that the parser lets pass."""
        waiting = []
        assert self._train({}) == ("ran", "")
        for name, value in self.tries():
            said = self._parse({name: value})
            if said is not None:
                self._note(name, value, *said)
            elif name in self.trained_elsewhere:
                self._note(name, value, "parsed", "")
            else:
                waiting.append((name, value))
        while waiting:
            group = dict(reversed(waiting))
            waiting = [(name, value) for name, value in waiting if group[name] is not value]
            self._run_group(group)

    def _run_group(self, group: dict[str, Any]) -> None:
        """Run values together; where that fails, those that are named alone, else each half."""
        outcome, text = self._train(group)
        if outcome == "ran" or len(group) == 1:
            for name, value in group.items():
                self._note(name, value, outcome, text)
            return
        named = [name for name in group if f"`{name}" in text]
        parts = [{name: group.pop(name)} for name in named]
        if not named:
            names = list(group)
            parts = [{name: group[name] for name in half} for half in (names[::2], names[1::2])]
            group = {}
        for part in [*parts, group]:
            if part:
                self._run_group(part)

    def _note(self, name: str, value: Any, outcome: str, text: str) -> None:
        stopped = "is not finite" in text or "off by" in text  # a run that the value has spoilt says so
        if outcome == "refused" and ((name not in text and not stopped) or "\n" in text):
            outcome = "unnamed"
        self.results[name, repr(value)] = (outcome, text)

    def _words(self, values: dict[str, Any]) -> list[str]:
        recipe = self.folder / f"{self.stage}.yaml"
        recipe.write_text(yaml.safe_dump({**self._recipe(), **values}))
        return ["--config", str(recipe)]

    def _recipe(self) -> dict[str, Any]:
        rows = {"dpo": "reward", "grpo": "ppo", "rloo": "ppo"}.get(self.stage, self.stage)
        recipe: dict[str, Any] = {
            "model_name_or_path": str(self.base), "use_peft": True, "lora_r": 2, "use_cpu": True, "bf16": False,
            "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 2, "save_steps": 2,
            "save_strategy": "steps",
            "per_device_train_batch_size": 2, "dataset_name": f"{self.folder}/{rows}.json",
            "output_dir": f"{self.folder}/out",
        }  # fmt: skip
        if self.stage in ("sft", "reward", "dpo"):
            recipe |= {"test_split_size": 2, "eval_strategy": "steps", "eval_steps": 1}
        else:
            recipe |= {"reward_funcs": ["tiny_trainers:even_tokens"]}
        if self.stage == "ppo":
            recipe |= {"response_length": 4, "value_init": "policy", "num_sample_generations": 0}
        if self.stage in ("grpo", "rloo"):
            recipe |= {"num_generations": 2, "max_completion_length": 4, "dataset_train_split": "train[:2]"}
        return recipe

    def _parse(self, values: dict[str, Any]) -> tuple[str, str] | None:
        try:
            with quiet():
                make_parser(self.stage).parse(self._words(values))
        except ExplainedError as error:
            return "refused", str(error)
        except (Exception, SystemExit) as error:
            return "traceback", f"{type(error).__name__}: {error}"
        return None

    def _train(self, values: dict[str, Any]) -> tuple[str, str]:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        self.runs += 1
        try:
            with quiet(), at_most(SECONDS):
                importlib.import_module(f"trl_llava.train_{self.stage}").main(self._words(values))
        except ExplainedError as error:
            return "refused", str(error)
        except (Exception, SystemExit) as error:
            return "traceback", f"{type(error).__name__}: {error}"
        return "ran", ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word on the screen, and no state of accelerate from one run to the next."""
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """End what takes longer."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
