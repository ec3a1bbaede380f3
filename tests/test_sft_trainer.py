"""SFT on a tiny LLaVA: the loss is on the answers, the adapter moves, and all else stays bit-identical."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import SFTConfig

from trl_llava.configs.sft import LlavaSFTConfig
from trl_llava.data.collators import SFTCollator
from trl_llava.data.contract import RowError
from trl_llava.data.load import rows_from
from trl_llava.health import UnhealthyRunError
from trl_llava.sft_trainer import LlavaSFTTrainer

PEFT = LoraConfig(r=4, target_modules=r".*language_model\..*\.(q_proj|v_proj|down_proj)")


def rows(count: int = 6, answer: str = "There is a red square.") -> Dataset:
    """Two-turn conversations in TRL's format, every third without an image."""
    turns = [
        {"role": "user", "content": "What is in the picture?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Is there a blue circle?"},
        {"role": "assistant", "content": "No, there is not."},
    ]
    images = [[] if i % 3 == 2 else [tiny_models.image("red")] for i in range(count)]
    return Dataset.from_dict({"messages": [turns] * count, "images": images}).cast_column("images", List(Image()))


def make_trainer(base: Path, folder: Path, train_dataset: Dataset | None = None, **changes: Any) -> LlavaSFTTrainer:
    extra = {name: changes.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in changes}
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
    return LlavaSFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32),
        args=LlavaSFTConfig(**settings),
        train_dataset=train_dataset or rows(),
        processing_class=AutoProcessor.from_pretrained(base),
        **{"peft_config": PEFT, **extra},
    )


def answer_loss(model: PreTrainedModel, base: Path) -> float:
    """The mean negative log-likelihood of the answers' tokens, written out."""
    batch = SFTCollator(AutoProcessor.from_pretrained(base))(list(rows_from(rows(3), "sft")))
    labels = batch.pop("labels")
    with torch.no_grad():
        logprobs = model(**batch).logits.log_softmax(-1)
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                total -= logprobs[row, t - 1, labels[row, t]].item()
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("given", "labels_on"),
    [
        ({}, "answers"),
        ({"completion_only_loss": True}, "completion"),
        ({"completion_only_loss": False}, "all"),
        ({"assistant_only_loss": True}, "answers"),
    ],
)
def test_trls_config_alone_trains_as_the_command_does(tiny_llava_dir, tmp_path, given, labels_on):
    args = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], seed=3, **given)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    trainer = LlavaSFTTrainer(model, args, rows(3))
    assert trainer.data_collator.labels_on == labels_on
    assert type(trainer.processing_class) is type(AutoProcessor.from_pretrained(tiny_llava_dir))
    assert trainer.args.seed == 3 and trainer.args.max_steps == 1 and not args.__dict__.get("overlong")
    if not given:
        trainer.train()


def test_the_loss_is_that_of_the_answers_of_all_turns(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path, rows(3), learning_rate=0.0, max_steps=1)
    trainer.train()
    untouched = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    expected = answer_loss(untouched, tiny_llava_dir)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_adapter_moves_and_all_else_is_bit_identical(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == ("lora_" in name), f"{name} {'moved' if moved else 'did not move'}"


def test_a_batch_without_any_image_trains(tiny_llava_dir, tmp_path):
    text_only = rows(3).map(lambda row: {"images": []})
    trainer = make_trainer(tiny_llava_dir, tmp_path, text_only)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_evaluation_set_is_prepared_the_same_way(tiny_llava_dir, tmp_path):
    trainer = make_trainer(tiny_llava_dir, tmp_path, eval_dataset=rows(3))
    metrics = trainer.evaluate()
    untouched = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    assert metrics["eval_loss"] == pytest.approx(answer_loss(untouched, tiny_llava_dir), rel=1e-4)


def test_a_row_that_is_too_long_is_named_or_dropped_but_never_cut(tiny_llava_dir, tmp_path, caplog):
    long = rows(6).map(
        lambda row, i: (
            {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * 500}]} if i == 4 else row
        ),
        with_indices=True,
    )
    with pytest.raises(RowError, match=r"\[4\]"):
        make_trainer(tiny_llava_dir, tmp_path, long, max_length=400)
    trainer = make_trainer(tiny_llava_dir, tmp_path, long, max_length=400, overlong="drop")
    assert len(trainer.train_dataset) == 5


@pytest.mark.parametrize(("field", "value"), [("packing", True), ("padding_free", True)])
def test_an_option_that_cannot_work_with_images_is_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must stay"):
        LlavaSFTConfig(output_dir=str(tmp_path), **{field: value})


def test_accumulation_changes_nothing(tiny_llava_dir, tmp_path):
    def trained(batch: int, accumulation: int) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            tiny_llava_dir, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        return trainer.model.state_dict()

    whole, parts = trained(6, 1), trained(2, 3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)


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
