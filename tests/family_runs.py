"""Every stage's plain command on a tiny model of every family, for two steps; as a script, prints the table."""

import argparse
import contextlib
import functools
import importlib
import json
import math
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cpu_torchvision  # noqa: F401
import tiny_models
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from test_families import directly
from tiny_families import FAMILIES
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer, RLOOTrainer

from trl_llava.models.families import family_of
from trl_llava.models.load import load_processor

STAGES = ("sft", "reward", "ppo", "grpo", "rloo", "dpo")
COLORS = ("red", "blue", "green", "black")
SIZES = ((40, 32), (30, 60), (96, 40), (64, 64))  # (width, height)
GOOD = "There is a red square."
COMMON = [
    *("--use_cpu", "--bf16", "false", "--disable_tqdm", "--report_to", "none", "--save_strategy", "no"),
    *("--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "0.01"),
]
ONLINE = ["--max_steps", "2", "--num_generations", "2", "--max_completion_length", "6", "--beta", "0.1"]


def question(i: int) -> str:
    """What row `i` asks; no two are of one length."""
    return f"What is in picture {i}{', please' * i}?"


def write_rows(folder: Path, counts: Sequence[int]) -> None:
    """Four rows for each stage with so many images each, all of different sizes, and captions."""
    rows = []
    for i, count in enumerate(counts):
        names = [f"{i}{'' if j == 0 else j}.png" for j in range(count)]
        for name, size in zip(names, (SIZES[i], SIZES[i - 1]), strict=False):
            tiny_models.image(COLORS[i], size).save(folder / name)
        asked = [{"role": "user", "content": question(i)}]
        rows.append({"images": names, "prompt": asked, "captions": [f"a {COLORS[i]} square"]})
    good, bad = ([{"role": "assistant", "content": text}] for text in (GOOD, "A dog."))
    pairs = [{**row, "chosen": good, "rejected": bad} for row in rows]
    stages = {"sft": [{**row, "completion": good} for row in rows], "reward": pairs, "dpo": pairs}
    for stage in STAGES:
        (folder / f"{stage}.json").write_text(json.dumps(stages.get(stage, rows)))


class Call(NamedTuple):
    """One call of what computes log-probabilities in TRL's trainers: (B, L), (B, L), (B, `kept`)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    kept: int
    logprobs: torch.Tensor


@contextlib.contextmanager
def logprobs_of_trl() -> Iterator[list[Call]]:
    """What TRL's GRPO and RLOO trainers compute."""
    calls: list[Call] = []

    def watched(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, model: Any, ids: Any, mask: Any, kept: int, *args: Any, **kwargs: Any) -> Any:
            found = method(self, model, ids, mask, kept, *args, **kwargs)
            calls.append(Call(ids, mask, kept, found[0].detach()))
            return found

        return call

    name = "_get_per_token_logps_and_entropies"
    with contextlib.ExitStack() as stack:
        for trainer in (GRPOTrainer, RLOOTrainer):
            stack.enter_context(mock.patch.object(trainer, name, watched(getattr(trainer, name))))
        yield calls


def followed_by(inputs: dict[str, torch.Tensor], ids: torch.Tensor, causal: int) -> dict[str, torch.Tensor]:
    """A prompt's tensors with a completion behind it, whose tokens are of the kind that completions are made of."""
    behind = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.full_like(ids, causal)}
    return {
        key: torch.cat([value, behind.get(key, torch.zeros_like(ids))[None]], dim=1)
        if value.shape == inputs["input_ids"].shape
        else value
        for key, value in inputs.items()
    }


