"""GRPO, RLOO and DPO through their entry points, on the demo's world and base model."""

import doctest
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models
import torch
import toy_models
from PIL import Image
from safetensors.torch import load_file
from transformers import ProcessorMixin
from trl import RLOOTrainer

import trl_llava.demo
from trl_llava import online_rl, train_dpo, train_grpo, train_reward, train_rloo, train_sft
from trl_llava.data import trl_rows
from trl_llava.data.collators import SFTCollator
from trl_llava.data.contract import RowError
from trl_llava.data.load import rows_from
from trl_llava.data.preference_collators import DPOCollator
from trl_llava.data.trl_rows import as_trl_reads
from trl_llava.demo.data import Sizes, write_data
from trl_llava.errors import RecipeError

BASE = Path(trl_llava.demo.__file__).parent / "base"
QUICK = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"),
    *("--model_name_or_path", str(BASE), "--per_device_train_batch_size", "4", "--max_steps", "2"),
    *("--learning_rate", "0.01", "--logging_steps", "1"),
]
LORA = ["--use_peft", "--lora_r", "4", "--lora_dropout", "0"]
ONLINE = {"grpo": train_grpo.main, "rloo": train_rloo.main}
SHORT = ["--num_generations", "2", "--max_completion_length", "6"]


class World:
    """The demo's rows, few of them, with a policy and a reward model trained on them for two steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_data(folder / "data", 0, Sizes(12, 16, 16, 4, 16, 4))

    def words(self, rows: str, out: str, *more: str) -> list[str]:
        places = ["--dataset_name", f"{self.folder}/data/{rows}", "--image_folder", f"{self.folder}/data/pictures"]
        return [*QUICK, *places, "--output_dir", f"{self.folder}/{out}", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world") / "demo")


@pytest.fixture(scope="module")
def policy(world: World) -> str:
    train_sft.main(world.words("sft", "policy", *LORA))
    return f"{world.folder}/policy"


@pytest.fixture(scope="module")
def reward_model(world: World) -> str:
    judge = json.dumps(
        {"instruction": "Is it true? {factual_prompt}", "answer_prefix": "True:", "factual_header": "\n"}
    )
    train_reward.main(world.words("preference", "judge", *LORA, "--judging_prompt", judge))
    return f"{world.folder}/judge"


def adapter(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_online_with_the_factual_reward(world: World, policy: str, reward_model: str, stage: str) -> None:
    start = ["--adapter_name_or_path", policy, "--reward_model_path", reward_model, "--beta", "0.1"]
    correct = ["--reward_funcs", "trl_llava.rewards.reward_terms:correctness", "--reward_weights", "1.0", "0.5"]
    trainer = ONLINE[stage](world.words("prompts", stage, *start, *correct, *SHORT))
    logged = trainer.state.log_history[0]
    assert {"rewards/factual_reward/mean", "rewards/correctness/mean"} <= set(logged)
    assert logged["kl"] == pytest.approx(0, abs=1e-5)  # the reference is stage 1's policy, not its base
    before, after = adapter(policy), adapter(world.folder / stage)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name and "vision" not in name for name in trained)
    assert trainer.generation_config.suppress_tokens == [trainer.processing_class.image_token_id]
    assert (world.folder / stage / "recipe.yaml").is_file()
    assert f"policy after {stage.upper()}" in (world.folder / stage / "README.md").read_text()


CALLS: list[dict[str, Any]] = []


def noted(completions: list[Any], **columns: Any) -> list[float]:
    """A reward function that keeps what TRL's trainer gives it."""
    CALLS.append({"completions": completions, **columns})
    return [float(i) for i in range(len(completions))]


def test_the_reward_gets_what_the_policy_got(world: World) -> None:
    train_grpo.main(world.words("prompts", "noted", *LORA, *SHORT, "--reward_funcs", "test_beyond_ppo:noted"))
    call = CALLS[0]
    assert [len(images) for images in call["images"]] == [1, 1, 1, 1]
    assert all(isinstance(images[0], Image.Image) for images in call["images"])
    assert all(captions and all(isinstance(caption, str) for caption in captions) for captions in call["captions"])
    assert call["row_name"][0] == call["row_name"][1]  # two completions of one row
    assert call["completions"][0][0]["role"] == "assistant"


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_tables_of_completions_say_which_images_and_captions(world: World, stage: str) -> None:
    big = world.folder / "data" / "pictures" / "big.png"
    Image.new("RGB", (1024, 512), "red").save(big)
    rows = [{"images": ["big.png"], "prompt": [{"role": "user", "content": "what?"}], "captions": ["Red."]}] * 4
    (world.folder / "big.json").write_text(json.dumps(rows))
    reward = ["--reward_funcs", "test_beyond_ppo:noted", "--log_completions"]
    trainer = ONLINE[stage](world.words("../big.json", f"{stage}_tables", *LORA, *SHORT, *reward))
    extra = trainer._logs["extra"]
    assert list(extra["captions"]) == [["Red."]] * 4 and list(extra["image_names"]) == [["big.png"]] * 4
    assert [[image.size for image in images] for images in trainer._logs["images"]] == [[(256, 128)]] * 4
    texts = [*trainer._logs["prompt"], *trainer._logs["completion"]]
    assert len(texts) == 8 and all(isinstance(text, str) for text in texts)  # W&B's tables refuse messages
    if stage == "grpo":  # RLOO's tables go to trackers only
        table = pd.read_parquet(world.folder / "grpo_tables" / "completions" / "completions_00002.parquet")
        assert [list(names) for names in table["image_names"]] == [["big.png"]] * 4
        assert [list(captions) for captions in table["captions"]] == [["Red."]] * 4


