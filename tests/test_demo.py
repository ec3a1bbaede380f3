"""The demo end to end, at a hundredth of its size: every stage, summary.json and a page that needs nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_llava.demo.data import Sizes
from trl_llava.demo.evaluate import evaluate
from trl_llava.demo.make_base import make_base
from trl_llava.demo.metrics import Truthfulness
from trl_llava.demo.picture import wrapped
from trl_llava.demo.run import main, run_demo, table
from trl_llava.demo.stages import BASE, QUICK, Plan
from trl_llava.demo.summary import goals, standard_error
from trl_llava.demo.true_score import true_score
from trl_llava.demo.weak_eyes import make_weak_eyed

TINY = Plan(
    Sizes(images=20, sft=32, preference=32, preference_test=8, prompts=16, unseen=16),
    {
        "reward": ("--per_device_eval_batch_size", "8", "--logging_steps", "1"),
        "sft": ("--logging_steps", "1"),
        "ppo": ("--total_episodes", "16", "--per_device_train_batch_size", "8", "--save_steps", "1"),
    },
)
STEPS = {"sft": 1, "reward": 1, "reward_plain": 1, "ppo": 2, "ppo_plain": 2, "ppo_bonus_no": 2, "ppo_bonus_both": 2}
MEASURES = {"chair", "invented", "recall", "yes_accuracy", "no_accuracy", "choice_accuracy", "length"}


class Page(HTMLParser):
    """Collects what a browser would load and which tags stay open."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(folder, seed=5, plan=TINY)


def test_the_summary_holds_everything_that_was_measured(demo):
    folder, summary = demo
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["seeds"] == {"data": 5, "stages": 5}
    assert set(summary["stages"]) == STEPS.keys()
    steps = {name: stage["steps"] for name, stage in summary["stages"].items()}
    assert steps == STEPS
    assert all(stage["seconds"] > 0 for stage in summary["stages"].values())
    assert all(0 <= share <= 1 for share in summary["reward_model_accuracy"].values())
    for variant in ("plain", "with_captions"):
        run = summary["ppo"][variant]
        assert set(run["before"]) == set(run["after"]) == MEASURES
        assert run["kl"] is not None
        assert [point["step"] for point in run["curve"]] == [0, 1, 2]
        assert len(summary["goals"][variant]) == 4
    assert summary["versions"]["trl"].startswith("1.")
    assert "after PPO, with captions" in table(summary)


def test_each_stage_leaves_what_its_entry_point_leaves(demo):
    folder, _ = demo
    for name in STEPS:
        found = {path.name for path in (folder / name).iterdir()}
        assert {"adapter_model.safetensors", "recipe.yaml", "versions.json", "README.md"} <= found, name
    stored = json.loads((folder / "reward" / "factual_reward.json").read_text())
    assert "Is it true?" in json.dumps(stored)


def test_the_page_loads_nothing_from_outside_and_shows_every_answer(demo):
    folder, summary = demo
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loads and all(value.startswith("data:") for value in page.loads)
    assert "script" not in page.tags
    # The opening example and its blurred copy, and the first questions of each kind.
    assert text.count('class="picture') == 1 + 1 + (12 + 4 + 4)
    assert text.index('class="picture') < text.index("<table")
    for stage in summary["stages"].values():
        assert stage["command"].startswith("trl-llava ")
    assert text.count("<pre>trl-llava ") == 7
    assert "weak eyes, on purpose" in text
    assert re.search(r"judging_prompt:", text)
    before = summary["ppo"]["plain"]["before"]["chair"]
    assert f"Invented among mentioned objects: SFT {before:.3f}" in text
    differences = text[text.index("What differs") : text.index("Made of")]
    assert "<td>yes_no</td><td>no_only</td><td>no_only</td><td>no_only</td><td>both</td>" in differences
    assert "<td>correctness_coef</td><td>null</td><td>null</td><td>2.0</td><td>2.0</td>" in differences
    assert "yes_no: both" in text


def test_the_picture_for_a_readme_is_small(demo):
    file = demo[0] / "before_after.png"
    assert 5_000 < file.stat().st_size < 200_000


def test_marked_text_is_broken_between_words():
    text = [("I see a red circle, a green cross and a ", False), ("blue cross", True), (".", False)]
    lines = list(wrapped(text))
    assert lines == [
        [("I see a red circle, a ", False)],
        [("green cross and a ", False), ("blue ", True)],
        [("cross", True), (".", False)],
    ]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["--output_dir", str(tmp_path), "--quick"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_goals_are_those_of_the_readme():
    before = Truthfulness(0.3, 0.8, 0.88, 0.9, 0.9, 0.9, 12.0)
    good = Truthfulness(0.15, 0.4, 0.83, 0.6, 0.6, 0.9, 8.0)
    assert all(goals(before, good).values())
    bad = Truthfulness(0.16, 0.4, 0.82, 0.03, 0.99, 0.9, 5.0)
    assert not any(goals(before, bad).values())
    assert standard_error(0.5, 100) == 0.05


def test_the_true_score_counts_found_minus_invented():
    def score(text, kind, right):
        return true_score([[{"role": "assistant", "content": text}]], [kind], [right], [["red circle", "blue cross"]])

    assert score("I see a red circle and a blue cross.", "describe", "general") == [1.0]
    assert score("I see a red circle, a red circle and a red cross.", "describe", "general") == [-0.5]
    assert score("No, I see none.", "yes_no", "no") == [1.0]
    assert score("B. a red circle", "choice", "A") == [-1.0]


def test_weak_eyes_see_what_the_small_picture_holds(tmp_path):
    make_weak_eyed(BASE, tmp_path / "weak", 12)
    sharp, weak = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (BASE, tmp_path / "weak"))
    small = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    with torch.no_grad():
        seen = weak.get_image_features(small, return_dict=True).pooler_output
        blown_up = sharp.get_image_features(large, return_dict=True).pooler_output
    assert torch.allclose(torch.stack(seen), torch.stack(blown_up), atol=1e-4)
    processor = AutoProcessor.from_pretrained(tmp_path / "weak")
    assert processor.image_processor.size == {"height": 12, "width": 12}
    with pytest.raises(ValueError, match="image_size 16 does not divide"):
        make_weak_eyed(BASE, tmp_path / "other", 16)


def test_the_base_that_ships_is_small_and_answers_well(demo):
    folder, _ = demo
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 3_000_000
    rows = [json.loads(line) for line in (folder / "data" / "prompts" / "test.jsonl").read_text().splitlines()]
    quality = evaluate(BASE, None, folder / "data", rows).quality
    assert quality.chair < 0.1
    assert min(quality.recall, quality.yes_accuracy, quality.no_accuracy, quality.choice_accuracy) > 0.85


def test_the_command_that_makes_the_base_runs(tmp_path, capsys):
    make_base(tmp_path / "base", seed=1, scale=0.002)
    assert "together 3/3" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 450_000


@pytest.mark.slow
def test_the_quick_demo_cures_some_hallucination(tmp_path):
    summary = run_demo(tmp_path / "out", seed=6, plan=QUICK)
    for run in summary["ppo"].values():
        assert run["after"]["chair"] < run["before"]["chair"]