class FamilyRuns:
    """The runs of one family, each made once: SFT and the reward model are what the other stages start from.

    Args:
        base: folder of the model.
        folder: of the rows, and of what the runs leave.
        counts: of the images of each row.
    """

    def __init__(self, base: Path, folder: Path, counts: Sequence[int] = (1, 1, 1, 1)) -> None:
        self.base, self.folder = base, folder
        self.made: dict[str, Any] = {}
        write_rows(folder, counts)

    def words(self, stage: str) -> list[str]:
        """The command line of a stage."""
        words = [*COMMON, "--dataset_name", f"{self.folder}/{stage}.json", "--output_dir", f"{self.folder}/{stage}"]
        if stage in ("sft", "reward"):
            words += ["--model_name_or_path", str(self.base), "--max_steps", "2"]
            return [*words, "--use_peft", "--lora_dropout", "0"]
        policy, judge = str(self.folder / "sft"), ["--reward_model_path", str(self.folder / "reward")]
        if stage == "ppo":
            start = ["--sft_model_path", policy, *judge]
            return [*words, *start, "--total_episodes", "8", "--response_length", "6"]
        words += ["--model_name_or_path", str(self.base), "--adapter_name_or_path", policy]
        if stage == "dpo":
            return [*words, "--max_steps", "2"]
        return [*words, *ONLINE, *judge]

    def run(self, stage: str) -> Any:
        """Run a stage after those it starts from, see that it trained, and return its trainer."""
        for earlier in ("sft", "reward") if stage not in ("sft", "reward") else ():
            self.once(earlier)
        entry = importlib.import_module(f"trl_llava.train_{stage}")
        with logprobs_of_trl() as calls:
            trainer = entry.main(self.words(stage))
        self.check(stage, trainer)
        if stage in ("grpo", "rloo"):
            self.check_logprobs(calls[0])
        elif stage in ("sft", "dpo"):
            self.check_first_step(stage, trainer.state.log_history[0])
        return trainer

    def once(self, stage: str) -> Any:
        """`run`, or what came of it before: its trainer, or its error."""
        if stage not in self.made:
            try:
                self.made[stage] = self.run(stage)
            except (Exception, SystemExit) as error:
                self.made[stage] = error
        if isinstance(self.made[stage], BaseException):
            raise self.made[stage]
        return self.made[stage]

    def check(self, stage: str, trainer: Any) -> None:
        """Two steps, finite numbers, and an adapter that is not the one it started from."""
        log = trainer.state.log_history
        assert trainer.state.global_step == 2
        assert all(math.isfinite(value) for entry in log for value in entry.values() if isinstance(value, float))
        weights = load_file(self.folder / stage / "adapter_model.safetensors")
        trained = {name: weight for name, weight in weights.items() if "lora_B" in name}
        if stage in ("sft", "reward"):
            start = {name: torch.zeros_like(weight) for name, weight in trained.items()}
        else:
            start = load_file(self.folder / "sft" / "adapter_model.safetensors")
        assert trained and all(not torch.equal(weight, start[name]) for name, weight in trained.items())
        if stage == "reward":
            assert weights["base_model.model.score.weight"].any()
        if stage == "ppo":  # four adapters on one base
            (reward,) = trainer.scorer.reward_funcs
            assert all(role.host is trainer.policy_model for role in (trainer.value_model, reward.model))
            assert set(trainer.policy_model.peft_config) == {"default", "reference", "value_role", "reward_role"}
        if stage in ("ppo", "grpo", "rloo"):  # the first completions are those of the policy that it is held to
            assert abs(log[0]["objective/kl" if stage == "ppo" else "kl"]) < 1e-5

    def policy(self, adapter: Path | None) -> Any:
        """The model as transformers loads it, with an adapter."""
        model = AutoModelForImageTextToText.from_pretrained(self.base, dtype=torch.float32)
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    def logprobs(self, model: Any, i: int, text: str | None, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Those of a completion, given as text or as ids, behind row `i` in a direct call of processor and model."""
        processor = load_processor(str(self.base))
        images = [Image.open(path) for path in sorted(self.folder.glob(f"{i}*.png"))]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question(i)}]
        said = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        row = {
            "images": images,
            "prompt": [{"role": "user", "content": content}],
            "completion": said,
        }
        inputs = directly(processor, row, with_completion=False)
        start = inputs["input_ids"].shape[1]
        if ids is None:
            inputs = directly(processor, row, with_completion=True)
        else:
            inputs = followed_by(inputs, ids, causal=int(family_of(model.config).attends_to_whole_prompt))
        ids = inputs["input_ids"][0, start:]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1]
        found = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        # A new line behind the token that ends a turn is not what a model is to learn.
        return found if text is None or processor.decode(ids[-1:]).strip() else found[:-1]

    def check_first_step(self, stage: str, logged: dict[str, float]) -> None:
        """The first batch has all rows: what is logged of it is known without the trainer."""
        model = self.policy(None if stage == "sft" else self.folder / "sft")
        rows = [self.logprobs(model, i, GOOD) for i in range(len(SIZES))]
        if stage == "sft":
            expected, found = -torch.cat(rows).mean(), logged["loss"]
        else:
            expected, found = torch.stack([row.sum() for row in rows]).mean(), logged["logps/chosen"]
        assert abs(found - float(expected)) < 1e-5 * abs(expected), (found, float(expected))

    def check_logprobs(self, call: Call) -> None:
        """Those of the first completions, in a padded batch of several images, under SFT's policy."""
        model, tokenizer = self.policy(self.folder / "sft"), load_processor(str(self.base)).tokenizer
        asked = set()
        for ids, mask, found in zip(call.input_ids, call.attention_mask, call.logprobs, strict=True):
            prompt = tokenizer.decode(ids[: -call.kept][mask[: -call.kept].bool()])
            (i,) = (i for i in range(len(SIZES)) if f"picture {i}" in prompt)
            asked.add(i)
            length = int(mask[-call.kept :].sum())
            completion = ids[-call.kept :][:length]
            expected = self.logprobs(model, i, None, completion)
            torch.testing.assert_close(found[:length], expected, rtol=1e-5, atol=1e-5)
        assert len(asked) == 2


def outcome(runs: FamilyRuns, stage: str, log: Path) -> str:
    """ "ok", or the last line of what went wrong; everything that is said goes to `log`."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runs.once(stage)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where runs and what they say are kept")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="families-"))
    width = max(map(len, options.families))
    print(" " * width, *(f"{stage:6}" for stage in options.stages), flush=True)
    disable_progress_bar()
    failures = []
    for name in options.families:
        (folder / name).mkdir(parents=True)
        runs = FamilyRuns(FAMILIES[name](folder / name / "base"), folder / name)
        found = {stage: outcome(runs, stage, folder / name / f"{stage}.log") for stage in options.stages}
        print(f"{name:{width}}", *(f"{'ok' if said == 'ok' else 'FAILS':6}" for said in found.values()), flush=True)
        failures += [f"{name} {stage}: {said}" for stage, said in found.items() if said != "ok"]
    print(*failures, sep="\n")
    raise SystemExit(f"{len(failures)} runs failed; what they said is in {folder}" if failures else 0)


if __name__ == "__main__":
    main()
