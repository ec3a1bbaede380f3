"""The checkpoints of the paper and of LLaVA's code as models, adapters and rewards that `from_pretrained` loads.

    trl-llava convert SRC DST                        a model (`sft_model`, later LLaVA-1.5 releases)
    trl-llava convert SRC DST --base ORG/CONVERTED   an adapter of it: RL-init, reward model, PPO checkpoint

SRC is a folder or a Hub ID, DST a new folder. DST appears when all of it is written, and files are read piece by
piece, so a 13B model needs about 2 GB of memory.
"""

import json
from pathlib import Path

from trl_llava.errors import InputError
from trl_llava.hub.names import split_revision
from trl_llava.models.load import load_processor
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.reward_settings import RewardSettings, write_settings
from trl_llava.run.atomic_files import whole_folder
from trl_llava.tools.convert.adapter import check_no_other_weights, convert_adapter
from trl_llava.tools.convert.layouts import Kind, Layout, detect, find_source
from trl_llava.tools.convert.model import convert_model

VALUE_FOLDER = "value_model"
"""Where `LlavaPPOTrainer` saves the value model inside a run's folder; a converted PPO checkpoint has it there too."""


def convert(
    source: str,
    target: str | Path,
    *,
    base: str | None = None,
    base_folder: str | None = None,
    base_revision: str | None = None,
    value_base: str | None = None,
    vision_tower: str | None = None,
    with_captions: bool = True,
    revision: str | None = None,
) -> tuple[Kind, list[str]]:
    """Convert a checkpoint.

    Args:
        source: Folder or Hub ID in one of the original layouts.
        target: The new folder.
        base: For adapters: Hub ID (or folder) of the converted model that they belong to; adapter_config.json carries
            it.
        base_folder: Where that model is now, if it is not on the Hub yet under the name `base`.
        base_revision: Branch, tag or commit of `base`.
        value_base: For PPO checkpoints: the model of the value adapter, if it is another than the policy's (in the
            paper 13B for a 7B policy); always looked up by this name.
        vision_tower: For models: Hub ID or folder of the CLIP model, if not where config.json says.
        with_captions: For reward models: whether it was trained on judging prompts with captions.
        revision: Branch, tag or commit of `source` on the Hub.

    Returns:
        What it was, and notes for the user.

    Raises:
        ValueError: If the source cannot be converted, or an adapter comes without `base`.
    """
    layout = detect(find_source(source, revision))
    if base is not None:
        base, base_revision = split_revision("--base", base, base_revision)
    if layout.kind == "model":
        with whole_folder(target) as output:
            notes = convert_model(layout.folder, output, vision_tower=vision_tower)
            _write_card(output, layout.kind, source, notes, base=None)
        return layout.kind, notes
    if layout.adapter is None or base is None:
        raise InputError(
            f"{source} is a {layout.kind}, whose own record of its base is a path of the authors' machine. Name the "
            "base with --base: the Hub ID (or folder) of the converted model that it was trained on"
        )
    base, value_base = _lasting(base), _lasting(value_base or base)
    base_source = base_folder or base
    processor = load_processor(base_source, revision=None if base_folder else base_revision)
    check_no_other_weights(layout.folder)
    with whole_folder(target) as output:
        notes = _convert_adapters(layout, layout.adapter, output, base, base_source, base_revision, value_base)
        if layout.kind == "reward model":
            write_settings(output, RewardSettings(JudgingPrompt(with_captions=with_captions), base_revision))
            captions = "with" if with_captions else "without"
            notes.append(f"It is read with the paper's judging prompt, {captions} captions.")
        processor.save_pretrained(output)
        _write_card(output, layout.kind, source, notes, base=base)
    return layout.kind, notes


def _convert_adapters(
    layout: Layout,
    adapter: Path,
    output: Path,
    base: str,
    base_source: str,
    base_revision: str | None,
    value_base: str,
) -> list[str]:
    """Write the policy's or the reward model's adapter, and beside a policy's the value model's where there is one."""
    head = layout.head if layout.kind == "reward model" else None
    convert_adapter(adapter, output, base=base, base_source=base_source, base_revision=base_revision, head=head)
    if layout.value_adapter is None:
        return []
    same = value_base == base
    convert_adapter(
        layout.value_adapter,
        output / VALUE_FOLDER,
        base=value_base,
        base_source=base_source if same else value_base,
        base_revision=base_revision if same else None,
        head=layout.head,
    )
    return [f"The value model's adapter and head are in {VALUE_FOLDER}/."]


def _lasting(base: str) -> str:
    """A folder's name that also holds in another working directory; a Hub ID as it is."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def _write_card(output: Path, kind: Kind, source: str, notes: list[str], base: str | None) -> None:
    """A model card, so that what was converted from where travels with the files."""
    name = source if not Path(source).exists() else Path(source).name
    header = ["library_name: " + ("transformers" if base is None else "peft")]
    if base is not None:
        header.append(f"base_model: {json.dumps(base)}")
    lines = ["---", *header, "---", "", f"# {name}, converted", ""]
    lines += [f"A {kind} in the original layout of LLaVA(-RLHF), converted by `trl-llava convert`.", ""]
    lines += [f"- {note}" for note in notes]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
