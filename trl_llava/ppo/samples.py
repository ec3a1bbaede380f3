"""Completions of the held-out prompts as a table, with images, captions and scores; saved, printed, tracked."""

import io
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerBase

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.data.thumbnails import thumbnail
from trl_llava.ppo.rollout import Rollout
from trl_llava.run.atomic_files import write_atomically

FOLDER = "completions"
"""Of a run's folder: one table for each time that samples were made."""


def last_question(messages: list[dict[str, Any]]) -> str:
    """The text of the last user turn."""
    content = [message["content"] for message in messages if message["role"] == "user"][-1]
    return (
        content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
    )


def sample_table(rollout: Rollout, texts: list[str], image_names: list[list[str]], step: int) -> pd.DataFrame:
    """One row per completion: `step`, `prompt`, `images`, `captions`, `completion`, `score`, `rewards/<term>`."""
    columns = rollout.columns
    captions = columns.get("captions") or [None] * len(texts)
    table = {
        "step": [step] * len(texts),
        "prompt": [last_question(prompt) for prompt in columns["prompts"]],
        "images": [
            [thumbnail(image, name) for image, name in zip(*row, strict=True)]
            for row in zip(columns["images"], image_names, strict=True)
        ],
        "captions": [list(own or []) for own in captions],
        "completion": texts,
        "score": rollout.scores.tolist(),
    }
    return pd.DataFrame(table | {f"rewards/{name}": values.tolist() for name, values in rollout.terms.items()})


def completions_table(
    batches: Iterable[dict[str, Any]],
    complete: Callable[[dict[str, Any]], Rollout],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    gather: Callable[[list[Any]], list[Any]],
    *,
    first_only: bool,
) -> pd.DataFrame | None:
    """Generate for batches of prompts, and put the completions of all processes into one `sample_table`.

    `gather` collects what each process has, without what a loader repeats so that they all have as many rows. `None`
    if there is no batch; `first_only` stops after one.
    """
    found: list[dict[str, Any]] = []
    for batch in batches:
        names = batch.pop("image_names")
        rollout = complete(batch)
        ids = [row[mask] for row, mask in zip(rollout.responses, rollout.mask, strict=True)]
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        found += gather(sample_table(rollout, texts, names, step).to_dict("records"))
        if first_only:
            break
    return pd.DataFrame(found) if found else None


def report_samples(table: pd.DataFrame, args: LlavaPPOConfig, step: int) -> None:
    """Print some sample completions, and give all to `output_dir/completions/` and to the trackers of the run."""
    numbers = table.drop(columns=["step", "images", "captions"])
    title = f"Sample completions after step {step}" if step else "Sample completions before training"
    shown = Table(*numbers.columns, title=title, show_lines=True)
    for row in numbers.head(5).round(3).astype(str).itertuples(index=False):
        shown.add_row(*map(escape, row))
    with tqdm.external_write_mode():  # above the progress bar, not through it
        Console().print(shown)
    folder = Path(args.output_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"completions_{step:05d}.parquet", table.to_parquet())
    for name, tracker in open_trackers(args.report_to).items():
        images = [[_tracked(tracker, image) for image in own] for own in table["images"]]
        if name == "trackio":  # its page shows a list of texts as JSON
            table = table.assign(captions=["\n".join(own) for own in table["captions"]])
        tracker.log({"completions": tracker.Table(dataframe=table.assign(images=images)), "train/global_step": step})


def open_trackers(report_to: list[str]) -> dict[str, Any]:
    """The modules of those trackers that take tables and have a run open."""
    found = {name: import_module(name) for name in ("wandb", "trackio") if name in report_to}
    return {
        name: module
        for name, module in found.items()
        if (module.run if name == "wandb" else module.context_vars.current_run.get()) is not None
    }


def _tracked(tracker: Any, image: dict[str, Any]) -> Any:
    return tracker.Image(Image.open(io.BytesIO(image["bytes"])), caption=image["path"])
