"""Image features computed once give the numbers that pixels give in every pass, for every family."""

import copy
import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Image, List
from peft import PeftModel
from reference_passes import plain_values, response_logits, token_logprobs
from tiny_trainers import make_adapter, ppo_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    LlamaConfig,
    LogitsProcessorList,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.collators import PromptCollator
from trl_llava.data.load import rows_from
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.image_features import encode_images
from trl_llava.models.load import load_policy
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.sequence_classification import (
    LlavaForSequenceClassification,
    LlavaNextForSequenceClassification,
    LlavaOnevisionForSequenceClassification,
)
from trl_llava.ppo import decoding
from trl_llava.ppo.generation import Generator
from trl_llava.ppo.passes import response_logprobs, response_values

SCORE_CLASSES = {
    "tiny_llava_dir": LlavaForSequenceClassification,
    "tiny_llava_next_dir": LlavaNextForSequenceClassification,
    "tiny_llava_onevision_dir": LlavaOnevisionForSequenceClassification,
}


def make_inputs(family: str, folder: Path) -> ModelInputs:
    """Four rows with 1, 0, 2 and 1 images of different sizes."""
    processor = AutoProcessor.from_pretrained(folder)
    pictures = [
        [tiny_models.image("red")],
        [],
        [tiny_models.image("blue", (30, 60)), tiny_models.image("green", (50, 20))],
        [tiny_models.image("black", (28, 28))],
    ]
    questions = [[{"role": "user", "content": f"What is in the picture {i}?"}] for i in range(4)]
    dataset = Dataset.from_dict({"prompt": questions, "images": pictures}).cast_column("images", List(Image()))
    batch = PromptCollator(processor)(list(rows_from(dataset, "prompt")))
    return ModelInputs.from_batch(batch, torch.device("cpu"))


def policy_and_value(family: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    policy = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    value = SCORE_CLASSES[family].from_pretrained(folder, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(value.score.weight)
    return policy, value.eval().requires_grad_(False)


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_features_give_what_pixels_give(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    policy, value = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)
    features = encode_images(policy, pixels, batch_size=2)
    assert "pixel_values" not in features.images and [len(row) for row in features.features.rows] == [1, 0, 2, 1]
    responses = torch.randint(10, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(responses, dtype=torch.bool)
    with torch.no_grad():
        for rows in ([0, 1, 2, 3], [2], [1], [3, 0]):
            part = (responses[rows], mask[rows])
            expected = response_logits(policy, pixels.select(rows), *part, temperature=1.0)
            actual = response_logits(policy, features.select(rows), *part, temperature=1.0)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                response_values(value, encode_images(value, pixels, 8).select(rows), *part),
                response_values(value, pixels.select(rows), *part),
                rtol=1e-4,
                atol=1e-5,
            )


def answers_of_mixed_length(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    responses = torch.randint(10, 300, (rows, 5), generator=torch.Generator().manual_seed(0))
    return responses, torch.arange(5) < torch.tensor([[3], [5], [1], [4]])[:rows]


def gradients(model: torch.nn.Module, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(1))
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad((numbers * weights).sum(), parameters.values(), allow_unused=True)
    return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}


def assert_same_passes(policy: torch.nn.Module, value: torch.nn.Module, inputs: ModelInputs) -> None:
    """The passes give outputs and gradients of rows that are padded on both sides and run with a mask."""
    answers = answers_of_mixed_length(len(inputs))
    logits = response_logits(policy, inputs, *answers, temperature=0.8)
    pairs = [
        (policy, response_logprobs(policy, inputs, *answers, Sampling(0.8))[0], token_logprobs(logits, *answers)),
        (value, response_values(value, inputs, *answers), plain_values(value, inputs, *answers)),
    ]
    for model, actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        found, wanted = gradients(model, actual), gradients(model, expected)
        assert set(found) == set(wanted) and len(found) > 10
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_passes_without_a_mask_are_passes_with_one(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    policy, value = policy_and_value(family, folder)
    for model in (policy, value):
        model.model.language_model.requires_grad_(True)
    assert_same_passes(policy, value, make_inputs(family, folder))


TEXT = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TEXT, **HEADS),
        MistralConfig(**TEXT, **HEADS, sliding_window=4),
        Qwen2Config(**TEXT, **HEADS),
        Qwen2Config(**TEXT, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=["llama", "mistral with a window", "qwen2", "qwen2 with a window"],
)
def test_language_models_need_no_mask(config: PreTrainedConfig, attention: str) -> None:
    torch.manual_seed(0)
    config.num_labels = 1
    policy = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    value = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [6], [2]])).long()
    ids = torch.randint(10, 300, (4, 9), generator=torch.Generator().manual_seed(2)).masked_fill(mask == 0, 319)
    assert_same_passes(policy, value, ModelInputs(ids, mask))


