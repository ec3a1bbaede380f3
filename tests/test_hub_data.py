"""Data sets from the Hub: by revision, and from the cache when the Hub is out of reach."""

import io
from pathlib import Path

import datasets
import hub_server
import pandas as pd
import pytest
from huggingface_hub import constants

from trl_llava.data.sources import read_source
from trl_llava.errors import InputError, NotFoundError


def parquet(answer: str) -> bytes:
    file = io.BytesIO()
    pd.DataFrame({"prompt": ["a", "b"], "completion": [answer, answer]}).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def rows(hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub_server.Hub:
    """A data set whose revision v1 says "one" and whose newest says "two"."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    repo = hub.add("org/rows", {"data/train-00000.parquet": parquet("one")}, kind="datasets")
    repo.tags["v1"] = repo.branches["main"]
    repo.commit({"data/train-00000.parquet": parquet("two")}, title="newer")
    return hub


def answer(name: str, revision: str | None = None) -> str:
    return read_source(name, revision=revision).dataset[0]["completion"]


def test_by_revision(rows: hub_server.Hub) -> None:
    assert (answer("org/rows@v1"), answer("org/rows"), answer("org/rows", "v1")) == ("one", "two", "one")
    with pytest.raises(InputError, match="the data set: 'org/rows@v1' names the revision 'v1', and its revision fi"):
        answer("org/rows@v1", "main")
    with pytest.raises(NotFoundError, match=r"The data set org/rows cannot be loaded .* revision v2.*404"):
        answer("org/rows@v2")


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_from_the_cache(rows: hub_server.Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    assert (answer("org/rows@v1"), answer("org/rows")) == ("one", "two")
    asked = len(rows.requests)
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    else:
        rows.fail("GET", "/api/datasets/", times=10)
        rows.fail("HEAD", "", times=10)
    assert (answer("org/rows@v1"), answer("org/rows@main"), answer("org/rows@v1")) == ("one", "two", "one")
    with pytest.raises(NotFoundError, match="and its revision 'v2' is not in the cache"):
        answer("org/rows@v2")
    with pytest.raises(NotFoundError, match=r"The data set org/gone cannot be loaded .*in the cache"):
        answer("org/gone")
    assert len(rows.requests) - asked == {"offline": 0, "unreachable": 5}[how] and not rows.waits


@pytest.mark.parametrize(
    "where", ["data_dir: b", "data_files: b/train*", "data_files: [{split: train, path: b/train*}]"]
)
def test_one_configuration_of_two_from_the_cache(rows: hub_server.Hub, where: str) -> None:
    """What of the data set was not downloaded is not missed, and another split is not taken for this one."""
    card = f"---\nconfigs:\n- config_name: a\n  data_files: a/*\n- config_name: b\n  {where}\n  default: true\n---\n"
    files = {f"{part}.parquet": parquet(part) for part in ("a/train", "b/train", "b/test")}
    rows.add("org/two", {"README.md": card.encode(), **files}, kind="datasets")
    for _ in range(2):
        for name in (None, "b"):
            assert read_source("org/two", name=name).dataset["completion"] == ["b/train"] * 2
        rows.fail("GET", "/api/datasets/", times=10)
        rows.fail("HEAD", "", times=10)
