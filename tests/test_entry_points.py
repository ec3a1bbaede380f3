"""The three entry points, end to end on a tiny model: what they leave behind, and what they refuse before training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from trl_llava import train_ppo, train_reward, train_sft
from trl_llava.data.contract import RowError
from trl_llava.errors import NotFoundError, RecipeError
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.rewards.reward_loading import find_function

SAVED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "processor_config.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "card.json",
    "versions.json",
}
QUICK = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"),
    *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
    *("--logging_steps", "1", "--learning_rate", "0.01"),
]
QUESTION = [{"role": "user", "content": "what is it?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def constant(completions: list[Any], **columns: Any) -> list[float]:
    """A reward function that a recipe can name."""
    return [0.5] * len(completions)


def lengthy(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """One whose rewards differ."""
    return [float(sum(ids)) / 100 for ids in completion_ids]


class Work:
    """A folder with rows for each stage, and the words that every run here needs."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        colors = ["red", "blue"] * 3
        for color in set(colors):
            tiny_models.image(color).save(folder / f"{color}.png")
        rows = [{"images": [f"{color}.png"], "prompt": QUESTION} for color in colors]
        facts = [{**row, "captions": [f"a {color} square"]} for row, color in zip(rows, colors, strict=True)]
        self.write("sft", [{**row, "completion": answer("a square")} for row in rows])
        self.write("reward", [{**row, "chosen": answer("a square"), "rejected": answer("a dog")} for row in facts])
        self.write("plain", [{**row, "chosen": answer("a square"), "rejected": answer("a dog")} for row in rows])
        self.write("ppo", facts)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(rows))

    def words(self, rows: str, out: str, *more: str) -> list[str]:
        places = ["--dataset_name", f"{self.folder}/{rows}.json", "--output_dir", f"{self.folder}/{out}"]
        return [*QUICK, *places, *more]

    def sft(self, out: str, *more: str) -> Any:
        base = ["--model_name_or_path", str(self.base), "--max_steps", "2"]
        return train_sft.main(self.words("sft", out, *base, *more))

    def reward(self, out: str, *more: str, rows: str = "reward") -> Any:
        base = ["--model_name_or_path", str(self.base), "--max_steps", "2"]
        return train_reward.main(self.words(rows, out, *base, *more))

    def ppo(self, out: str, *more: str, rows: str = "ppo") -> Any:
        short = ["--total_episodes", "4", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"]
        return train_ppo.main(self.words(rows, out, *short, "--num_sample_generations", "0", *more))


@pytest.fixture(scope="module")
def work(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"), tiny_llava_dir)


@pytest.fixture(scope="module")
def policy(work: Work) -> Path:
    work.sft("policy", "--use_peft", "--lora_r", "2", "--test_split_size", "2", "--eval_strategy", "steps")
    return work.folder / "policy"


@pytest.fixture(scope="module")
def reward_model(work: Work) -> Path:
    work.reward("reward_model", "--use_peft", "--lora_r", "2")
    return work.folder / "reward_model"


def test_sft_leaves_everything_behind(work: Work, policy: Path) -> None:
    assert {path.name for path in policy.iterdir()} == SAVED
    state = json.loads((policy / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert sum("eval_loss" in entry for entry in state["log_history"]) == 2
    assert str(work.base) in (policy / "README.md").read_text()
    changed = [
        key
        for key, value in load_file(policy / "adapter_model.safetensors").items()
        if "lora_B" in key and value.any()
    ]
    assert changed and not any("vision_tower" in key for key in changed)


def test_reward_model_carries_head_and_prompt(reward_model: Path, red_image: Any) -> None:
    assert {path.name for path in reward_model.iterdir()} == SAVED | {"factual_reward.json"}
    assert any("score" in key for key in load_file(reward_model / "adapter_model.safetensors"))
    prompt = json.loads((reward_model / "factual_reward.json").read_text())["judging_prompt"]
    assert (prompt["with_captions"], prompt["seed"]) == (True, 0)
    scores = FactualReward.from_pretrained(str(reward_model))(
        [QUESTION], [answer("a square")], images=[[red_image]], captions=[["a red square"]]
    )
    assert len(scores) == 1


def test_ppo_trains_policy_and_value(work: Work, policy: Path, reward_model: Path) -> None:
    trainer = work.ppo(
        "ppo", "--sft_model_path", str(policy), "--reward_model_path", str(reward_model), "--length_coef", "-1"
    )
    folder = work.folder / "ppo"
    assert {path.name for path in folder.iterdir()} == SAVED | {"ppo_state.json", "value_model"}
    first = json.loads((folder / "trainer_state.json").read_text())["log_history"][0]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"rewards/factual_reward/mean", "rewards/length/mean"} <= set(first)
    assert (trainer.args.model_adapter_name, trainer.args.ref_adapter_name) == ("default", "reference")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (policy, folder))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    head = load_file(folder / "value_model" / "adapter_model.safetensors")
    assert any("score" in key and value.any() for key, value in head.items())


def test_ppo_with_functions_of_ones_own(work: Work, policy: Path) -> None:
    own = "test_entry_points:constant"
    trainer = work.ppo(
        "ppo_own",
        "--sft_model_path",
        str(policy),
        "--value_init",
        "policy",
        "--reward_funcs",
        own,
        "--reward_weights",
        "2",
    )
    assert trainer.state.log_history[0]["objective/scores"] == 1.0


def test_ppo_from_a_whole_model_without_lora(work: Work) -> None:
    start = ["--model_name_or_path", str(work.base), "--value_init", "policy"]
    trainer = work.ppo("ppo_full", *start, "--reward_funcs", "test_entry_points:constant", "--total_episodes", "2")
    assert (work.folder / "ppo_full" / "model.safetensors").is_file()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def copy_after_one_step(whole: Path, resumed: Path) -> None:
    """What a run killed in its second step would have left."""
    shutil.copytree(whole, resumed)
    for path in resumed.iterdir():
        if path.is_dir() and path.name != "checkpoint-1":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("recipe.yaml", "versions.json"):
            path.unlink()


def test_sft_resumes_exactly(work: Work) -> None:
    words = ["--use_peft", "--lora_r", "2", "--save_strategy", "steps", "--save_steps", "1"]
    work.sft("whole", *words)
    copy_after_one_step(work.folder / "whole", work.folder / "resumed")
    work.sft("resumed", *words, "--resume_from_checkpoint", "true")
    whole, resumed = (load_file(work.folder / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_ppo_resumes_exactly(work: Work, policy: Path, kind: str) -> None:
    name = kind.split()[0]
    start = ["--sft_model_path", str(policy)] if kind == "adapter" else ["--model_name_or_path", str(work.base)]
    words = ["--value_init", "policy", "--reward_funcs", "test_entry_points:lengthy", *start]
    words += ["--save_strategy", "steps", "--save_steps", "1"]
    work.ppo(f"ppo_whole_{name}", *words)
    copy_after_one_step(work.folder / f"ppo_whole_{name}", work.folder / f"ppo_resumed_{name}")
    work.ppo(f"ppo_resumed_{name}", *words, "--resume_from_checkpoint", "true")
    file = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    for part in (file, f"value_model/{file}"):
        whole, resumed = (load_file(work.folder / f"ppo_{run}_{name}" / part) for run in ("whole", "resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_reward_model_starts_from_the_policys_adapter(work: Work, policy: Path) -> None:
    trainer = work.reward(
        "from_policy", "--adapter_name_or_path", str(policy), "--max_steps", "1", "--learning_rate", "0"
    )
    start = load_file(policy / "adapter_model.safetensors")
    end = load_file(work.folder / "from_policy" / "adapter_model.safetensors")
    assert all(torch.equal(start[key], end[key]) for key in start)
    assert end.keys() - start.keys() == {"base_model.model.score.weight", "base_model.model.score.bias"}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trainable) and any("score" in name for name in trainable)


# --- what is refused, and that it is before anything is trained or written -----------------------------------------


def test_rows_are_named_once(work: Work) -> None:
    with pytest.raises(RecipeError, match=r"either `dataset_name` or `datasets`: neither is given"):
        train_sft.main([*QUICK, "--output_dir", str(work.folder / "none"), "--model_name_or_path", str(work.base)])
    with pytest.raises(RecipeError, match=r"`test_split_size` must be a share .* below the 6 rows, found 6"):
        work.sft("none", "--test_split_size", "6")


def test_ppo_looks_for_captions_before_it_loads_a_model(work: Work, reward_model: Path) -> None:
    work.write(
        "bare", [{"images": ["red.png"], "prompt": QUESTION, "captions": facts} for facts in (["a"], [], ["b"])]
    )
    words = ["--model_name_or_path", "nobody/no-such-model", "--reward_model_path", str(reward_model)]
    with pytest.raises(RowError, match=r"bare.json\[1\]: it has no captions"):
        work.ppo("none", *words, rows="bare")
    with pytest.raises(NotFoundError, match="nobody/no-such-model"):  # the rows were fine, and a model is next
        work.ppo("none", *words, "--on_bad_row", "skip", rows="bare")


def test_adapter_for_another_base(work: Work, policy: Path, tmp_path: Path) -> None:
    other = tiny_models.tiny_llava(tmp_path / "other", vocab_size=640)
    with pytest.raises(RecipeError, match=r"`model_name_or_path` is .*other, but adapter .*policy was trained on"):
        words = ["--sft_model_path", str(policy), "--model_name_or_path", str(other)]
        work.ppo("none", *words, "--length_coef", "-1")


def test_adapter_without_head_is_no_reward_model(work: Work, policy: Path, reward_model: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(policy, headless)
    shutil.copy(reward_model / "factual_reward.json", headless)
    with pytest.raises(ValueError, match=r"adapter '.*headless' has no score head"):
        work.ppo("none", "--sft_model_path", str(policy), "--reward_model_path", str(headless))


def test_nothing_to_learn_from(work: Work, policy: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing to learn from: set `reward_model_path`"):
        work.ppo("none", "--sft_model_path", str(policy))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "'no_colon' must be 'package.module:function'"),
        ("no.such.module:f", "no.such.module of 'no.such.module:f' cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "math has no function 'no_such'"),
        ("math:pi", "'pi' of math is 3.14159"),
        ("gone.py:f", "there is no file gone.py of 'gone.py:f'; a relative path is seen from "),
    ],
)
def test_reward_function_that_is_not_there(path: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_function(path)


def test_a_reward_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_words.py").write_text("WORD = 'red'\n")
    text = "from own_words import WORD\n\ndef says_it(completions, **columns):\n"
    (tmp_path / "own.py").write_text(text + "    return [float(WORD in one[0]['content']) for one in completions]\n")
    function = find_function("own.py:says_it")
    assert function(completions=[[{"content": "a red dog"}], [{"content": "a dog"}]]) == [1.0, 0.0]
    assert find_function(f"{tmp_path}/own.py:says_it") is function
    with pytest.raises(RecipeError, match=r"own.py has no function 'says_that'"):
        find_function("own.py:says_that")
    with pytest.raises(RecipeError, match=r"'WORD' of own.py is 'red', expected a function"):
        find_function("own.py:WORD")
    (tmp_path / "broken.py").write_text("import math\n\nmath.pie\n")
    with pytest.raises(RecipeError, match=r"broken.py .* AttributeError: .* \(.*broken.py, line 3\)"):
        find_function("broken.py:f")
    (tmp_path / "torn.py").write_text("def f(:\n")
    with pytest.raises(RecipeError, match=r"torn.py .* SyntaxError: invalid syntax \(.*torn.py, line 1\)"):
        find_function("torn.py:f")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "trl_llava.cli", "sft"],
        ["-m", "trl_llava.train_sft"],
        ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "-m", "trl_llava.train_sft"],
    ],
)
def test_the_programs_run(work: Work, tmp_path: Path, launcher: list[str]) -> None:
    rows = ["--dataset_name", f"{work.folder}/sft.json", "--output_dir", str(tmp_path / "run")]
    words = [*QUICK, *rows, "--model_name_or_path", str(work.base), "--max_steps", "1", "--use_peft"]
    result = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == SAVED
