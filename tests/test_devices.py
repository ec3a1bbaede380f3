"""The default tests see no GPU, those of the marker `gpu` all of them."""

import pytest
from devices import hidden


@pytest.mark.parametrize(
    ("words", "sees"),
    [
        ("-q tests", False),
        ("-m slow tests", False),
        ("-q -m gpu tests", True),
        ("-mgpu", True),
        ("--maxfail 1 --markers gpu", False),
    ],
)
def test_gpus_are_hidden_unless_their_tests_are_wanted(
    words: str, sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert hidden(words.split()) == ({} if sees else {"CUDA_VISIBLE_DEVICES": ""})
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")  # has what its controller sees
    assert hidden(words.split()) == {}
