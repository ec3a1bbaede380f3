"""What a DataLoader's worker process raises arrives as the error it was, in its own words."""

from typing import Any

import pytest
from torch.utils.data import DataLoader

from trl_llava.data.contract import RowError
from trl_llava.errors import ExplainedError, InputError, NotFoundError, own_words


class Failing:
    """A collator that raises."""

    def __init__(self, kind: type[Exception], *args: str) -> None:
        self.kind, self.args = kind, args

    def __call__(self, rows: list[int]) -> Any:
        try:
            raise OSError("the cause")
        except OSError as error:
            raise self.kind(*self.args) from error


@pytest.mark.parametrize("kind", [InputError, NotFoundError])
def test_an_explained_error_keeps_its_words(kind: type[ExplainedError]) -> None:
    with pytest.raises(kind) as caught:
        list(DataLoader([1, 2], collate_fn=Failing(kind, "the model is not there. Look\nelsewhere."), num_workers=1))
    assert str(caught.value) == "the model is not there. Look\nelsewhere."


def test_a_row_error_keeps_row_problem_and_fix() -> None:
    words = ("a.json[7]", "the image x.png cannot be read (image file is truncated)", "Replace the file. Or not")
    with pytest.raises(RowError) as caught:
        list(DataLoader([1, 2], collate_fn=Failing(RowError, *words), num_workers=1))
    assert str(caught.value) == str(RowError(*words))
    assert caught.value.row_name == "a.json[7]" and "is truncated" in caught.value.problem


def test_only_torch_may_leave_out_problem_and_fix() -> None:
    with pytest.raises(TypeError, match="needs a row's name"):
        RowError("a.json[7]")


def test_other_messages_are_left_alone() -> None:
    text = "Caught RowError in DataLoader worker process 0.\nOriginal Traceback: none"
    assert own_words(RowError, text) == text
