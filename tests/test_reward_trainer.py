"""The reward trainer on a tiny LLaVA: the loss by hand, one image encoding per pair, what moves and what does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import DistributedType
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoProcessor, AutoTokenizer
from trl import RewardConfig

from trl_llava.configs.reward import LlavaRewardConfig
from trl_llava.data.contract import RowError
from trl_llava.errors import InputError
from trl_llava.health import UnhealthyRunError
from trl_llava.models.sequence_classification import LlavaForSequenceClassification
from trl_llava.prompts import JudgingPrompt
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.rewards.factual_reward import FactualReward

PEFT = LoraConfig(
    r=4, target_modules=r".*language_model\..*\.(q_proj|v_proj|down_proj)", modules_to_save=["score"]
)  # fmt: skip
JUDGING = JudgingPrompt(instruction="Judge it. {factual_prompt}", answer_prefix="The score is")


def rows(count: int = 6) -> Dataset:
    """Pairs in TRL's format, every third without an image."""
    table = {
        "prompt": [[{"role": "user", "content": f"What is in picture {i}?"}] for i in range(count)],
        "chosen": [[{"role": "assistant", "content": "There is a red square."}]] * count,
        "rejected": [[{"role": "assistant", "content": "There is a blue circle."}]] * count,
        "images": [[] if i % 3 == 2 else [tiny_models.image("red")] for i in range(count)],
        "captions": [["a red square", "a picture"]] * count,
    }
    return Dataset.from_dict(table).cast_column("images", List(Image()))


def make_model(base: Path) -> LlavaForSequenceClassification:
    torch.manual_seed(3)
    model = LlavaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    return model


def make_trainer(base: Path, folder: Path, **changes: Any) -> LlavaRewardTrainer:
    own = ("train_dataset", "eval_dataset", "judging_prompt", "peft_config", "callbacks", "processing_class")
    given = {name: changes.pop(name) for name in own if name in changes}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }
    return LlavaRewardTrainer(
        model=make_model(base),
        args=LlavaRewardConfig(**settings),
        **{
            "processing_class": AutoProcessor.from_pretrained(base),
            "train_dataset": rows(),
            "judging_prompt": JUDGING,
            "peft_config": PEFT,
            **given,
        },
    )


