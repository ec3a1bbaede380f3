"""The judging prompt of a recipe: texts replace the paper's one by one, anything else is refused by name."""

import pytest

from trl_llava.configs.recipe import make_parser
from trl_llava.errors import RecipeError
from trl_llava.prompts import JudgingPrompt


def prompt_of(*words: str) -> JudgingPrompt:
    fixed = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false"]
    return make_parser("reward").parse([*fixed, *words]).training_args.make_judging_prompt()


def test_texts_of_the_recipe_replace_the_papers_one_by_one():
    assert prompt_of() == JudgingPrompt()
    found = prompt_of(
        "--judging_prompt", '{"answer_prefix": "Score"}', "--with_captions", "false", "--caption_seed", "3"
    )
    assert found == JudgingPrompt(answer_prefix="Score", with_captions=False, seed=3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ('{"seed": 3}', r"`judging_prompt`: `seed` is 3, expected a text"),
        ('{"instruktion": "x"}', r"unknown fields \['instruktion'\]"),
        ('{"instruction": "Is it true?"}', r"has no \{factual_prompt\}"),
    ],
)
def test_anything_else_is_refused_by_name(texts, message):
    with pytest.raises(RecipeError, match=message):
        prompt_of("--judging_prompt", texts)
