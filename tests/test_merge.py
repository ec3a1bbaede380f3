"""Merging an adapter: the sum answers as base and adapter did, or it is not kept."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from trl_llava import cli
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import load_adapter, lora_config
from trl_llava.models.load import load_policy, load_sequence_classifier
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.convert import merge as merge_module
from trl_llava.tools.convert.merge import merge


def adapter(base: Path, folder: Path, task: str = "CAUSAL_LM", dtype: str = "float32") -> Path:
    """A LoRA adapter with weights that matter."""
    args = LlavaModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=4, dtype=dtype)
    model = load_policy(args) if task == "CAUSAL_LM" else load_sequence_classifier(str(base), args)
    model = get_peft_model(model, lora_config(args, model, task=task))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    if task == "SEQ_CLS":
        FactualReward(model, AutoProcessor.from_pretrained(base), JudgingPrompt()).save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    return folder


def test_policy(tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tiny_llava_dir, tmp_path / "adapter")
    assert cli.main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    base = load_policy(LlavaModelConfig(model_name_or_path=str(tiny_llava_dir)))
    apart = load_adapter(base, str(folder), is_trainable=False).eval()
    ids = torch.arange(10, 60).reshape(2, 25)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, apart(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_reward_model_keeps_head_and_prompt(tiny_llava_dir: Path, tmp_path: Path, red_image) -> None:
    folder = adapter(tiny_llava_dir, tmp_path / "adapter", "SEQ_CLS")
    check = merge(str(folder), tmp_path / "merged")
    assert check.adapter_effect > 100 * check.largest_difference
    scores = []
    for name in ("adapter", "merged"):
        reward = FactualReward.from_pretrained(str(tmp_path / name))
        scores += reward(["What is it?"], ["A red square."], images=[[red_image]], captions=[["A square."]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_the_bases_dtype_is_kept(tiny_llava_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.bfloat16).save_pretrained(base)
    AutoProcessor.from_pretrained(tiny_llava_dir).save_pretrained(base)
    check = merge(str(adapter(base, tmp_path / "adapter", dtype="bfloat16")), tmp_path / "merged")
    assert check.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_sum_that_answers_otherwise_is_not_kept(
    tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tiny_llava_dir, tmp_path / "adapter")
    exact = merge_module._logits
    calls = iter([0.0, 0.0, 0.1])  # with the adapter, without it, merged
    monkeypatch.setattr(merge_module, "_logits", lambda *args: exact(*args) + next(calls))
    with pytest.raises(ValueError, match=r"differ by up to 0\.1 .*; nothing was kept"):
        merge(str(folder), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    monkeypatch.undo()
    merge(str(folder), tmp_path / "merged")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge(str(folder), tmp_path / "merged")


def test_never_into_4_bit_without_being_told(tiny_llava_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    args = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir), load_in_4bit=True, dtype="bfloat16")
    load_policy(args).save_pretrained(base)
    AutoProcessor.from_pretrained(tiny_llava_dir).save_pretrained(base)
    folder = adapter(tiny_llava_dir, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is stored quantised.* or allow it with --quantized"):
        merge(str(folder), tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()
    merge(str(folder), tmp_path / "merged", base=str(base), quantized=True)
    assert AutoConfig.from_pretrained(tmp_path / "merged").quantization_config["load_in_4bit"]
    load_policy(LlavaModelConfig(model_name_or_path=str(tmp_path / "merged"), dtype="auto"))  # all weights found
    merge(str(folder), tmp_path / "dense")  # the dense base that the adapter names
    assert getattr(AutoConfig.from_pretrained(tmp_path / "dense"), "quantization_config", None) is None


def test_a_whole_model_is_no_adapter(tiny_llava_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config\.json"):
        merge(str(tiny_llava_dir), tmp_path / "merged")


def test_an_adapter_without_a_base_is_named(tiny_llava_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_llava_dir, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{tiny_llava_dir}"', "null"))
    with pytest.raises(ValueError, match=r"does not name its base model\. Name it with --base"):
        merge(str(folder), tmp_path / "merged")
    merge(str(folder), tmp_path / "merged", base=str(tiny_llava_dir))