def test_attention_runs_with_its_causal_kernel(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, value = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    seen_by_policy, seen_by_value = (encode_images(model, inputs, 8) for model in (policy, value))
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append((attn_mask, kwargs["is_causal"]))
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    response_logprobs(policy, seen_by_policy, *answers_of_mixed_length(4), Sampling())
    response_values(value, seen_by_value, *answers_of_mixed_length(4))
    assert len(masks) >= 2 and set(masks) == {(None, True)}


def make_generator(keep_logprobs: bool = False, stop: int = 2, **changes: Any) -> Generator:
    settings = {
        "response_length": 6,
        "temperature": 1.0,
        "seed": 0,
        "local_rollout_forward_batch_size": 3,
        "cache_implementation": "dynamic",
        "generation_cache_gib": None,
        "share_prefix": True,
        "torch_compile": False,
        **changes,
    }
    AcceleratorState._reset_state(True)  # of a test whose trainer computed in bfloat16
    return Generator(
        SimpleNamespace(**settings),
        Accelerator(),
        SimpleNamespace(pad_token_id=3),
        stop_token_id=stop,
        sampling=Sampling(settings["temperature"], (4,)),
        keep_logprobs=keep_logprobs,
    )


def end_often(policy: torch.nn.Module, stop: int = 2) -> None:
    """Make about every seventh token a stop token."""
    bonus = torch.zeros(policy.get_output_embeddings().out_features).index_fill(0, torch.tensor([stop]), 4.0)
    policy.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + bonus)


def decoding_passes(policy: PreTrainedModel) -> list[tuple[int, int]]:
    """(rows, tokens) of every pass through the language model from now on."""
    seen: list[tuple[int, int]] = []
    model = getattr(policy.model, "language_model", policy.model)
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def assert_static_is_plain(policy: PreTrainedModel, inputs: ModelInputs, step: int | None, **changes: Any) -> None:
    settings = {
        "response_length": 14,
        "local_rollout_forward_batch_size": len(inputs),
        "keep_logprobs": True,
        **changes,
    }
    plain = make_generator(**settings).generate(policy, inputs, step)
    static = make_generator(**settings, cache_implementation="static").generate(policy, inputs, step)
    assert torch.equal(static.responses, plain.responses) and torch.equal(static.mask, plain.mask)
    assert torch.equal(static.stopped, plain.stopped)
    if step is None:
        assert static.logprobs is plain.logprobs is None
    else:
        torch.testing.assert_close(static.logprobs, plain.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [1, None])
