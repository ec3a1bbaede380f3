"""The symbolic reward terms, with the numbers of the paper's formulae."""

import inspect

import pytest

from trl_llava.data import contract as rows
from trl_llava.rewards import reward_terms
from trl_llava.rewards.reward_terms import correctness, length_term, missing_eos


@pytest.mark.parametrize(
    ("answer", "kind", "paper", "both"),
    [
        ("A. A red square", "A", 1.0, 1.0),
        ("  A.", "A", 1.0, 1.0),
        ("Looking at it, the correct option is C. It is blue.", "C", 1.0, 1.0),
        ("The correct option is A.", "A", 1.0, 1.0),
        ("The correct option is A.", "B", 0.0, 0.0),  # its own letter only
        ("A", "A", 0.0, 0.0),  # a letter without its full stop is no answer
        ("Answer: A.", "A", 0.0, 0.0),
        ("A.M. is the time", "A", 0.0, 0.0),
        ("I read an incorrect option is D. there", "D", 0.0, 0.0),
        ("No", "no", 0.5, 0.5),
        ("No, there is none.", "no", 0.5, 0.5),
        ("Yes, there is.", "no", -0.5, -0.5),
        ("Nothing is there", "no", 0.0, 0.0),  # the original counts these four by their first letters
        ("Not that I see", "no", 0.0, 0.0),
        ("No-one is there", "no", 0.0, 0.0),
        ("Yesterday", "no", 0.0, 0.0),
        ("no", "no", 0.0, 0.0),
        ("", "no", 0.0, 0.0),
        ("Yes.", "yes", 0.0, 0.5),
        ("No.", "yes", 0.0, -0.5),
        ("Yes.", "general", 0.0, 0.0),
    ],
)
def test_correctness(answer: str, kind: str, paper: float, both: float) -> None:
    assert correctness([answer], [kind], coef=1.0) == [paper]
    assert correctness([answer], [kind], coef=1.0, yes_no="both") == [both]


def test_correctness_is_twice_that_by_default_and_reads_messages() -> None:
    message = [{"role": "assistant", "content": "No, it is not."}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "D. A dog"}]}]
    assert correctness([message, parts, "Yes"], ["no", "D", "no"]) == [1.0, 2.0, -1.0]


@pytest.mark.parametrize("kind", ["maybe", "", None, "a"])
def test_unknown_answer_type_names_the_row(kind: str | None) -> None:
    with pytest.raises(
        ValueError, match=rf"answer_type of row 1 is {kind!r}, expected one of general, A, B, C, D, no"
    ):
        correctness(["A.", "No"], ["A", kind])


def test_missing_answer_type_column_names_the_switch() -> None:
    with pytest.raises(ValueError, match=r"needs a column `answer_type`.*correctness_coef"):
        correctness(["A."])


def test_kinds_are_those_of_the_row_contract() -> None:
    assert reward_terms.KINDS == rows.ANSWER_TYPES


def test_length_term_counts_tokens_and_stop() -> None:
    ids = [[5, 6, 7, 8, 2], [5], []]
    assert length_term(ids, response_length=20) == [-2.5, -0.5, 0.0]
    assert length_term(ids, response_length=20, length_multiplier=[2.0, -1.0, 1.0]) == [-5.0, 0.5, 0.0]
    assert length_term(ids, response_length=20, length_multiplier=[None, 0.0, None], coef=4.0) == [1.0, 0.0, 0.0]


def test_length_term_of_the_papers_numbers() -> None:
    assert length_term([[7] * 447 + [2]], response_length=896) == [-5.0]


def test_length_term_needs_a_positive_length() -> None:
    with pytest.raises(ValueError, match="response_length must be above 0, found 0"):
        length_term([[1]], response_length=0)


def test_missing_eos() -> None:
    assert missing_eos([[5, 2], [5, 6], [2, 5], []], eos_token_id=2) == [0.0, -8.0, 0.0, -8.0]
    assert missing_eos([[5, 9], [5, 6]], eos_token_id=[2, 9], penalty=1.0) == [0.0, -1.0]


def test_columns_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        correctness(["A."], ["A", "B"])
    with pytest.raises(ValueError, match="zip"):
        length_term([[1]], response_length=3, length_multiplier=[1.0, 1.0])


@pytest.mark.parametrize("term", [correctness, length_term, missing_eos])
def test_terms_take_trls_call(term) -> None:
    call = {"prompts": ["Is it?"], "completions": ["No"], "completion_ids": [[5, 2]], "answer_type": ["no"]}
    settings = {"response_length": 10, "eos_token_id": 2}
    settings = {k: v for k, v in settings.items() if k in inspect.signature(term).parameters}
    values = term(**call, images=[None], captions=[["a"]], trainer_state=None, **settings)
    assert len(values) == 1
    assert isinstance(values[0], float)
