"""Over-long rows are found before training, with the lengths the collator will make."""

import logging

import pytest
from datasets import Dataset
from transformers import AutoProcessor

from trl_llava.data.collators import PromptCollator, SFTCollator
from trl_llava.data.contract import RowError
from trl_llava.data.lengths import LengthMeter, drop_overlong
from trl_llava.data.load import rows_from
from trl_llava.data.preference_collators import PreferenceCollator
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
    assert caplog.messages == [f"Dropped 2 of 4 rows: longer than max_prompt_length={limit} tokens."]
    assert kept.features == dataset.features


def test_long_rows_are_an_error(tiny_processor, dataset):
    collator = PreferenceCollator(tiny_processor, max_length=20)
    with pytest.raises(
        RowError, match=r"a\[0\]: it has \d+ tokens, max_length allows 20 \(\d of 4 rows are too long\)"
    ):
        drop_overlong(dataset, collator, "error")


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
