"""The chunked head gives the numbers and gradients of all logits at once, and holds no more than a chunk of them."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_passes import response_logits, token_entropies, token_logprobs
from torch import nn
from transformers import AutoModelForImageTextToText, Gemma2Config, Gemma2ForCausalLM

from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.chunked_head import Sampling, entropies_of, logprobs_of, token_statistics
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.passes import check_plain_head, response_logprobs
from trl_llava.tools.plan.memory_trace import MemoryTrace


def test_formulae() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(3.0)], [0.0, 0.0]])
    torch.testing.assert_close(logprobs_of(logits, torch.tensor([1, 0])), torch.tensor([3 / 4, 1 / 2]).log())
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(entropies_of(logits), torch.tensor([entropy, math.log(2)]))


def test_a_suppressed_token_has_probability_0_and_temperature_divides() -> None:
    logits = Sampling(temperature=0.5, suppressed=(2, 99)).logits(torch.tensor([[0.0, math.log(3.0) / 2, 50.0]]))
    torch.testing.assert_close(logprobs_of(logits, torch.tensor([1])), torch.tensor([3 / 4]).log())
    assert entropies_of(logits).isfinite().all()


def test_logits_are_copied_once_and_those_of_the_head_stay() -> None:
    raw = torch.ones(4, 1000)
    with MemoryTrace() as trace:
        logits = Sampling(suppressed=(5,)).logits(raw)
    assert trace.peak < 1.1 * raw.nbytes
    assert bool((raw == 1).all()) and logits[0, 5] == torch.finfo(torch.float32).min


def prompts_and_responses() -> tuple[ModelInputs, torch.Tensor, torch.Tensor]:
    """Three left-padded prompts with responses of 5, 1 and 3 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 300, (3, 6), generator=generator)
    attention = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    responses = torch.randint(10, 300, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    return ModelInputs(ids, attention), responses, mask


def test_a_pass_is_as_wide_as_its_longest_row(tiny_llava_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32).eval()
    inputs, responses, mask = prompts_and_responses()  # 6 + 5, 4 + 1 and 5 + 3 tokens
    seen: list[tuple[int, ...]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    for rows in ([0, 1, 2], [1, 2], [1]):
        response_logprobs(model, inputs.select(rows), responses[rows], mask[rows], Sampling())
    assert seen == [(3, 11), (2, 8), (1, 5)]


@pytest.mark.parametrize("head", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_numbers_and_gradients_are_those_of_all_logits_at_once(
    tiny_llava_dir: Path, head: str, chunk_size: int
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    targets = r".*language_model\..*q_proj" + (r"|.*lm_head" if head == "lora" else "")
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    model.get_base_model().lm_head.requires_grad_(True) if head == "trained" else None
    inputs, responses, mask = prompts_and_responses()
    sampling = Sampling(0.7, (4,), chunk_size)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    logits = response_logits(model, inputs, responses, mask, 0.7, (4,))
    expected = (token_logprobs(logits, responses, mask), token_entropies(logits, mask).detach())
    wanted = torch.autograd.grad((expected[0] * weights).sum(), trained)
    found = response_logprobs(model, inputs, responses, mask, sampling, entropies=True)
    with active_adapter(model, None):  # as when another role computes between a pass and its backward
        gradients = torch.autograd.grad((found[0] * weights).sum(), trained)

    for name, pair in {"logprobs": (found[0], expected[0]), "entropies": (found[1], expected[1])}.items():
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6, msg=name)
    assert not found[1].requires_grad
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_no_tensor_is_wider_than_a_chunk_in_forward_or_backward() -> None:
    class Head(nn.Linear):
        rows: list[int]

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(states))
            return super().forward(states)

    head = Head(8, 50)
    head.rows = []
    hidden = torch.randn(10, 8, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        logprobs, _ = token_statistics(hidden, head, torch.arange(10), Sampling(chunk_size=4), entropies=True)
    assert head.rows == [4, 3, 3]
    assert not any(50 in shape for shape in saved), saved  # no logits wait for the backward pass
    logprobs.sum().backward()
    assert sorted(head.rows[3:]) == [3, 3, 4]


def test_a_process_with_fewer_tokens_runs_the_head_as_often_under_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would wait for it for ever: a layer's weights are fetched by all of them together."""
    monkeypatch.setattr("trl_llava.models.chunked_head.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, op: count.fill_(5))
    head, runs = nn.Linear(8, 50), []
    head.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    hidden = torch.randn(3, 8, requires_grad=True)
    logprobs, entropies = token_statistics(hidden, head, torch.arange(3), Sampling(chunk_size=4), entropies=True)
    assert runs == [1, 1, 1, 0, 0] and logprobs.shape == entropies.shape == (3,)
    logprobs.sum().backward()
    assert len(runs) == 10 and hidden.grad.isfinite().all()


def test_a_model_that_caps_its_logits_is_refused(tiny_llava_dir: Path) -> None:
    check_plain_head(AutoModelForImageTextToText.from_pretrained(tiny_llava_dir).eval())
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more with its logits than its head does"):
        check_plain_head(Gemma2ForCausalLM(config).eval())
