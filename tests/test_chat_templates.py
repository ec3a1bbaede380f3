"""A recipe's chat template: where it comes from, that it is saved, and that later stages read it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
from transformers import AutoProcessor

from trl_llava import train_ppo, train_sft
from trl_llava.models.chat_templates import set_chat_template
from trl_llava.models.load import load_processor
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE

# As llava-hf's LLaVA-1.5 has it: nothing ends a completion, so that SFT has nothing to teach stopping with.
NO_STOP = VICUNA_V1_CHAT_TEMPLATE.replace(" + eos_token", " + ' '")
QUICK = ["--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
QUICK += ["--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def base(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose saved template writes no stop token."""
    folder = shutil.copytree(tiny_llava_dir, tmp_path_factory.mktemp("no_stop") / "base")
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = NO_STOP
    processor.save_pretrained(folder)
    return folder


def test_the_three_sources(base: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("own {{ eos_token }}")
    expected = {
        "vicuna_v1": VICUNA_V1_CHAT_TEMPLATE,
        str(tmp_path / "own.jinja"): "own {{ eos_token }}",
        str(tiny_llava_dir): VICUNA_V1_CHAT_TEMPLATE,
    }
    for source, template in expected.items():
        processor = load_processor(str(base), chat_template_path=source)
        processor.save_pretrained(tmp_path / "saved")
        assert AutoProcessor.from_pretrained(tmp_path / "saved").chat_template == template
    assert load_processor(str(base)).chat_template == NO_STOP


def test_what_is_no_chat_template(base: Path, tiny_llava_dir: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    with pytest.raises(OSError, match=r"`chat_template_path`: there is no file no.jinja"):
        set_chat_template(processor, "no.jinja")
    with pytest.raises(OSError, match=r"cannot load 'vicuna_v2'; expected `vicuna_v1`, a .jinja file, or a model"):
        set_chat_template(processor, "vicuna_v2")
    bare = shutil.copytree(tiny_models.tiny_llama(tmp_path / "llama"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"the model '.*bare' has no chat template"):
        set_chat_template(processor, str(bare))


def test_sft_sets_it_and_ppo_finds_it(base: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "what is it?"}]
    rows = [{"prompt": question, "completion": [{"role": "assistant", "content": "a square"}]}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*QUICK, "--dataset_name", str(tmp_path / "rows.json"), "--max_steps", "1", "--use_peft", "--lora_r", "2"]
    words += ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "policy")]
    with pytest.raises(ValueError, match=r"never learn to stop.*`chat_template_path: vicuna_v1` in a recipe"):
        train_sft.main(words)
    train_sft.main([*words, "--chat_template_path", "vicuna_v1"])
    assert AutoProcessor.from_pretrained(tmp_path / "policy").chat_template == VICUNA_V1_CHAT_TEMPLATE

    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": question}] * 4))
    words = [*QUICK, "--dataset_name", str(tmp_path / "prompts.json"), "--sft_model_path", str(tmp_path / "policy")]
    words += ["--value_init", "policy", "--total_episodes", "2", "--response_length", "4", "--length_coef", "-1"]
    words += ["--num_sample_generations", "0", "--num_ppo_epochs", "1"]
    trainer = train_ppo.main([*words, "--output_dir", str(tmp_path / "ppo")])
    assert trainer.processing_class.chat_template == VICUNA_V1_CHAT_TEMPLATE  # the policy's, not its base's
    trainer = train_ppo.main([*words, "--output_dir", str(tmp_path / "ppo_set"), "--chat_template_path", str(base)])
    assert trainer.processing_class.chat_template == NO_STOP
