"""Tables of PPO's sample completions: what is in them, when they are written, and what the trackers get."""

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_trainers import even_tokens, make_adapter, ppo_trainer, weights
from transformers import TrainerCallback

from trl_llava.data.thumbnails import SIDE, image_name, thumbnail
from trl_llava.ppo_trainer import LlavaPPOTrainer


@pytest.fixture(scope="module")
def adapter_dir(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


def table(folder: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


def held_out(folder: Path) -> Dataset:
    """Four questions: with a wide image that has a file, with two, with none, with captions missing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(folder / name) for name in ("wide.png", "tall.jpg")]
    Image.new("RGB", (1024, 512), "red").save(names[0])
    Image.new("RGB", (30, 60), "blue").save(names[1])
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"What is in picture {i}?"}] for i in range(4)],
            "images": [names[:1], names, [], names[1:]],
            "captions": [["A red wall.", "Red."], ["Two."], ["Nothing."], None],
        }
    )


def sampled(base: Path, adapter: Path, folder: Path, **changes: Any) -> LlavaPPOTrainer:
    """Four steps, with samples after the second and the fourth."""
    given = {"total_episodes": 16, "num_sample_generations": 2, "per_device_eval_batch_size": 16, **changes}
    if "eval_dataset" not in given:
        given["eval_dataset"] = held_out(folder / "pictures")
    return ppo_trainer(base, adapter, folder, **given)


def test_a_table_holds_images_captions_and_each_reward_term(tiny_llava_dir, adapter_dir, tmp_path, capsys):
    trainer = sampled(tiny_llava_dir, adapter_dir, tmp_path, length_coef=-1.0)
    trainer.train()
    names = ["step", "prompt", "images", "captions", "completion", "score", "rewards/even_tokens", "rewards/length"]
    for step in (0, 2, 4):
        rows = table(tmp_path, step)
        assert list(rows.columns) == names
        assert rows["step"].tolist() == [step] * 4
        assert rows["prompt"].tolist() == [f"What is in picture {i}?" for i in range(4)]
        paths = [[image["path"] for image in images] for images in rows["images"]]
        assert paths == [["wide.png"], ["wide.png", "tall.jpg"], [], ["tall.jpg"]]
        sizes = [[Image.open(io.BytesIO(image["bytes"])).size for image in images] for images in rows["images"]]
        assert sizes == [[(256, 128)], [(256, 128), (30, 60)], [], [(30, 60)]]
        assert [list(own) for own in rows["captions"]] == [["A red wall.", "Red."], ["Two."], ["Nothing."], []]
        total = rows["rewards/even_tokens"] + rows["rewards/length"]
        assert rows["score"].tolist() == pytest.approx(total.tolist(), abs=1e-5)
        logged = [entry for entry in trainer.state.log_history if "eval_objective/scores" in entry]
        (entry,) = [entry for entry in logged if entry["step"] == step]
        assert entry["eval_objective/scores"] == pytest.approx(rows["score"].mean())
        assert entry["eval_objective/scores_std"] == pytest.approx(np.std(rows["score"]))
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        f"completions_0000{step}.parquet" for step in (0, 2, 4)
    ]
    shown = capsys.readouterr().out
    assert "Sample completions before training" in shown and "rewards/length" in shown and "bytes" not in shown


class WeightsBefore(TrainerCallback):
    """Keeps the policy as it is when the first table is logged."""

    trainer: LlavaPPOTrainer
    found: dict[str, torch.Tensor]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_objective/scores" in logs and state.global_step == 0:
            self.found = weights(self.trainer)


def test_the_first_table_is_of_the_start_and_changes_nothing(tiny_llava_dir, adapter_dir, tmp_path):
    before = WeightsBefore()
    settings = {"normalize_scores": "first_batch", "temperature": 1.0}
    plain = sampled(tiny_llava_dir, adapter_dir, tmp_path / "none", num_sample_generations=0, **settings)
    start = weights(plain)
    plain.train()
    trainer = sampled(tiny_llava_dir, adapter_dir, tmp_path / "sampled", callbacks=[before], **settings)
    before.trainer = trainer
    trainer.train()
    assert all(torch.equal(value, before.found[name]) for name, value in start.items())
    assert trainer.scorer.normalisers == plain.scorer.normalisers  # those of the first batch, not of the samples
    after = weights(trainer)
    assert all(torch.equal(value, after[name]) for name, value in weights(plain).items())
    assert not (tmp_path / "none" / "completions").exists()


def test_a_resumed_run_leaves_the_table_of_the_start_alone(tiny_llava_dir, adapter_dir, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1}
    sampled(tiny_llava_dir, adapter_dir, tmp_path, **saved).train()
    expected = table(tmp_path, 4)
    for step in (0, 4):
        (tmp_path / "completions" / f"completions_{step:05d}.parquet").unlink()
    sampled(tiny_llava_dir, adapter_dir, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    written = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert written == ["completions_00002.parquet", "completions_00004.parquet"]
    assert table(tmp_path, 4).equals(expected)


def test_the_name_of_an_image():
    named = Image.new("RGB", (2, 2))
    assert [image_name("a/b.png"), image_name(Path("a/c.png")), image_name(named), image_name(b"")] == [
        *("b.png", "c.png", "", ""),
    ]
    assert [image_name({"bytes": b"", "path": "x/d.jpg"}), image_name({"bytes": b"", "path": None})] == ["d.jpg", ""]
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", (1, 10 * SIDE)), "")["bytes"])).size == (1, SIDE)


# --- trackers ------------------------------------------------------------------------------------------------------


class FakeImage:
    """What both trackers take for an image: an array, a picture or the path of a file, with a caption."""

    def __init__(self, value: Any, caption: str | None = None) -> None:
        if not isinstance(value, (str, Path, np.ndarray, Image.Image)):
            raise ValueError(f"no image: {type(value)}")
        self.value, self.caption = value, caption


class FakeTable:
    """A table whose columns are each of one type, as W&B holds it."""

    def __init__(self, dataframe: pd.DataFrame) -> None:
        for name, column in dataframe.items():
            if len({type(value) for value in column}) > 1:
                raise TypeError(f"column {name} has mixed types")
        self.columns = list(dataframe.columns)
        self.rows = dataframe.to_dict(orient="records")


def fake(name: str) -> ModuleType:
    """A tracker that is not installed: it takes what the real one takes, and refuses what that refuses."""
    module: Any = ModuleType(name)
    module.Image, module.Table, module.logged, module.run = FakeImage, FakeTable, [], SimpleNamespace()
    module.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: module.run))

    def log(metrics: dict[str, Any]) -> None:
        if module.run is None:
            raise RuntimeError("no run is open")
        module.logged.append(metrics)

    module.log = log
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_images_with_their_names(
    tiny_llava_dir, adapter_dir, tmp_path, monkeypatch: pytest.MonkeyPatch, name: str
):
    tracker = fake(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = sampled(tiny_llava_dir, adapter_dir, tmp_path)
    trainer.args.report_to = [name]  # without its callback, which would open a run
    trainer.train()
    assert [entry["train/global_step"] for entry in tracker.logged] == [0, 2, 4]
    shown = tracker.logged[0]["completions"].rows
    assert [[image.caption for image in row["images"]] for row in shown] == [
        *(["wide.png"], ["wide.png", "tall.jpg"], [], ["tall.jpg"]),
    ]
    assert shown[0]["images"][0].value.size == (256, 128)
    assert shown[0]["captions"] in (["A red wall.", "Red."], "A red wall.\nRed.")
    tracker.run = None
    trainer.generate_completions()  # after the training, when the tracker's run has ended
    assert len(tracker.logged) == 3


def test_wandb_stores_the_images(tiny_llava_dir, adapter_dir, tmp_path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    import wandb

    sampled(tiny_llava_dir, adapter_dir, tmp_path / "run", report_to=["wandb"]).train()
    wandb.finish()
    files = list(tmp_path.rglob("*.table.json"))
    assert len(files) == 3 and all("wide.png" not in file.read_text() for file in files)
    staged = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {Image.open(path).size for path in staged if path.read_bytes()[:4] == b"\x89PNG"} == {(256, 128), (30, 60)}


def test_trackio_stores_the_images(tiny_llava_dir, adapter_dir, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    sampled(tiny_llava_dir, adapter_dir, tmp_path / "run", report_to=["trackio"]).train()
    pictures = list((tmp_path / "trackio" / "media").rglob("*.png"))
    assert {Image.open(path).size for path in pictures} == {(256, 128), (30, 60)}
    assert len(pictures) == 12


def test_the_reward_sees_no_names(tiny_llava_dir, adapter_dir, tmp_path):
    seen: list[set[str]] = []

    def even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        seen.append(set(columns))
        return even_tokens(completion_ids)

    sampled(tiny_llava_dir, adapter_dir, tmp_path, reward_funcs=even, total_episodes=4).train()
    assert len(seen) == 2 + 1 and len(set(map(frozenset, seen))) == 1
