"""The factual reward: what it reads, what it saves, what it refuses, and TRL's trainers that take it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.contract import RowError
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.data.prompt_groups import same_prompts
from trl_llava.models.adapters import lora_config
from trl_llava.models.base_model import base_of
from trl_llava.models.load import load_processor, load_sequence_classifier
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards import factual_reward
from trl_llava.rewards.factual_reward import FactualReward

PLAIN = JudgingPrompt(with_captions=False)


def args_for(folder: Path, **fields: Any) -> LlavaModelConfig:
    return LlavaModelConfig(model_name_or_path=str(folder), use_peft=True, lora_r=4, **fields)


def classifier(folder: Path) -> PreTrainedModel:
    return load_sequence_classifier(str(folder), args_for(folder), seed=1)


@pytest.fixture
def reward(tiny_llava_dir: Path) -> FactualReward:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    return FactualReward(classifier(tiny_llava_dir), processor, JudgingPrompt(), batch_size=2)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def columns_of(red: Image.Image, blue: Image.Image) -> dict[str, list]:
    return {
        "prompts": [ask("What is it?"), ask("Is there a circle?"), ask("Say hi.")],
        "completions": [say("A red square."), say("No."), say("Hi.")],
        "images": [[red], [blue], []],
        "captions": [["A red square.", "It is big.", "On white."], ["Blue all over."], ["Nothing to see."]],
    }


def test_scores_keep_the_order_and_do_not_depend_on_the_batch(reward: FactualReward, red_image, blue_image) -> None:
    columns = columns_of(red_image, blue_image)
    scores = reward(**columns)
    assert len(scores) == 3
    assert all(isinstance(score, float) for score in scores)
    assert len({round(score, 4) for score in scores}) == 3
    for i in range(3):
        alone = reward(**{name: values[i : i + 1] for name, values in columns.items()})
        assert alone == pytest.approx([scores[i]], abs=2e-6)
    backwards = reward(**{name: values[::-1] for name, values in columns.items()})
    assert backwards[::-1] == pytest.approx(scores, abs=2e-6)
    assert reward([], []) == []


def test_scoring_keeps_no_graph_keys_or_values(reward: FactualReward, red_image) -> None:
    outputs, modes = [], []
    model = reward.model.get_base_model() if isinstance(reward.model, PeftModel) else reward.model

    def look(module: torch.nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)
        modes.append(torch.is_inference_mode_enabled())

    handle = model.model.register_forward_hook(look)
    question, answer = [{"role": "user", "content": "What?"}], [{"role": "assistant", "content": "A square."}]
    reward([question], [answer], images=[[red_image]], captions=[["A red square."]])
    handle.remove()
    caches = [output.get("cache", output.get("past_key_values")) for output in outputs]
    assert caches == [None] and modes == [True]


def test_score_is_the_logit_of_the_preference_collators_batch(reward: FactualReward, red_image) -> None:
    row = {
        "row_name": "a[0]",
        "images": [red_image],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A red square."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A blue one, I think."}]}],
        "captions": ["Red.", "Square.", "Big."],
    }
    batch = PreferenceCollator(reward.processing_class, judging_prompt=reward.judging_prompt)([row])
    with torch.inference_mode():
        expected = reward.model.eval()(**batch).logits.squeeze(1).tolist()
    found = reward(
        [row["prompt"]] * 2, [row["chosen"], row["rejected"]], images=[[red_image]] * 2, captions=[row["captions"]] * 2
    )
    assert found == pytest.approx(expected, abs=2e-6)


def test_images_come_decoded_as_paths_as_bytes_as_pixels_or_inside_the_prompt(
    reward: FactualReward, red_image: Image.Image, tmp_path: Path
) -> None:
    red_image.save(tmp_path / "red.png")
    buffer = io.BytesIO()
    red_image.save(buffer, format="PNG")
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "captions": [["A red square."]]}
    expected = reward(**call, images=[[red_image]])
    assert reward(**call, images=[[str(tmp_path / "red.png")]]) == expected
    assert reward(**call, images=[[tmp_path / "red.png"]]) == expected
    assert reward(**call, images=[[{"bytes": buffer.getvalue(), "path": None}]]) == expected
    assert reward(**call, images=[[buffer.getvalue()]]) == expected
    pixels = np.asarray(red_image)  # (H, W, 3)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    for array in (pixels, tensor, tensor / 255, (tensor / 255).to(torch.bfloat16), pixels / 255):
        assert reward(**call, images=[[array]]) == reward(**call, images=array[None]) == expected
    assert reward(**call, images=[red_image]) == expected
    assert reward(**call, image=[red_image]) == expected
    inside = [{"role": "user", "content": [{"type": "image", "image": red_image}, {"type": "text", "text": "What?"}]}]
    assert reward(**{**call, "prompts": [inside]}) == expected
    inside[0]["content"][0]["image"] = tensor
    assert reward(**{**call, "prompts": [inside]}) == expected
    assert reward(**{**call, "prompts": [inside]}, images=[[red_image]]) == expected
    assert reward(**{**call, "prompts": ["What?"], "completions": ["A square."]}, images=[[red_image]]) == expected
    assert reward(**call) != expected  # the picture counts


def test_answer_captions_and_picture_count_and_the_captions_order_does_not(
    reward: FactualReward, red_image, blue_image
) -> None:
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "images": [[red_image]]}
    facts = ["A red square.", "It is big.", "On white."]
    expected = reward(**call, captions=[facts])
    assert reward(**call, captions=[facts[::-1]]) == expected
    assert facts == ["A red square.", "It is big.", "On white."]
    assert reward(**call, captions=[["A blue circle."]]) != expected
    assert reward(**{**call, "completions": [say("A circle.")]}, captions=[facts]) != expected
    assert reward(**{**call, "images": [[blue_image]]}, captions=[facts]) != expected


@pytest.mark.parametrize("captions", [None, [None], [[]]])
def test_missing_captions_name_the_row(captions: Any, reward: FactualReward, red_image) -> None:
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "images": [[red_image]]}
    with pytest.raises(RowError, match=r"train.json\[17\]: it has no captions"):
        reward(**call, captions=captions, row_name=["train.json[17]"])
    reward.judging_prompt = PLAIN
    assert len(reward(**call, captions=captions)) == 1


def test_unreadable_image_names_the_row(reward: FactualReward, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"row 0: the image file .*nowhere.png does not exist"):
        reward([ask("What?")], [say("A.")], images=[[str(tmp_path / "nowhere.png")]], captions=[["a"]])


def test_columns_of_different_length_are_an_error(reward: FactualReward) -> None:
    with pytest.raises(ValueError, match="zip"):
        reward([ask("What?")], [say("A."), say("B.")], captions=[["a"], ["b"]])


def test_scoring_leaves_the_models_mode_and_gradients_alone(tiny_llava_dir: Path) -> None:
    reward = with_adapter(tiny_llava_dir, lora_dropout=0.5)
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "captions": [["a"]]}
    reward.model.train()
    assert reward(**call) == reward(**call)
    assert reward.model.training
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    reward.model.eval()
    reward(**call)
    assert not reward.model.training


def test_text_only_reward_model(tiny_llama_dir: Path) -> None:
    model = load_sequence_classifier(str(tiny_llama_dir), args_for(tiny_llama_dir))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    reward = FactualReward(model, tokenizer, PLAIN, name="plain_reward")
    scores = reward([ask("What?")] * 2, [say("A square."), say("A circle, and more.")])
    assert reward(["What?"], ["A square."]) == pytest.approx(scores[:1], abs=2e-6)
    assert reward.__name__ == "plain_reward"


def test_name_in_trls_logs(reward: FactualReward) -> None:
    assert reward.__name__ == "factual_reward"


# ------------------------------------------------------------------------------------------------ saved and loaded


def with_adapter(folder: Path, lora_dropout: float = 0.0) -> FactualReward:
    base = classifier(folder)
    model = get_peft_model(base, lora_config(args_for(folder, lora_dropout=lora_dropout), base, task="SEQ_CLS"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    prompt = JudgingPrompt(instruction="Rate it. {factual_prompt}", answer_prefix="Score:", seed=5)
    return FactualReward(model, load_processor(str(folder)), prompt)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_round_trip_is_bit_equal(kind: str, tiny_llava_dir, red_image, blue_image, tmp_path: Path) -> None:
    trained = with_adapter(tiny_llava_dir)
    if kind == "whole":
        trained.model = trained.model.merge_and_unload()
    trained.processing_class.image_processor.do_pad = True
    trained.save_pretrained(tmp_path)
    loaded = FactualReward.from_pretrained(tmp_path, batch_size=3)
    assert loaded.judging_prompt == trained.judging_prompt
    assert loaded.processing_class.image_processor.do_pad
    assert loaded.processing_class.chat_template == trained.processing_class.chat_template
    columns = columns_of(red_image, blue_image)
    for key, value in trained.model.state_dict().items():
        if "original_module" not in key:  # the base's own head, which the adapter's stands in for
            assert torch.equal(loaded.model.state_dict()[key], value), key
    # A matrix that came out of a file may lie unaligned, where the CPU adds in another order.
    assert loaded(**columns) == (
        trained(**columns) if kind == "adapter" else pytest.approx(trained(**columns), abs=1e-6)
    )
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {"factual_reward.json", "processor_config.json"} <= {path.name for path in tmp_path.iterdir()}
    weights = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    assert (tmp_path / weights).is_file()


def test_checkpoint_without_its_prompt_is_refused_unless_told(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = with_adapter(tiny_llava_dir)
    trained.save_pretrained(tmp_path)
    (tmp_path / "factual_reward.json").unlink()
    with pytest.raises(ValueError, match=r"has no factual_reward.json.*pass judging_prompt=JudgingPrompt"):
        FactualReward.from_pretrained(str(tmp_path))
    loaded = FactualReward.from_pretrained(str(tmp_path), judging_prompt=trained.judging_prompt)
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "captions": [["a"]]}
    assert loaded(**call) == trained(**call)


def test_it_computes_in_the_dtype_of_its_checkpoint_unless_another_is_named(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    FactualReward(classifier(tiny_llava_dir).bfloat16(), processor, PLAIN).save_pretrained(tmp_path)
    assert FactualReward.from_pretrained(str(tmp_path)).model.dtype == torch.bfloat16
    assert FactualReward.from_pretrained(str(tmp_path), dtype="float32").model.dtype == torch.float32


def test_it_computes_on_the_processes_device_unless_another_is_named(
    tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    FactualReward(classifier(tiny_llava_dir), processor, PLAIN).save_pretrained(tmp_path)
    monkeypatch.setattr(PartialState(), "device", torch.device("meta"))  # plays a GPU
    assert FactualReward.from_pretrained(str(tmp_path)).model.device.type == "meta"
    assert FactualReward.from_pretrained(str(tmp_path), device="cpu").model.device.type == "cpu"


def test_another_prompt_than_the_stored_one_is_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = with_adapter(tiny_llava_dir)
    trained.save_pretrained(tmp_path)
    assert FactualReward.from_pretrained(str(tmp_path), judging_prompt=trained.judging_prompt)
    with pytest.raises(ValueError, match="judging_prompt differs"):
        FactualReward.from_pretrained(str(tmp_path), judging_prompt=PLAIN)


def test_settings_of_another_version_are_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    with_adapter(tiny_llava_dir).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "factual_reward.json").read_text())
    assert settings["format_version"] == 1
    (tmp_path / "factual_reward.json").write_text(json.dumps({**settings, "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2, expected 1"):
        FactualReward.from_pretrained(str(tmp_path))


def test_no_judging_turn_is_stored_too(tiny_llava_dir: Path, tmp_path: Path) -> None:
    bare = with_adapter(tiny_llava_dir)
    bare.judging_prompt = None
    bare.save_pretrained(tmp_path)
    loaded = FactualReward.from_pretrained(str(tmp_path))
    assert loaded.judging_prompt is None
    assert loaded([ask("What?")], [say("A.")]) == bare([ask("What?")], [say("A.")])


def test_model_without_head_is_refused(tiny_llava_dir: Path, tiny_policy: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no score head"):
        FactualReward.from_pretrained(str(tiny_llava_dir), judging_prompt=PLAIN)
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration gives no single score"):
        FactualReward(tiny_policy, processor, PLAIN)
    policy_adapter = get_peft_model(tiny_policy, lora_config(args_for(tiny_llava_dir), tiny_policy, task="CAUSAL_LM"))
    policy_adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no score head"):
        FactualReward.from_pretrained(str(tmp_path), judging_prompt=PLAIN)


def test_checkpoint_without_processor_is_refused(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = with_adapter(tiny_llava_dir)
    trained.save_pretrained(tmp_path)
    for file in tmp_path.glob("*processor*"):
        file.unlink()
    for file in tmp_path.glob("token*"):
        file.unlink()
    with pytest.raises(OSError, match=r"^reward model \(its processor\): cannot load"):
        FactualReward.from_pretrained(str(tmp_path))


def test_processor_of_another_model_is_refused(tiny_llava_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    processor.image_token_id = 17
    with pytest.raises(ValueError, match=r"do not fit together: .* have image_token_id \(4, 17\)"):
        FactualReward(classifier(tiny_llava_dir), processor, PLAIN)
    wider = AutoProcessor.from_pretrained(tiny_llava_dir)
    wider.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"vocabulary size \(600, 601\)"):
        FactualReward(classifier(tiny_llava_dir), wider, PLAIN)


def test_reward_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(OSError, match="reward model: cannot load 'nobody/no-such-reward'"):
        FactualReward.from_pretrained("nobody/no-such-reward")


def test_base_is_pinned_to_the_commit_it_was_loaded_at(
    tiny_llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = with_adapter(tiny_llava_dir)
    trained.model.get_base_model().config._commit_hash = "0123abc"  # what a model from the Hub has
    trained.save_pretrained(tmp_path)
    asked: list[str | None] = []

    def load(name: str, model_args: LlavaModelConfig, *, revision: str | None) -> PreTrainedModel:
        asked.append(revision)
        return load_sequence_classifier(name, model_args)

    monkeypatch.setattr(factual_reward, "load_sequence_classifier", load)
    FactualReward.from_pretrained(str(tmp_path))
    FactualReward.from_pretrained(str(tmp_path), base_model=str(tiny_llava_dir))
    assert asked == ["0123abc", None]


def test_moved_base_is_named_and_can_be_given(tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = with_adapter(tiny_llava_dir)
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(OSError, match=r"cannot load '/gone/base'"):
        FactualReward.from_pretrained(str(tmp_path))
    loaded = FactualReward.from_pretrained(str(tmp_path), base_model=str(tiny_llava_dir))
    call = {"prompts": [ask("What?")], "completions": [say("A square.")], "captions": [["a"]]}
    assert loaded(**call) == trained(**call)


# ---------------------------------------------------------------------------------------------- TRL's own trainers


def with_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    arrays = [[np.asarray(image) for image in images] for images in batch["images"]]
    return {**batch, "images": [[torch.tensor(array).permute(2, 0, 1) for array in row] for row in arrays]}


@pytest.mark.parametrize(
    ("algorithm", "kind"), [("grpo", "decoded"), ("grpo", "paths"), ("grpo", "tensors"), ("rloo", "decoded")]
)
def test_it_is_a_reward_function_for_trls_trainers(
    algorithm: str, kind: str, reward: FactualReward, tiny_llava_dir: Path, red_image, blue_image, tmp_path: Path
) -> None:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    rows = Dataset.from_dict(
        {
            "prompt": [ask("What is it?"), ask("Is there a circle?")],
            "images": [[red_image], [blue_image]],
            "captions": [["A red square.", "It is big."], ["Blue all over."]],
        }
    )
    if kind == "paths":
        for name, image in (("red.png", red_image), ("blue.png", blue_image)):
            image.save(tmp_path / name)
        paths = [[str(tmp_path / name)] for name in ("red.png", "blue.png")]
        rows = rows.remove_columns("images").add_column("images", paths)
    if kind == "tensors":
        rows = rows.with_transform(with_tensors)
        assert isinstance(rows[0]["images"][0], torch.Tensor)
    config, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[algorithm]
    seen: list[list[float]] = []

    def factual(**columns: Any) -> list[float]:
        seen.append(reward(**columns))
        return seen[-1]

    trainer = trainer_class(
        model=str(tiny_llava_dir),
        reward_funcs=[factual, reward],
        args=config(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
        ),
        train_dataset=rows,
        processing_class=load_processor(str(tiny_llava_dir)),  # opens paths with PIL, wherever torchvision stands
    )
    trainer.train()
    assert len(seen) == 2
    assert all(len(scores) == 4 and torch.tensor(scores).isfinite().all() for scores in seen)
    logged = [
        entry["rewards/factual_reward/mean"]
        for entry in trainer.state.log_history
        if "rewards/factual_reward/mean" in entry
    ]
    assert logged == pytest.approx([sum(scores) / 4 for scores in seen], abs=1e-4)


def test_tiny_onevision_scores(tiny_llava_onevision_dir: Path, red_image, blue_image) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_onevision_dir)
    reward = FactualReward(classifier(tiny_llava_onevision_dir), processor, JudgingPrompt(), batch_size=2)
    columns = columns_of(red_image, blue_image)
    scores = reward(**columns)
    reward.batch_size = 1
    assert reward(**columns) == pytest.approx(scores, abs=2e-6)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_rows_that_are_alike_in_length_run_together_and_within_a_budget(
    reward: FactualReward, red_image, share_prefix: bool
) -> None:
    call = {
        "prompts": [
            ask("What?"),
            ask("Why? " * 30),
            ask("What?"),
            ask("Say hi."),
            ask("Why? " * 30),
            ask("No? " * 20),
        ],
        "completions": [say("Red."), say("Yes."), say("A red square."), say("Hi."), say("No."), say("A")],
        "images": [[red_image], [], [red_image.copy()], [], [], []],
        "captions": [["Red."]] * 6,
    }
    reward.share_prefix &= share_prefix
    alone = [reward(**{name: values[i : i + 1] for name, values in call.items()})[0] for i in range(6)]
    shapes: list[torch.Size] = []
    handle = base_of(reward.model).model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    reward.batch_size = 2
    assert reward(**call) == pytest.approx(alone, abs=2e-6)
    by_row, longest = list(shapes), max(shape[1] for shape in shapes)
    reward.batch_size, reward.max_tokens = 6, longest + 10
    shapes.clear()
    assert reward(**call) == pytest.approx(alone, abs=2e-6)
    handle.remove()
    assert [shape[0] for shape in by_row] == ([1, 1, 2] if share_prefix else [2, 2, 2])
    assert by_row == sorted(by_row, key=lambda shape: -shape[1]) and by_row[-1][1] < longest
    assert all(shape.numel() <= reward.max_tokens for shape in shapes) and len(shapes) > 2


def test_tensors_are_not_taken_for_each_other(reward: FactualReward, red_image, blue_image) -> None:
    """The text of a large tensor shows its corners only, and these are alike."""
    red = torch.tensor(np.asarray(red_image.resize((60, 60)))).permute(2, 0, 1)
    marked = red.clone()
    marked[:, 20:40, 20:40] = 255
    assert repr(red) == repr(marked)
    call = {"prompts": [ask("What?")] * 2, "completions": [say("A.")] * 2, "captions": [["A red square."]] * 2}
    first, second = reward(**call, images=[[red], [marked]])
    assert abs(first - second) > 1e-5
    assert second == pytest.approx(reward(**call, images=[[marked], [red]])[0], abs=2e-6)


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (torch.randn(3, 8, 8), "an array with values from .* expected 0 to 1"),
        (torch.full((3, 8, 8), torch.nan), "an array with values from nan to nan, expected 0 to 1"),
        (np.full((8, 8, 3), 256), "values from 256 to 256, expected 0 to 255"),
        (np.zeros((8, 8)), r"an array of the shape \(8, 8\), expected \(3, H, W\) or \(H, W, 3\)"),
        (np.zeros((3, 0, 8)), "an array of the shape"),
        ("https://host/a.png", "its image is a URL"),
    ],
)
def test_pixels_that_are_no_image_name_the_row(pixels: Any, problem: str, reward: FactualReward) -> None:
    call = {"prompts": [ask("What?")], "completions": [say("A.")], "captions": [["Red."]], "row_name": ["a[7]"]}
    with pytest.raises(RowError, match=rf"a\[7\]: .*{problem}"):
        reward(**call, images=[[pixels]])


def test_the_same_picture_is_known_again_without_comparing_each_with_each(red_image, blue_image) -> None:
    count, whole = [0], type(red_image).tobytes

    class Counted(Image.Image):
        def tobytes(self, *args: Any) -> bytes:
            count[0] += 1
            return whole(self, *args)

    pictures = [red_image.copy(), red_image.copy(), blue_image.copy(), red_image.copy().convert("L")]
    for picture in pictures:
        picture.__class__ = Counted
    rows = [(ask("What?"), say("A"), [picture], None, "row") for picture in [*pictures, pictures[0]]]
    rows += [(ask("Why?"), say("A"), pictures[0], None, "row"), (ask("Why?"), say("A"), [], None, "row")]
    assert same_prompts(rows) == [0, 0, 2, 3, 0, 5, 6]
    assert count[0] == 4
