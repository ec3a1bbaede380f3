"""The default tests see no GPU, those of the marker `gpu` the first one."""

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
    for seen, first in ((None, "0"), ("2,3", "2")):
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert hidden(words.split()) == {"CUDA_VISIBLE_DEVICES": first if sees else ""}
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")  # has what its controller sees
    assert hidden(words.split()) == {}
