"""Over-long rows are found before training, with the lengths the collator will make."""

import json
import logging
import shutil

import pytest
import test_reward_trainer
import test_sft_trainer
from datasets import Dataset
from tiny_trainers import make_adapter, ppo_trainer
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.contract import RowError
from trl_llava.data.lengths import LengthMeter, drop_overlong
from trl_llava.data.load import rows_from
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.models.longest_row import positions_of
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, JudgingPrompt


@pytest.fixture
def dataset(red_image, blue_image):
    def record(question, images):
        return {
            "images": images,
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": "Yes." + " Yes, there is." * 3 * (len(images) == 2)}],
            "rejected": [{"role": "assistant", "content": "No, there is not."}],
            "captions": ["a square"],
        }

    records = [
        record("Is it?", [red_image]),
        record("Is it? " * 9, []),
        record("Both?", [red_image, blue_image]),
        record("It?", []),
    ]
    return rows_from(Dataset.from_list(records), "preference", name="a")


def token_lengths(rows, collator):
    return [length for length, _ in LengthMeter(collator).measure(rows)]


@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_llava_next_dir", "tiny_llava_onevision_dir"])
def test_lengths_are_those_of_the_batch(family, request, dataset):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(family))
    processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    prompt = PromptCollator(processor)
    assert token_lengths(list(dataset), prompt) == prompt(list(dataset))["attention_mask"].sum(1).tolist()
    pair = PreferenceCollator(processor, judging_prompt=JudgingPrompt())
    both = pair(list(dataset))["attention_mask"].sum(1).view(2, 4)
    assert (both[0] > both[1]).tolist() == [False, False, True, False]
    assert token_lengths(list(dataset), pair) == both.amax(0).tolist()


def test_long_rows_are_dropped_and_counted(tiny_processor, dataset, caplog):
    collator = PromptCollator(tiny_processor)
    lengths = token_lengths(list(dataset), collator)
    limit = sorted(lengths)[1]
    collator.max_prompt_length = limit
    with caplog.at_level(logging.WARNING, logger="trl_llava.data.lengths"):
        kept = drop_overlong(dataset, collator, "drop")
    assert kept["row_name"][:] == [f"a[{i}]" for i in range(4) if lengths[i] <= limit]
    assert len(kept) == 2
    assert caplog.messages == [f"Dropped 2 of 4 rows, which are too long: max_prompt_length allows {limit} tokens."]
    assert kept.features == dataset.features


def test_long_rows_are_an_error(tiny_processor, dataset):
    collator = PreferenceCollator(tiny_processor, max_length=20)
    with pytest.raises(
        RowError, match=r"a\[0\]: it has \d+ tokens, max_length allows 20 \(\d of 4 rows are too long\)"
    ):
        drop_overlong(dataset, collator, "error")


def test_no_row_is_longer_than_the_models_positions_whatever_a_recipe_allows(tiny_processor, tiny_llava_dir, dataset):
    lengths = token_lengths(list(dataset), PromptCollator(tiny_processor))
    positions = sorted(lengths)[1]
    for allowed in (None, positions + 1):
        collator = PromptCollator(tiny_processor, max_prompt_length=allowed)
        with pytest.raises(
            RowError, match=rf"it has \d+ tokens, the model has positions for {positions} \(2 of 4 rows"
        ):
            drop_overlong(dataset, collator, "error", positions=positions)
        assert len(drop_overlong(dataset, collator, "drop", positions=positions)) == 2
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir)
    assert [positions_of(place, room=48) for place in (model, str(tiny_llava_dir))] == [2000, 2000]


def test_dropping_every_row_is_an_error(tiny_processor, dataset):
    with pytest.raises(RowError, match="4 of 4 rows are too long"):
        drop_overlong(dataset, PromptCollator(tiny_processor, max_prompt_length=3), "drop")


def test_without_a_limit_nothing_is_measured(tiny_processor, dataset):
    assert drop_overlong(dataset, PromptCollator(tiny_processor), "error") is dataset
    assert drop_overlong(dataset, list, "error") is dataset  # a collator of one's own checks its own limits
    assert drop_overlong(dataset, PromptCollator(tiny_processor, max_prompt_length=500), "error") is dataset


def test_unknown_policy_is_an_error(tiny_processor, dataset):
    with pytest.raises(ValueError, match="overlong is 'cut', expected `error` or `drop`"):
        drop_overlong(dataset, SFTCollator(tiny_processor), "cut")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_without_a_limit_holds_its_rows_against_the_model(stage, tiny_llava_dir, tmp_path):
    """Few positions: with 30 of them no row with an image fits, nor a prompt in front of 20 new tokens."""
    short = tmp_path / "short"
    shutil.copytree(tiny_llava_dir, short)
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 30
    (short / "config.json").write_text(json.dumps(config))
    make = {
        "sft": lambda: test_sft_trainer.make_trainer(short, tmp_path / "run", max_length=None),
        "reward": lambda: test_reward_trainer.make_trainer(short, tmp_path / "run", max_length=None),
        "ppo": lambda: ppo_trainer(
            short, make_adapter(short, tmp_path / "adapter"), tmp_path / "run", response_length=20
        ),
    }
    with pytest.raises(RowError, match=f"tokens, the model has positions for {10 if stage == 'ppo' else 30} "):
        make[stage]()