def test_dpo_on_the_preferences(world: World, policy: str) -> None:
    trainer = train_dpo.main(world.words("preference", "dpo", "--adapter_name_or_path", policy))
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # policy and reference are the same
    before, after = adapter(policy), adapter(world.folder / "dpo")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(".default." in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)


def test_rows_without_captions_stop_before_training(world: World, reward_model: str) -> None:
    rows = [json.loads(line) for line in (world.folder / "data/prompts/train.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in row.items() if key != "captions"} for row in rows]
    (world.folder / "bare.json").write_text(json.dumps(bare))
    words = world.words("../bare.json", "none", *LORA, *SHORT, "--reward_model_path", reward_model)
    with pytest.raises(RowError, match=r"bare.json\[0\]: it has no captions"):
        train_grpo.main(words)


def test_what_is_refused(world: World) -> None:
    with pytest.raises(RecipeError, match="nothing to learn from: set `reward_model_path`, `reward_funcs` or"):
        train_rloo.main(world.words("prompts", "none", *SHORT))
    with pytest.raises(RecipeError, match=r"`use_vllm` must stay False.*TRL 1\.16 with vLLM 0\.31"):
        train_grpo.main(world.words("prompts", "none", *SHORT, "--use_vllm"))
    with pytest.raises(RecipeError, match="`padding_free` must stay False"):
        train_dpo.main(world.words("preference", "none", "--padding_free"))
    with pytest.raises(RowError, match=r"max_length allows 20"):
        train_dpo.main(world.words("preference", "none", "--max_length", "20"))
    with pytest.raises(RowError, match=r"max_prompt_length allows 8"):
        train_grpo.main(
            world.words("prompts", "none", *SHORT, "--max_prompt_length", "8", "--reward_funcs", "math:fsum")
        )


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_onevision_with_one_image_a_row(world: World, tmp_path: Path, stage: str) -> None:
    base = toy_models.onevision(tmp_path)
    words = [
        *LORA,
        *SHORT,
        "--reward_funcs",
        "trl_llava.rewards.reward_terms:correctness",
        "--model_name_or_path",
        str(base),
    ]
    words += ["--per_device_train_batch_size", "2", "--beta", "0.1"]
    trainer = ONLINE[stage](world.words("prompts", f"ov-{stage}", *words, "--max_steps", "1"))
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    rows = [json.loads(line) for line in (world.folder / "data/prompts/train.jsonl").read_text().splitlines()]
    rows[1]["images"] = rows[1]["images"] * 2
    (world.folder / "two.json").write_text(json.dumps(rows))
    with pytest.raises(RowError, match=r"two.json\[1\]: it has 2 images, and TRL's trainer would process each"):
        ONLINE[stage](world.words("../two.json", "none", *words))


def test_a_family_that_trl_cannot_hand_on(world: World, tiny_processor: ProcessorMixin) -> None:
    tiny_processor.image_processor.model_input_names = ["pixel_values", "patch_order"]
    with pytest.raises(RecipeError, match="TRL's RLOOTrainer does not know patch_order"):
        online_rl._allows_one_image_only(tiny_processor, RLOOTrainer)


def test_the_length_term_counts_to_the_limit_of_an_answer(world: World) -> None:
    words = [*LORA, *SHORT, "--length_coef", "-10", "--max_steps", "1"]
    trainer = train_rloo.main(world.words("prompts", "length", *words))
    logged = trainer.state.log_history[0]
    mean_length = logged["completions/mean_length"]  # of six tokens at most
    assert logged["rewards/length/mean"] == pytest.approx(-10 * mean_length / 6)


def test_rows_with_and_without_pictures(world: World) -> None:
    rows = [json.loads(line) for line in (world.folder / "data/prompts/train.jsonl").read_text().splitlines()]
    for row in rows[3:]:
        row["images"] = []
    (world.folder / "mixed.json").write_text(json.dumps(rows))
    words = [*LORA, *SHORT, "--reward_funcs", "trl_llava.rewards.reward_terms:correctness"]
    with pytest.raises(RowError, match=r"mixed.json\[3\]: it has no image, unlike the rows before it"):
        train_grpo.main(world.words("../mixed.json", "none", *words))
    (world.folder / "text.json").write_text(json.dumps(rows[3:]))
    trainer = train_grpo.main(world.words("../text.json", "text", *words, "--max_steps", "1"))
    assert trainer.state.global_step == 1


def test_dpo_learns_from_the_ids_of_sft(tiny_processor: ProcessorMixin, red_image: Image.Image) -> None:
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    answers = {name: [{"role": "assistant", "content": f"a {name} square"}] for name in ("chosen", "rejected")}
    row = {"row_name": "a[0]", "images": [red_image], "prompt": question, **answers}
    batch = DPOCollator(tiny_processor)([row])
    assert batch["pixel_values"].shape[0] == 2
    for i, name in enumerate(answers):
        sft = SFTCollator(tiny_processor)([{**row, "completion": answers[name]}])
        length = sft["input_ids"].shape[1]
        assert batch["input_ids"][i, :length].tolist() == sft["input_ids"][0].tolist()
        assert batch["attention_mask"][i].sum() == length
        learned = (sft["labels"][0] != -100).int().tolist()
        assert batch["completion_mask"][i].tolist() == learned + [0] * (batch["input_ids"].shape[1] - length)


def test_rows_as_trl_reads_them(red_image: Image.Image) -> None:
    from datasets import Dataset

    question = [{"role": "user", "content": "what is it?"}]
    rows = Dataset.from_list([{"images": [red_image], "prompt": question}])
    assert doctest.testmod(trl_rows).failed == 0
    row = as_trl_reads(rows_from(rows, "prompt"))[0]
    assert row["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert row["images"][0].mode == "RGB" and row["images"][0].size == tiny_models.image("red").size
    assert row["row_name"] == "dataset[0]"