@pytest.mark.parametrize("bucket", [3, 256])
@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_static_decoding_draws_the_tokens_of_transformers_loop(
    family: str, bucket: int, step: int | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    end_often(policy)
    monkeypatch.setattr(decoding, "BUCKET", bucket)  # 3: the cache moves, and rows leave, in the middle of completions
    pixels = make_inputs(family, folder)  # left-padded, with 1, 0, 2 and 1 images
    for inputs in (pixels, encode_images(policy, pixels, batch_size=8).select([0, 2, 0, 1, 2, 2, 3])):
        assert_static_is_plain(policy, inputs, step)


def test_static_decoding_runs_each_prompt_once_and_drops_rows_between_buckets(
    tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    end_often(policy)
    monkeypatch.setattr(decoding, "BUCKET", 3)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir).select([0, 2, 0, 1, 2, 2, 3])
    generator = make_generator(response_length=14, local_rollout_forward_batch_size=7, cache_implementation="static")
    seen = decoding_passes(policy)
    found = generator.generate(policy, inputs, 1)
    lengths = found.mask.sum(1)
    assert seen[0] == (4, inputs.query_length - 1) and len(seen) == 1 + int(lengths.max())
    running = [int((lengths > token - token % 3).sum()) for token in range(int(lengths.max()))]
    assert [rows for rows, _ in seen[1:]] == running and len(set(running)) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("stop", [2, None])
def test_static_decoding_with_and_without_a_stop_token(
    temperature: float, stop: int | None, tiny_llava_dir: Path
) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    assert_static_is_plain(policy, inputs, 3, temperature=temperature, stop=stop)


def causal_lm(config: PreTrainedConfig) -> tuple[PreTrainedModel, ModelInputs]:
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [6], [2], [0], [8], [3], [5]])).long()
    ids = torch.randint(10, 300, (8, 9), generator=torch.Generator().manual_seed(2)).masked_fill(mask == 0, 319)
    return policy, ModelInputs(ids, mask)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**TEXT, **HEADS), Qwen2Config(**TEXT, **HEADS)], ids=["llama", "qwen2"]
)
def test_static_decoding_of_text_models(config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, inputs = causal_lm(config)
    end_often(policy)
    monkeypatch.setattr(decoding, "BUCKET", 4)
    assert decoding.why_not_static(policy, inputs) is None
    assert_static_is_plain(policy, inputs, 1)


def test_static_decoding_under_an_adapter(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    policy = PeftModel.from_pretrained(policy_and_value("tiny_llava_dir", tiny_llava_dir)[0], adapter)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    assert_static_is_plain(policy.eval(), inputs, 1)


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"load_in_4bit": True, "dtype": "float32"}], ids=str)
def test_static_decoding_in_16_and_4_bit_with_checkpointing_on(
    fields: dict[str, Any], tiny_llava_dir: Path, tmp_path: Path
) -> None:
    args = LlavaModelConfig(model_name_or_path=str(tiny_llava_dir), **fields)
    policy = load_policy(args)
    policy.activation_checkpointing_enable()
    policy = PeftModel.from_pretrained(policy, make_adapter(tiny_llava_dir, tmp_path / "adapter")).eval()
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    generator = make_generator(keep_logprobs=True, response_length=14, cache_implementation="static")
    found = generator.generate(policy, inputs, 1)
    with torch.no_grad():
        expected, _ = response_logprobs(policy, inputs, found.responses, found.mask, Sampling(1.0, (4,)))
    # Their rounding may let the plain loop draw another token; what was drawn has the policy's probability.
    assert found.logprobs is not None
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**TEXT, **HEADS, sliding_window=4), "not all layers of MistralForCausalLM keep all"),
        (
            Qwen2Config(**TEXT, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            "not all layers of Qwen2ForCausalLM keep all",
        ),
    ],
    ids=["mistral with a window", "qwen2 with a window"],
)
def test_a_window_is_left_to_transformers(
    config: PreTrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy, inputs = causal_lm(config)
    generator = make_generator(cache_implementation="static")
    found = [generator.generate(policy, inputs, 1).responses for _ in range(2)]
    assert torch.equal(*found) and [reason in record.message for record in caplog.records] == [True]  # said once


class PlayedGraph:
    """A CUDA graph without a GPU: recording computes nothing that stays, a replay runs the step again.

    What torch holds meanwhile, and gives back only where a recording ends well, is `stream` and `pools`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: str | None) -> None:
        self.fault, self.recorded, self.replayed, self.recording = fault, 0, 0, False
        self.stream, self.pools = SimpleNamespace(device_index=0), {}
        draw_with = decoding.StaticDecoder._draw_with

        def watched(decoder: Any, policy: Any, state: Any) -> Any:
            self.draw, self.state = draw_with(decoder, policy, state), state
            return self.drawn

        monkeypatch.setattr(decoding, "_on_gpu", lambda state: True)
        monkeypatch.setattr(decoding.StaticDecoder, "_draw_with", watched)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "graph", self.begin)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        for name, states in {"_cuda_endAllocateToPool": "recording", "_cuda_releasePool": "ended"}.items():
            monkeypatch.setattr(torch._C, name, partial(self.forget, states), raising=False)

    def begin(self, graph: Any, pool: tuple[int, int], capture_error_mode: str) -> Any:
        assert graph is self and capture_error_mode == "thread_local"
        self.outside, self.stream, self.pools[pool] = self.stream, SimpleNamespace(device_index=0), "recording"
        return self

    def forget(self, state: str, device: int, pool: tuple[int, int]) -> None:
        assert self.pools.pop(pool) == state
        if state == "recording":
            self.pools[pool] = "ended"

    def drawn(self) -> torch.Tensor:
        if self.recording and self.fault == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return self.draw() + (100 if self.recording and self.fault == "other logits" else 0)

    def __enter__(self) -> None:
        self.recording, self.before = True, copy.deepcopy(self.state)

    def __exit__(self, *error: Any) -> None:
        self.recording = False
        if self.fault == "cannot be recorded":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream, self.recorded = self.outside, self.recorded + 1
        self.pools.clear()
        for name in ("ids", "positions", "step", "ended"):
            getattr(self.state, name).copy_(getattr(self.before, name))
        for layer, old in zip(self.state.cache.layers, self.before.cache.layers, strict=True):
            layer.cumulative_length.copy_(old.cumulative_length)

    def pool(self) -> tuple[int, int]:
        if self.fault == "cannot be recorded":
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return (0, 1)

    def replay(self) -> None:
        self.replayed += 1
        self.draw()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, ""),
        ("cannot be recorded", "operation not permitted when stream is capturing."),
        ("other logits", "its logits are 100 off, where rounding explains"),
    ],
)
def test_a_recorded_step_is_replayed_or_left_with_a_message(
    fault: str | None,
    message: str,
    tiny_llava_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    end_often(policy)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir).select([0, 2, 0, 1, 2, 2, 3])
    settings = {"response_length": 14, "local_rollout_forward_batch_size": 7, "keep_logprobs": True}
    plain = make_generator(**settings).generate(policy, inputs, 1)
    monkeypatch.setattr(decoding, "BUCKET", 5)
    monkeypatch.setattr(decoding, "CHECK_EVERY", 2)
    graph = PlayedGraph(monkeypatch, fault)
    stream = graph.stream
    static = make_generator(**settings, cache_implementation="static").generate(policy, inputs, 1)
    assert torch.equal(static.responses, plain.responses) and torch.equal(static.mask, plain.mask)
    torch.testing.assert_close(static.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    said = [record.getMessage() for record in caplog.records if record.name == decoding.__name__]
    if fault is None:
        assert graph.recorded == 3 and graph.replayed > 9 and not said
    else:
        assert graph.recorded <= 1 and len(said) == 1 and message in said[0]  # once
    # Nothing of a recording is left in torch.
    assert graph.stream is stream and not graph.pools


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_static_decoding_is_not_for_attention_that_sees_empty_places(attention: str, tiny_llava_dir: Path) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    policy.config.get_text_config()._attn_implementation_internal = attention
    reason = str(decoding.why_not_static(policy, make_inputs("tiny_llava_dir", tiny_llava_dir)))
    assert reason == f"{attention} does not leave out the places of a cache that are not filled yet"


def test_what_waits_for_the_device_is_not_recorded(tiny_llava_dir: Path) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    assert decoding.why_not_recorded(policy) is None
    policy.config.get_text_config().rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert "rotary embeddings of type dynamic" in str(decoding.why_not_recorded(policy))
    policy.config.quantization_config = SimpleNamespace(load_in_8bit=True)
    assert "LLM.int8" in str(decoding.why_not_recorded(policy))


class NothingIsRead(TorchDispatchMode):
    """Refuses what waits for a GPU: reading a number, sizes that depend on data, tensors of Python's numbers."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for a GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_a_step_waits_for_nothing(
    family: str, greedy: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(family)
    policy = PeftModel.from_pretrained(
        policy_and_value(family, folder)[0], make_adapter(folder, request.getfixturevalue("tmp_path") / "adapter")
    ).eval()
    draw_with, steps = decoding.StaticDecoder._draw_with, []

    def watched(decoder: Any, policy: Any, state: Any) -> Any:
        step = draw_with(decoder, policy, state)

        def draw() -> torch.Tensor:
            with NothingIsRead():
                steps.append(1)
                return step()

        return draw

    monkeypatch.setattr(decoding.StaticDecoder, "_draw_with", watched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks
    make_generator(cache_implementation="static").generate(policy, make_inputs(family, folder), None if greedy else 1)
    assert len(steps) > 6


def test_static_decoding_is_not_for_zero3(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    monkeypatch.setattr(decoding, "is_deepspeed_zero3_enabled", lambda: True)
    assert "ZeRO-3" in str(decoding.why_not_static(policy, make_inputs("tiny_llava_dir", tiny_llava_dir)))


@pytest.mark.parametrize("family", SCORE_CLASSES)
def test_generation_from_features_is_generation_from_pixels(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)
    generator = make_generator()
    for step in (None, 1):
        expected = generator.generate(policy, pixels, step).responses
        actual = generator.generate(policy, encode_images(policy, pixels, batch_size=8), step).responses
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", SCORE_CLASSES)
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"cache_implementation": "static"}], ids=str)
def test_generation_tells_the_logprobs_that_a_pass_computes(
    family: str, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    policy, _ = policy_and_value(family, folder)
    pixels = make_inputs(family, folder)  # left-padded, with 1, 0, 2 and 1 images
    for inputs in (pixels, encode_images(policy, pixels, batch_size=8).select([0, 2, 0, 1, 2])):
        stop = int(make_generator(**changes).generate(policy, inputs, 3).responses[0, 2])  # so that one stops early
        generator = make_generator(keep_logprobs=True, stop=stop, **changes)
        answers = generator.generate(policy, inputs, 3)
        assert answers.mask[0].sum() == 3 and not answers.stopped.all()
        sampling = Sampling(changes.get("temperature", 1.0), (4,))
        with torch.no_grad():
            expected, _ = response_logprobs(policy, inputs, answers.responses, answers.mask, sampling)
        assert answers.logprobs is not None and answers.logprobs.dtype == torch.float32
        torch.testing.assert_close(answers.logprobs, expected, rtol=0, atol=1e-5)
        assert (answers.logprobs[~answers.mask] == 0).all() and (answers.logprobs[answers.mask] < 0).all()
        assert generator.generate(policy, inputs, None).logprobs is None  # greedy answers are not drawn


def test_what_is_chosen_behind_the_noise_is_what_counts(tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    generate = policy.generate

    def forced(*args: Any, logits_processor: LogitsProcessorList, **kwargs: Any) -> torch.Tensor:
        return generate(*args, logits_processor=LogitsProcessorList([*logits_processor, only_seven]), **kwargs)

    def only_seven(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    monkeypatch.setattr(policy, "generate", forced)
    answers = make_generator(keep_logprobs=True).generate(policy, inputs, 1)
    assert (answers.responses == 7).all()
    with torch.no_grad():
        expected, _ = response_logprobs(policy, inputs, answers.responses, answers.mask, Sampling(1.0, (4,)))
    torch.testing.assert_close(answers.logprobs, expected, rtol=0, atol=1e-5)


def test_generation_keeps_one_number_a_token_and_no_scores(tiny_llava_dir: Path) -> None:
    """As many steps' scores are alive at the end as after the first step."""
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    inputs = make_inputs("tiny_llava_dir", tiny_llava_dir)
    vocabulary, alive = policy.get_output_embeddings().weight.shape[0], []

    def count(module: torch.nn.Module, *_: Any) -> None:
        wide = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor) and tensor.dim() <= 3 and tensor.shape[-1:] == (vocabulary,)
        }
        alive.append(sum(wide.values()))

    policy.get_output_embeddings().register_forward_pre_hook(count)
    answers = make_generator(keep_logprobs=True).generate(policy, inputs.select([0, 2]), 1)
    assert answers.logprobs is not None and len(alive) == 6
    # Two of `generate`, one of ours, float32; beside what other tests have left alive.
    assert {count - alive[0] for count in alive[1:]} == {3 * 2 * vocabulary * 4}


def test_the_image_matters(tiny_llava_dir: Path) -> None:
    """Else the tests above would also pass with the features of another picture."""
    policy, _ = policy_and_value("tiny_llava_dir", tiny_llava_dir)
    features = encode_images(policy, make_inputs("tiny_llava_dir", tiny_llava_dir), batch_size=8)
    first, _, [second, third], *others = features.features.rows
    swapped = replace(features, features=replace(features.features, rows=[[second], [], [*first, third], *others]))
    part = (torch.full((1, 3), 20), torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        first = response_logits(policy, features.select([0]), *part, temperature=1.0)
        second = response_logits(policy, swapped.select([0]), *part, temperature=1.0)
    assert (first - second).abs().max() > 1e-3


def test_each_image_is_encoded_once_a_step_for_each_model(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter")
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path / "out", total_episodes=4, num_ppo_epochs=3)
    for parameter in (p for n, p in trainer.model.named_parameters() if "vision_tower" in n or "projector" in n):
        assert not parameter.requires_grad
    seen = {"policy": 0, "value_model": 0}
    model = trainer.accelerator.unwrap_model(trainer.model)
    for role in seen:
        tower = getattr(model, role).get_base_model().model.vision_tower

        def count(module: torch.nn.Module, args: tuple, role: str = role) -> None:
            seen[role] += args[0].shape[0]

        tower.register_forward_pre_hook(count)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert sum(map(len, batch["columns"]["images"])) == 3 and seen == {"policy": 3, "value_model": 3}
