"""Rows that share a prefix give, run as one, what they give one by one: numbers and gradients, for every family."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset, Image, List
from tiny_trainers import favour_the_stop_token, make_adapter, ppo_trainer, weights
from torch import nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AutoModelForImageTextToText, AutoProcessor, MistralConfig, MistralForCausalLM

from trl_llava.data.collators import PromptCollator
from trl_llava.data.load import rows_from
from trl_llava.data.preference_collators import PreferenceCollator
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.sequence_classification import (
    LlavaForSequenceClassification,
    LlavaNextForSequenceClassification,
    LlavaOnevisionForSequenceClassification,
)
from trl_llava.models.shared_prefix import (
    attention_mask_for,
    last_of_rests,
    pack,
    pack_groups,
    pack_pairs,
    predictors,
    why_not,
)
from trl_llava.ppo.passes import response_logprobs, response_values
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward

SCORE_CLASSES = {
    "tiny_llava_dir": LlavaForSequenceClassification,
    "tiny_llava_next_dir": LlavaNextForSequenceClassification,
    "tiny_llava_onevision_dir": LlavaOnevisionForSequenceClassification,
}
CASES = [
    *((family, "sdpa", False) for family in SCORE_CLASSES),
    ("tiny_llava_dir", "eager", False),
    ("tiny_llava_dir", "sdpa", True),
]


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens)


def test_layout() -> None:
    packed = pack([ids(7, 8), ids(9)], [[ids(1), ids(2, 3)], [ids(4)]], multiple=6)
    assert packed.input_ids.tolist() == [[7, 8, 1, 2, 3, 0], [9, 4, 0, 0, 0, 0]]
    assert packed.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0], [0, 1, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 1, 2, 2, -1], [0, 1, -1, -1, -1, -1]]
    assert [found.tolist() for found in predictors(packed, [2, 1])] == [[1], [1, 3], [6]]


@pytest.mark.parametrize(
    ("first", "second", "found", "ends"),
    [
        ([5, 6, 1], [5, 6, 2, 3], [0, 0, 1, 2, 2], [2, 4]),
        ([5, 6], [5, 6], [0, 1, 2], [1, 2]),  # equal: the last token of each stays its own
        ([5, 6], [5, 6, 7], [0, 1, 2, 2], [1, 3]),  # one is the beginning of the other
    ],
)
def test_pairs(first: list[int], second: list[int], found: list[int], ends: list[int]) -> None:
    packed = pack_pairs([first], [second])
    assert packed.segments.tolist() == [found]
    assert last_of_rests(packed.segments).tolist() == [[ends[0]], [ends[1]]]


def test_groups() -> None:
    rows = [[7, 8, 1, 2], [9, 5], [7, 8, 3], [7, 8, 1, 2]]
    packed, first, places = pack_groups(rows, [0, 4, 0, 0])
    assert packed.input_ids.tolist() == [[7, 8, 1, 2, 3, 1, 2], [9, 5, 0, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 1, 1, 2, 3, 3], [0, 1, -1, -1, -1, -1, -1]]
    assert first == [0, 1]
    assert places == [0, 1, 2, 4]  # of the packs' first, second and third rests
    assert last_of_rests(packed.segments).flatten()[places].tolist() == [3, 1, 4, 6]


def model_with(attention: str) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation=attention))
    return model


SEEN = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [1, 0, 0, 1, 0],
    [1, 0, 0, 0, 1],
]


def test_a_rest_sees_its_prefix_and_itself() -> None:
    segments = torch.tensor([[0, 1, 1, 2, -1]])
    seen = attention_mask_for(model_with("sdpa"), segments)
    assert seen[0, 0].int().tolist() == SEEN
    blocks = attention_mask_for(model_with("flex_attention"), segments)
    assert create_mask(blocks.mask_mod, 1, 1, 5, 5, device="cpu")[0, 0].int().tolist() == SEEN
    assert blocks.shape == (1, 1, 5, 5)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def checkpointed(model: nn.Module, wanted: bool) -> nn.Module:
    if wanted:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name


@pytest.mark.parametrize(("family", "attention", "checkpointing"), CASES)
def test_rewards_and_gradients_are_those_of_whole_rows(
    family: str, attention: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    torch.manual_seed(0)
    model = SCORE_CLASSES[family].from_pretrained(
        folder, num_labels=1, dtype=torch.float32, attn_implementation=attention
    )
    nn.init.normal_(model.score.weight)
    checkpointed(model, checkpointing)
    completions = [
        ("There is a red square.", "There is a blue circle and a green triangle."),
        ("Yes.", "No."),
        ("No", "No, there is a blue circle."),
        ("A", "B"),
    ]
    table = {
        "prompt": [message("user", f"What is in the picture {i}?") for i in range(4)],
        "chosen": [message("assistant", pair[0]) for pair in completions],
        "rejected": [message("assistant", pair[1]) for pair in completions],
        "images": [[tiny_models.image("red")], [], [tiny_models.image("blue", (30, 60))] * 2, []],
        "captions": [["a square"]] * 4,
    }
    dataset = Dataset.from_dict(table).cast_column("images", List(Image()))
    rows = list(rows_from(dataset, "preference"))
    rows[1] = {**rows[1], "rejected": rows[1]["chosen"]}
    weight = torch.linspace(-1, 1, 8)
    for judging in (None, JudgingPrompt()):
        plain = PreferenceCollator(AutoProcessor.from_pretrained(folder), judging_prompt=judging)
        expected = model(**plain(rows)).logits.squeeze(-1)
        wanted = gradients((expected * weight).sum(), model)
        batch = replace(plain, share_prefix=True)(rows)
        found = model(**batch).logits.squeeze(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_same(gradients((found * weight).sum(), model), wanted)
    assert expected[:4].std() > 1e-3


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """transformers' own call of flex attention, but not compiled; lists the masks it was called with."""
    masks: list[str] = []

    def run(*parts: torch.Tensor, training: bool = False, **kwargs: Any) -> torch.Tensor:
        masks.append(type(kwargs["block_mask"]).__name__)
        return flex_attention(*parts, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", run)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return masks


def test_flex_attention_gives_what_whole_rows_give(tiny_llava_dir: Path, uncompiled_flex: list[str]) -> None:
    plain, flex = {"dtype": torch.float32}, {"dtype": torch.float32, "attn_implementation": "flex_attention"}
    policies, values = [], []
    for loading in (plain, flex):
        policies.append(AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, **loading).eval())
        torch.manual_seed(0)
        values.append(LlavaForSequenceClassification.from_pretrained(tiny_llava_dir, num_labels=1, **loading).eval())
        nn.init.normal_(values[-1].score.weight)
        assert why_not(policies[-1]) is None
    inputs, responses, mask = rollout_of("tiny_llava_dir", tiny_llava_dir)
    results = []
    for policy, value, share in ((policies[0], values[0], False), (policies[1], values[1], True)):
        with torch.inference_mode():
            rollout = (inputs, responses, mask)
            logprobs, entropies = response_logprobs(policy, *rollout, Sampling(), entropies=True, share_prefix=share)
            results.append((logprobs, entropies, response_values(value, *rollout, share_prefix=share)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert uncompiled_flex.count("BlockMask") >= 2 * 2  # both models' language models have two layers
    packed = pack_pairs([[1, 5, 6, 7, 9]], [[1, 5, 6, 8]])._asdict()
    with torch.inference_mode():
        torch.testing.assert_close(values[1](**packed).logits, values[0](**packed).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_llava_onevision_dir"])
@pytest.mark.parametrize("judging", [JudgingPrompt(), None], ids=["judged", "bare"])
def test_completions_of_one_prompt_are_scored_behind_it_once(
    family: str, judging: JudgingPrompt | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    model = SCORE_CLASSES[family].from_pretrained(folder, num_labels=1, dtype=torch.float32)
    torch.manual_seed(0)
    nn.init.normal_(model.score.weight)
    reward = FactualReward(model, AutoProcessor.from_pretrained(folder), judging, batch_size=6)
    red, blue = tiny_models.image("red"), tiny_models.image("blue", (30, 60))
    prompts = [message("user", text) for text in ("What is it?", "What is it?", "Say hi.")]
    images = [[red], [blue], []]
    order = [0, 0, 1, 2, 0, 1, 2, 2]  # six in the first pass, two in the second
    completions = ["A red square.", "No.", "Blue.", "Hi!", "No.", "A blue circle, I think.", "Hi there.", "No"]
    call = {
        "prompts": [prompts[i] for i in order],
        "completions": [message("assistant", text) for text in completions],
        "images": [images[i] for i in order],
        "captions": [[f"caption {i}", "On white."] for i in order],
    }
    rows: list[tuple[int, ...]] = []
    handle = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(output.last_hidden_state.shape[:2]), with_kwargs=True
    )
    shared = reward(**call)
    reward.share_prefix = False
    assert shared == pytest.approx(reward(**call), rel=1e-5, abs=1e-5)
    handle.remove()
    packs = [shape[0] for shape in rows]
    assert packs in ([3, 1, 6, 2], [2, 1, 6, 2])  # by length: the second pass has two completions of the shortest pack
    assert torch.tensor(shared).std() > 1e-3


def rollout_of(family: str, folder: Path) -> tuple[ModelInputs, torch.Tensor, torch.Tensor]:
    """Three completions each of two prompts, one with an image, and one of a third; left and right padding."""
    table = {
        "prompt": [
            message("user", text) for text in ("What is in the picture?", "Yes?", "Is it a red square or not?")
        ],
        "images": [[tiny_models.image("red")], [], [tiny_models.image("blue", (30, 60))]],
    }
    dataset = Dataset.from_dict(table).cast_column("images", List(Image()))
    batch = PromptCollator(AutoProcessor.from_pretrained(folder))(list(rows_from(dataset, "prompt")))
    inputs = ModelInputs.from_batch(batch, torch.device("cpu")).repeated(3).select([0, 3, 1, 6, 4, 5, 2])
    responses = torch.randint(10, 300, (7, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4, 1])[:, None]
    return inputs, responses, mask


@pytest.mark.parametrize(("family", "attention", "checkpointing"), CASES)
def test_logprobs_values_and_gradients_are_those_of_whole_rows(
    family: str, attention: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    loading = {"dtype": torch.float32, "attn_implementation": attention}
    policy = checkpointed(AutoModelForImageTextToText.from_pretrained(folder, **loading), checkpointing)
    torch.manual_seed(0)
    value = checkpointed(SCORE_CLASSES[family].from_pretrained(folder, num_labels=1, **loading), checkpointing)
    nn.init.normal_(value.score.weight)
    inputs, responses, mask = rollout_of(family, folder)
    assert inputs.groups == [0, 1, 0, 2, 1, 1, 0]
    weight = torch.linspace(-1, 1, mask.numel()).view_as(mask.float())
    results = {}
    for share in (False, True):
        rollout = (inputs, responses, mask)
        logprobs, entropies = response_logprobs(policy, *rollout, Sampling(), entropies=True, share_prefix=share)
        values = response_values(value, *rollout, share_prefix=share)
        numbers = {"logprobs": logprobs.detach(), "entropies": entropies, "values": values.detach()}
        results[share] = (
            numbers,
            gradients((logprobs * weight).sum(), policy),
            gradients((values * weight).sum(), value),
        )
    for name, expected in results[False][0].items():
        torch.testing.assert_close(results[True][0][name], expected, rtol=1e-5, atol=1e-5, msg=name)
    for place in (1, 2):
        assert_same(results[True][place], results[False][place])


def test_which_models_cannot(tiny_llava_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir)
    assert why_not(model) is None
    for takes_packs in ("eager", "flex_attention"):
        model.config.get_text_config()._attn_implementation = takes_packs
        assert why_not(model) is None
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    assert why_not(model) == "attention 'flash_attention_2' takes no 4D mask (use attn_implementation: sdpa)"
    windowed = MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    assert why_not(MistralForCausalLM(windowed)) == "MistralForCausalLM has layers without full attention"


def test_ppo_with_several_completions_of_a_prompt(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    runs = []
    for share in (True, False):
        trainer = ppo_trainer(
            tiny_llava_dir, adapter, tmp_path, num_generations_per_prompt=2, share_prefix=share, num_ppo_epochs=2,
            total_episodes=None, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        )  # fmt: skip
        favour_the_stop_token(trainer.policy_model)
        assert trainer.share_prefix is share
        scored: list[list[str]] = []
        widths: list[torch.Size] = []
        trainer.value_model.get_base_model().model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, widths=widths: widths.append(kwargs["inputs_embeds"].shape), with_kwargs=True
        )

        def length(prompts: list, completion_ids: list, scored: list = scored, **columns: list) -> list[float]:
            scored.append([prompt[-1]["content"][-1]["text"] for prompt in prompts])
            return [float(len(ids)) for ids in completion_ids]

        trainer.scorer.reward_funcs = [length]
        trainer.train()
        runs.append((trainer.state.log_history, weights(trainer)))
        # 4 completions of 2 prompts, in the rollout's pass and in two epochs of the update, 4 times.
        assert [rows for rows, *_ in widths] == [2 if share else 4] * 12
        # 8 prompts, 2 a step, each twice; an epoch has each once.
        assert len(scored) == 4 and all(a == b and c == d and a != c for a, b, c, d in scored)
        assert len({text for step in scored for text in step}) == 8
        assert [entry["epoch"] for entry in trainer.state.log_history] == [0.25, 0.5, 0.75, 1.0]
    (shared, shared_weights), (plain, plain_weights) = runs
    for expected, actual in zip(plain, shared, strict=True):
        for name in expected:
            if not name.startswith(("time/", "tokens_per_second", "eps")):
                assert actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    for name, value in plain_weights.items():
        torch.testing.assert_close(shared_weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_completions_of_one_prompt_differ(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, num_generations_per_prompt=4)
    rollout = trainer.rollout(next(iter(trainer.get_train_dataloader())), step=1)
    assert len({tuple(row) for row in rollout.responses.tolist()}) == 4
    assert rollout.inputs.groups == [0, 0, 0, 0]
    with pytest.raises(
        ValueError, match=r"`num_generations_per_prompt` \(3\) must divide .* = 4 rollouts per process"
    ):
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, num_generations_per_prompt=3)
