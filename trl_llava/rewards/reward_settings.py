"""factual_reward.json: the prompt that a reward model was trained with, kept beside its weights.

Read with another prompt, the paper's reward model is right in 52 % of the pairs instead of 63-67 %.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from trl_llava.errors import InputError
from trl_llava.hub.lookup import find_file
from trl_llava.models.load import VALUE_HEAD_FILE
from trl_llava.prompts import JudgingPrompt

SETTINGS_FILE = "factual_reward.json"
FORMAT_VERSION = 1


class RewardSettings(NamedTuple):
    """What a reward model must be read with.

    Args:
        judging_prompt: The turn behind the completion; None if it judges where the completion ends.
        base_model_revision: Commit of an adapter's base model; None for a folder or a whole model.
    """

    judging_prompt: JudgingPrompt | None
    base_model_revision: str | None


def save_settings(
    folder: str | Path, judging_prompt: JudgingPrompt | None, model: PreTrainedModel | PeftModel
) -> None:
    """Write factual_reward.json beside a model; an adapter's base is pinned to the commit it was loaded at."""
    pinned = getattr(model.get_base_model().config, "_commit_hash", None) if isinstance(model, PeftModel) else None
    write_settings(folder, RewardSettings(judging_prompt, pinned))


def write_settings(folder: str | Path, values: RewardSettings) -> None:
    """Write factual_reward.json for a model that is not loaded."""
    settings = {
        "format_version": FORMAT_VERSION,
        "judging_prompt": None if values.judging_prompt is None else values.judging_prompt.to_dict(),
        "base_model_revision": values.base_model_revision,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (Path(folder) / SETTINGS_FILE).write_text(text, encoding="utf-8")


def read_settings(name: str, given: JudgingPrompt | None = None, *, revision: str | None = None) -> RewardSettings:
    """Read factual_reward.json of a checkpoint (Hub ID or folder).

    `given` is the prompt that a checkpoint without the file was trained with. There must be one of the two, and if
    there are both they must agree. A model with a value head in TRL's file, as Skywork-VL-Reward is, reads none.
    """
    path = find_file(name, SETTINGS_FILE, revision)
    if path is None and given is None and find_file(name, VALUE_HEAD_FILE, revision) is not None:
        return RewardSettings(None, None)
    if path is None:
        if given is None:
            raise InputError(
                f"'{name}' has no {SETTINGS_FILE}, which `trl-llava reward` and `trl-llava convert` write: the prompt "
                "that it was trained with is not known, and with another one its scores are near chance. Name a "
                "factual reward model; for one without the file, pass judging_prompt=JudgingPrompt(...) in Python "
                "(the paper's is the default, with_captions=False its plain variant); save_pretrained then keeps it"
            )
        return RewardSettings(given, None)
    settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if settings.get("format_version") != FORMAT_VERSION or "judging_prompt" not in settings:
        raise InputError(
            f"{SETTINGS_FILE} of '{name}' has format_version {settings.get('format_version')!r}, expected "
            f"{FORMAT_VERSION} and a judging_prompt; it was written by another version of trl_llava"
        )
    stored = settings["judging_prompt"]
    prompt = None if stored is None else JudgingPrompt.from_dict(stored)
    if given is not None and given != prompt:
        raise InputError(
            f"judging_prompt differs from the one that '{name}' was trained with ({SETTINGS_FILE}). Leave it out; to "
            "measure what another prompt does, set the attribute judging_prompt after loading"
        )
    return RewardSettings(prompt, settings.get("base_model_revision"))


def shows_captions(name: str | None, revision: str | None) -> bool | None:
    """Whether a reward model reads captions, found out without loading it.

    None if the model is not there, or does not say; False without a reward model.
    """
    if name is None:
        return False
    if not any(find_file(name, file, revision) for file in (SETTINGS_FILE, VALUE_HEAD_FILE)):
        return None
    prompt = read_settings(name, revision=revision).judging_prompt
    return prompt is not None and prompt.with_captions
