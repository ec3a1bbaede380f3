"""What captions add where nobody here drew the pictures: the three stages on easy-VQA, over three seeds.

    pip install easy-vqa
    python -m benchmarks.easy_vqa [--seeds 0 1 2] [--output_dir runs/easy_vqa] [--json FILE] [--quick]

One base of 0.3M parameters learns the training pictures and questions. For each seed: SFT on questions of which nearly
all yes/no ones ask for what is there, so that the policy says of what is not that it is; a reward model with captions
and one without, on pairs of a right and a wrong answer; PPO against each. The recipes are the demo's.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from benchmarks.easy_vqa_base import make_base
from benchmarks.easy_vqa_data import Part, Question, Sizes, load, measure, write_rows
from trl_llava.demo.evaluate import generate_answers
from trl_llava.demo.stages import Stages, say
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_processor
from trl_llava.run.output_dir import versions

RESPONSE_LENGTH = 4  # tokens; a right answer is one word and the end of the turn
QUICK = Sizes(sft=320, preference=320, preference_test=100, prompts=256)
QUICK_QUESTIONS = 300
REWARDS = {"without captions": "reward_plain", "with captions": "reward"}


class Questions:
    """Test questions with their images, to be put to one model after another."""

    def __init__(self, part: Part, questions: list[Question]) -> None:
        self.questions = questions
        images = {q.image for q in questions}
        self.images = {name: Image.open(part.folder / name).convert("RGB") for name in images}

    def ask(self, base: Path, adapter: Path | None) -> dict[str, float]:
        """Measure the base, or an adapter on it; answers are sampled at temperature 1, as PPO's rollouts are."""
        model = AutoModelForImageTextToText.from_pretrained(base)
        if adapter is not None:
            model = load_adapter(model, str(adapter), is_trainable=False)
        images, texts = [self.images[q.image] for q in self.questions], [q.text for q in self.questions]
        replies = generate_answers(model, load_processor(str(base)), images, texts, max_new_tokens=RESPONSE_LENGTH)
        return measure(self.questions, [text for text, _ in replies])


def run_seed(
    folder: Path, base: Path, train: Part, test: Part, questions: Questions, seed: int, sizes: Sizes
) -> dict[str, dict[str, float]]:
    """Run the stages of one seed; returns row of the table -> measures, `accuracy` being the reward model's."""
    stages = Stages(folder, seed, base=base)
    write_rows(folder / "data", train, test, seed, sizes)
    (folder / "logs").mkdir()
    images = ("--image_folder", str(train.folder))
    say(f"seed {seed}: SFT")
    stages.run("sft", "sft", "sft", "--model_name_or_path", str(base), *images)
    rows = {"SFT": questions.ask(base, folder / "sft")}
    for label, reward in REWARDS.items():
        say(f"seed {seed}: reward model {label}")
        record = stages.run("reward", reward, reward, "--model_name_or_path", str(base), *images)
        say(f"seed {seed}: PPO {label}")
        ppo = reward.replace("reward", "ppo")
        stages.train_ppo(ppo, ppo, *images, *ppo_words(sizes), reward=reward)
        rows[f"PPO, {label}"] = questions.ask(base, folder / ppo) | {"accuracy": record.last("eval_accuracy")}
    return rows


def ppo_words(sizes: Sizes) -> list[str]:
    """What differs from the demo's PPO recipe: how long answers are, how many there are, and no checkpoints."""
    fields = {"response_length": RESPONSE_LENGTH, "total_episodes": sizes.prompts, "save_strategy": "no"}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def table(base: dict[str, float], seeds: dict[int, dict[str, dict[str, float]]]) -> str:
    """The base, and of each other row the mean and the standard deviation over the seeds, as Markdown."""
    lines = [f"| | reward-model accuracy | {' | '.join(base)} |", "|---" * (len(base) + 2) + "|"]
    lines.append(f"| base | | {' | '.join(f'{value:.3f}' for value in base.values())} |")
    for label in next(iter(seeds.values())):
        columns = [[rows[label].get(name) for rows in seeds.values()] for name in ("accuracy", *base)]
        lines.append(f"| {label} | {' | '.join(_cell([v for v in column if v is not None]) for column in columns)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, make the base, run all seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/easy_vqa"), help="must be empty or absent")
    parser.add_argument("--json", type=Path, help="also write all numbers into this file")
    parser.add_argument("--quick", action="store_true", help="little of everything: that it runs, not what it gains")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: choose another --output_dir, or empty it yourself")
    torch.set_num_threads(1)  # as the demo does
    train, test = load("train"), load("test")
    asked = test.questions[:QUICK_QUESTIONS] if args.quick else test.questions
    questions, folder = Questions(test, asked), args.output_dir / "base"
    say(f"base: {len(train.captions)} training pictures of which shape and colour are known")
    make_base(folder, train, seed=0, scale=0.01 if args.quick else 1.0)
    base = questions.ask(folder, None)
    seeds: dict[int, dict[str, dict[str, float]]] = {}
    for seed in args.seeds:
        place = args.output_dir / f"seed_{seed}"
        seeds[seed] = run_seed(place, folder, train, test, questions, seed, QUICK if args.quick else Sizes())
        if args.json:
            found = {"base": base, "seeds": seeds, "questions": len(asked), "versions": versions()}
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(base, seeds))


if __name__ == "__main__":
    main()