def rewards(trainer: LlavaRewardTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected rewards, each conversation and image on its own: no batch, no shared features."""
    chosen, rejected = [], []
    collator = replace(trainer.preference_collator, share_prefix=False)
    for row in trainer.train_dataset:
        batch = collator([row])
        batch.pop("image_copies", None)
        for half, results in enumerate((chosen, rejected)):
            real = batch["attention_mask"][half].bool()
            inputs = {"input_ids": batch["input_ids"][half][real][None]}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "pixel_values" in batch:
                inputs["pixel_values"] = batch["pixel_values"]
            with torch.no_grad():
                results.append(trainer.model(**inputs).logits.squeeze())
    return torch.stack(chosen), torch.stack(rejected)


@pytest.mark.parametrize(
    ("centering", "coefficient", "expected"),
    [
        ("none", None, lambda c, r: 0.0),
        ("trl", 0.1, lambda c, r: 0.1 * ((c + r) ** 2).mean()),
        ("paper", None, lambda c, r: 0.001 * (c + r).mean().abs()),
        ("paper", 0.5, lambda c, r: 0.5 * (c + r).mean().abs()),
    ],
)
def test_the_loss_by_hand(tiny_llava_dir, tmp_path, centering, coefficient, expected):
    trainer = make_trainer(
        tiny_llava_dir, tmp_path, train_dataset=rows(3), max_steps=1, learning_rate=0.0,
        reward_centering=centering, center_rewards_coefficient=coefficient,
    )  # fmt: skip
    chosen, rejected = rewards(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    by_hand = -torch.log(1 / (1 + torch.exp(rejected - chosen))).mean() + expected(chosen, rejected)
    assert logged["loss"] == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-4)
    assert logged["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert logged["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3, abs=1e-4)


def test_adapter_and_head_move_and_all_else_is_bit_identical(tiny_llava_dir, tmp_path):
    # Without centring the head's bias has no gradient: it is in both rewards of a pair.
    trainer = make_trainer(tiny_llava_dir, tmp_path, reward_centering="paper")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (".default." in name), f"{name} {'moved' if moved else 'did not move'}"


def test_each_image_is_encoded_once_per_pair(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path, train_dataset=rows(3), max_steps=1)
    seen = []
    tower = trainer.model.get_base_model().model.vision_tower
    tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    trainer.train()
    assert seen == [2]  # three pairs, one of them without an image


def test_it_learns_to_prefer_the_chosen_answer(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path, max_steps=12, eval_dataset=rows(3))
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]


def test_without_a_judging_prompt_the_answer_is_judged_where_it_ends(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path, judging_prompt=None)
    processor = trainer.processing_class
    batch = trainer.preference_collator([trainer.train_dataset[0]])
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()][-1] == processor.tokenizer.eos_token_id
    trainer.train()


def plain_trainer(base: Path, folder: Path, train_dataset: Dataset, **given: Any) -> LlavaRewardTrainer:
    args = RewardConfig(str(folder), max_steps=2, use_cpu=True, bf16=False, save_strategy="no", report_to=[])
    return LlavaRewardTrainer(make_model(base), args, train_dataset, **given)


def test_trls_config_alone_trains_as_the_command_does(tiny_llava_dir, tmp_path):
    """The processor comes from the model, and captions are shown where the rows have them."""
    trainer = plain_trainer(tiny_llava_dir, tmp_path / "plain", rows())
    assert trainer.judging_prompt == JudgingPrompt(with_captions=True)
    whole = make_trainer(
        tiny_llava_dir,
        tmp_path / "whole",
        judging_prompt=LlavaRewardConfig("x", use_cpu=True, bf16=False).make_judging_prompt(),
    )
    row = trainer.train_dataset[0]
    shown = trainer.preference_collator([row])["input_ids"]
    assert torch.equal(shown, whole.preference_collator([row])["input_ids"])
    assert "a red square" in trainer.processing_class.tokenizer.decode(shown[0])
    trainer.train()
    trainer.save_model()
    assert FactualReward.from_pretrained(str(tmp_path / "plain")).needs_captions


def test_captions_in_python_are_all_or_none(tiny_llava_dir, tmp_path):
    bare = rows().map(lambda row: {"captions": []})
    assert plain_trainer(tiny_llava_dir, tmp_path, bare).judging_prompt == JudgingPrompt(with_captions=False)
    some = rows().map(lambda row, i: {"captions": ["a fact"] if i else []}, with_indices=True)
    with pytest.raises(RowError, match=r"train\[0\]: it has no captions, but the reward needs them"):
        plain_trainer(tiny_llava_dir, tmp_path, some)
    named = some.rename_column("captions", "facts").select(range(1, 6))
    trainer = plain_trainer(tiny_llava_dir, tmp_path, named, eval_dataset=named, captions_column="facts")
    assert trainer.judging_prompt == JudgingPrompt(with_captions=True)
    assert trainer.train_dataset["captions"][:] == trainer.eval_dataset["captions"][:] == [["a fact"]] * 5


def test_our_config_says_how_a_completion_is_judged(tiny_llava_dir, tmp_path):
    args = LlavaRewardConfig(str(tmp_path), use_cpu=True, bf16=False, with_captions=False, caption_seed=3)
    trainer = LlavaRewardTrainer(make_model(tiny_llava_dir), args, rows())
    assert trainer.judging_prompt == JudgingPrompt(with_captions=False, seed=3)


def test_a_model_from_nowhere_needs_its_processor_named(tiny_llava_dir, tmp_path):
    model = make_model(tiny_llava_dir)
    model.config._name_or_path = ""
    with pytest.raises(InputError, match="`processing_class` is not given, and the LlavaForSequenceClassification"):
        LlavaRewardTrainer(model, RewardConfig(str(tmp_path), use_cpu=True, bf16=False), rows())


def test_a_tokenizer_does_for_rows_without_images(tiny_llava_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava_dir)
    text = rows(3).map(lambda row: {"images": []})
    trainer = make_trainer(tiny_llava_dir, tmp_path, processing_class=tokenizer, train_dataset=text)
    trainer.train()
    trainer.save_model()
    whole = make_trainer(tiny_llava_dir, tmp_path, train_dataset=text)
    whole.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-5)
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_tokenizer_is_refused_for_rows_with_images(tiny_llava_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava_dir)
    with pytest.raises(InputError, match="image"):
        make_trainer(tiny_llava_dir, tmp_path, processing_class=tokenizer)


def test_the_captions_are_part_of_what_is_judged(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path)
    batch = replace(trainer.preference_collator, share_prefix=False)([trainer.train_dataset[0]])
    texts = trainer.processing_class.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert all("a red square" in text.split("Judge it.")[1] for text in texts)
    assert texts[0].split("Judge it.")[1].split() == texts[1].split("Judge it.")[1].split()


@pytest.mark.parametrize("centering", ["trl", "paper"])
def test_a_pair_in_an_incomplete_micro_batch_weighs_as_any_other(tiny_llava_dir, tmp_path, centering):
    settings = {"train_dataset": rows(3), "max_steps": 1, "optim": "sgd", "reward_centering": centering}
    whole = make_trainer(tiny_llava_dir, tmp_path, **settings)
    parts = make_trainer(
        tiny_llava_dir, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings
    )
    for trainer in (whole, parts):
        trainer.train()
    assert parts.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-4)
    expected = dict(whole.model.named_parameters())
    for name, parameter in parts.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("launched", "advice"), [("NO", "no weight was changed by it"), ("DEEPSPEED", "go back to the last checkpoint")]
)
def test_weights_are_called_unchanged_only_where_they_are(tiny_llava_dir, tmp_path, launched, advice):
    trainer = make_trainer(tiny_llava_dir, tmp_path)
    trainer.accelerator.state.distributed_type = DistributedType(launched)
    try:
        for where in ("loss", "gradient norm"):
            with pytest.raises(UnhealthyRunError, match=f"{where} is not finite at step 1: {advice}"):
                trainer.check_in_step(where, torch.tensor(float("nan")))
    finally:
        trainer.accelerator.state.distributed_type = DistributedType.NO


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(tiny_llava_dir, tmp_path, where):
    trainer = make_trainer(tiny_llava_dir, tmp_path)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    if where == "weight":
        parameter.data[0, 0] = float("nan")
    else:
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    what = {"weight": "loss", "gradient": "gradient norm"}[where]
    with pytest.raises(UnhealthyRunError, match=f"^{what} is not finite at step 1"):
        trainer.train()
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[key]) or key == name
