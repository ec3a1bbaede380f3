"""The formulae of the paper's code: equal to 1e-5 on unpadded rows, and to a masked reference on padded ones.

The original has no masks: padding counts in its losses, its whitening and its means, and the score sits on the last
position, pad or not. Its numbers for full rows are compared as they are. For padded rows each test has a reference
that computes row by row over the real tokens only.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import golden_data
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.chunked_head import Sampling, logprobs_of
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo import ppo_math
from trl_llava.ppo import update as ppo_update
from trl_llava.ppo.rollout import Rollout
from trl_llava.ppo.scoring import Scorer
from trl_llava.ppo.setup import warm_up_above_zero
from trl_llava.ppo.update import Updater
from trl_llava.reward_trainer import LlavaRewardTrainer
from trl_llava.rewards.reward_terms import correctness, length_term

META = golden_data.read("3_meta.json")
PPO = golden_data.tensors("3_ppo.safetensors")
ROLLOUT = golden_data.read("3_rollout.json")
LOOP = golden_data.read("3b_loop.json")
EOS, PAD = (golden_data.read("3_truncate.json")[name] for name in ("eos", "pad"))
KINDS = {"GENERAL": "general", "NO_IN_YESNO": "no", "YES_IN_YESNO": "yes"}
KINDS |= {f"{letter}_IN_ABCD": letter for letter in "ABCD"}
SCRIPT_CLIPRANGE, SCRIPT_VF_COEF = 0.2, 0.1


def close(found: torch.Tensor, wanted: Any) -> None:
    """Equal to 1e-5."""
    torch.testing.assert_close(found.detach().float(), torch.as_tensor(wanted).float(), atol=1e-5, rtol=1e-5)


def cases(prefix: str) -> list[str]:
    """Names of the cases `prefix.<name>` of 3_meta.json."""
    return [name.removeprefix(prefix) for name in META if name.startswith(prefix) and isinstance(META[name], dict)]


def ragged(width: int, count: int) -> torch.Tensor:
    """A mask of rows of 1 to `width` real tokens."""
    return torch.arange(width) < (1 + torch.arange(count) * 7 % width).unsqueeze(1)


def full(like: torch.Tensor) -> torch.Tensor:
    """A mask without padding."""
    return torch.ones_like(like, dtype=torch.bool)


# --- the reward model's loss ----------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Gives the rewards it was made of, chosen ones first."""

    def __init__(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        super().__init__()
        self.rewards = nn.Parameter(torch.cat((chosen, rejected)))

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rewards.unsqueeze(-1))


@pytest.mark.parametrize("case", golden_data.read("2_rm_loss.json")["cases"], ids=lambda case: case["name"])
def test_reward_model_loss(case: dict[str, Any]) -> None:
    rewards, choice = torch.tensor(case["rewards"]), torch.tensor(case["choice"])
    first, second = torch.tensor(case["index_0"]), torch.tensor(case["index_1"])
    # One entry per pair; a row of the set may hold several candidates and pairs.
    picked = torch.where(choice == 1, second, first), torch.where(choice == 1, first, second)
    rows = torch.arange(len(rewards)).unsqueeze(1).expand_as(choice)
    chosen, rejected = (rewards[rows.flatten(), index.flatten()] for index in picked)
    model = Logits(chosen, rejected)
    trainer = bare_trainer(model)
    inputs = {"input_ids": torch.zeros(2 * len(chosen), 3, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    loss = trainer.compute_loss(model, inputs)
    close(loss, case["loss"])
    loss.backward()
    gradient = torch.zeros_like(rewards)
    for index, part in zip(picked, model.rewards.grad.chunk(2), strict=True):
        gradient.index_put_((rows.flatten(), index.flatten()), part, accumulate=True)
    close(gradient, case["grad_rewards"])
    accuracy = trainer._metrics["train"]["accuracy"][-1]
    ties = (chosen == rejected).float().mean().item()
    # A tie: TRL counts it as wrong, the original as "output_1 was preferred".
    assert abs(accuracy - case["metrics"]["accuracy"]) <= ties + 1e-6
    assert trainer._metrics["train"]["mean_reward"][-1] == pytest.approx(case["metrics"]["average_score"], abs=1e-5)


def bare_trainer(model: nn.Module) -> LlavaRewardTrainer:
    """Our reward trainer with what its loss reads, and nothing else: no data, no checkpoint."""
    trainer = LlavaRewardTrainer.__new__(LlavaRewardTrainer)
    trainer._tp_size = 1  # TRL 1.16
    trainer.args = SimpleNamespace(reward_centering="paper", center_rewards_coefficient=None)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model, trainer._metrics = model.train(), {"train": defaultdict(list)}
    trainer.state, trainer._total_train_tokens = SimpleNamespace(num_input_tokens_seen=0), 0
    return trainer


# --- the score of a response ----------------------------------------------------------------------------------------


def scorer(raw: torch.Tensor, **settings: Any) -> Scorer:
    """Our scorer over a reward model that gives `raw`."""
    defaults = LlavaPPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    args = SimpleNamespace(**{**vars(defaults), **settings})

    def model(**columns: Any) -> list[float]:
        return raw.tolist()

    return Scorer(args, [model])


@pytest.mark.parametrize(
    "mode",
    [
        name
        for name, mode in golden_data.read("3_post_reward.json")["modes"].items()
        if "truncate_token_ids" not in mode["args"]
    ],
)
def test_stop_penalty(mode: str) -> None:
    golden = golden_data.read("3_post_reward.json")
    case, responses = golden["modes"][mode], golden["responses"]
    penalty = -case["args"]["penalty_reward_value"] if case["penalize_no_stop_token"] else None
    ours = scorer(
        torch.tensor(golden["rewards"]),
        missing_eos_penalty=penalty,
        missing_eos_replaces=not case["relative_stop_token_penalty"],
    )
    texts = [[{"role": "assistant", "content": "x"}] for _ in responses]
    scores, _ = ours(texts, responses, torch.tensor(golden["has_stop_token"]), {"prompts": texts}, 1)
    close(scores, case["rewards"])


def test_whole_words_instead_of_prefixes() -> None:
    texts = [row["text"] for row in ROLLOUT["rows"]]
    kinds = [KINDS[row["caption_type_name"]] for row in ROLLOUT["rows"]]
    found = correctness(texts, kinds, coef=1.0)
    original = ROLLOUT["configs"]["fact_script"]["correct_bonus"]
    compared = 0
    for text, kind, ours, theirs in zip(texts, kinds, found, original, strict=True):
        word = text.strip()
        if kind == "no" and word.startswith(("No", "Yes")) and _first_word(word) not in ("No", "Yes"):
            assert (ours, abs(theirs)) == (0.0, 0.5), text  # "Nothing" is no "No", "Yesterday" no "Yes"
        elif "?" not in text:  # which ends an answer there, see below
            assert ours == theirs, text
            compared += 1
    assert compared > len(texts) // 2


def _first_word(text: str) -> str:
    word = ""
    for character in text:
        if not character.isalpha():
            break
        word += character
    return word


def test_length_term() -> None:
    config = ROLLOUT["configs"]["fact_script"]
    responses = PPO["rollout.fact_script.responses"]
    ids = [[token for token in row.tolist() if token != PAD] for row in responses]  # what the original counts
    multipliers = [row["length_bonus_multiplier"] for row in ROLLOUT["rows"]]
    found = length_term(ids, response_length=ROLLOUT["response_len"], length_multiplier=multipliers, coef=1.0)
    close(torch.tensor(found), config["length_bonus"])


def test_a_question_mark_ends_no_answer() -> None:
    golden = golden_data.read("3_truncate.json")
    assert golden["additional_tokens"]
    cut = 0
    for name, case in golden["cases"].items():
        ids = torch.tensor([case["input"]])
        mask = ppo_math.response_mask(ids, golden["eos"])[0]
        kept = torch.where(mask, ids[0], torch.full_like(ids[0], golden["pad"]))
        assert kept.tolist() == case["without_additional"], name
        cut += case["with_additional"] != case["without_additional"]
    assert cut  # where the original, with its list of further tokens, ends answers that we do not


# --- rewards, advantages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("shape_reward."))
def test_shaping(case: str) -> None:
    args, given = META[f"shape_reward.{case}"], "shape_reward.in."
    logprobs, ref_logprobs = PPO[f"{given}logprobs"], PPO[f"{given}ref_logprobs"]
    estimator = args["kl_approximator"]
    kl = ppo_math.kl_per_token(logprobs, ref_logprobs, full(logprobs), estimator, clamp=estimator == "k1")
    close(kl, PPO[f"shape_reward.{case}.kl"])
    score = PPO[f"{given}rewards"] + args["length_bonus_score"] * PPO[f"{given}length_bonus"]
    score = score + args["correct_bonus_score"] * PPO[f"{given}correct_bonus"] + args["reward_bias"]
    close(ppo_math.shape_rewards(score, kl, full(kl), args["kl_coef"]), PPO[f"shape_reward.{case}.shaped_rewards"])
    close(-args["kl_coef"] * kl, PPO[f"shape_reward.{case}.non_score_rewards"])


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_shaping_of_padded_rows(estimator: str, clamp: bool) -> None:
    logprobs, ref_logprobs = PPO["shape_reward.in.logprobs"], PPO["shape_reward.in.ref_logprobs"]
    score, mask = PPO["shape_reward.in.rewards"], ragged(logprobs.shape[1], len(logprobs))
    wanted = torch.zeros_like(logprobs)
    for i, length in enumerate(mask.sum(1).tolist()):
        difference = logprobs[i, :length] - ref_logprobs[i, :length]
        kl = difference if estimator == "k1" else torch.exp(-difference) - 1 + difference
        wanted[i, :length] = -0.1 * (torch.clamp(kl, min=0) if clamp else kl)
        wanted[i, length - 1] += score[i]
    kl = ppo_math.kl_per_token(logprobs, ref_logprobs, mask, estimator, clamp=clamp)
    close(ppo_math.shape_rewards(score, kl, mask, 0.1, scale=10.0), 10 * wanted)


def whiten(values: torch.Tensor, mask: torch.Tensor, scope: str, shift_mean: bool = True) -> torch.Tensor:
    """The original's three scopes of whitening: all processes, one process, one row."""
    parts = [slice(None)] if scope != "none" else [slice(i, i + 1) for i in range(len(values))]
    return torch.cat(
        [ppo_math.masked_whiten(values[part], mask[part], shift_mean, variance="population") for part in parts]
    )


@pytest.mark.parametrize("scope", ["full_batch", "per_gpu", "none"])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(scope: str, shift_mean: bool) -> None:
    values = PPO["adv.in.shaped_rewards"]
    close(whiten(values, full(values), scope, shift_mean), PPO[f"whiten.{scope}.shift_mean_{shift_mean}.out"])


@pytest.mark.parametrize("variance", ["sample", "population"])
def test_whitening_over_all_processes_is_that_of_the_whole_batch(variance: str) -> None:
    values = PPO["adv.in.shaped_rewards"]
    mask = ragged(values.shape[1], len(values))
    real = values[mask]
    wanted = torch.zeros_like(values)
    wanted[mask] = (real - real.mean()) / (real.var(unbiased=variance == "sample") + 1e-8).sqrt()
    close(ppo_math.masked_whiten(values, mask, variance=variance), wanted)
    # Two processes: what one sums, it sums with what the other has.
    halves = [slice(0, len(values) // 3), slice(len(values) // 3, None)]
    mean = real.mean()
    for mine, other in (halves, halves[::-1]):
        theirs = iter(
            (mask[other].sum(), mask[other].sum(), values[other][mask[other]].sum(),
             ((values[other][mask[other]] - mean) ** 2).sum())
        )  # fmt: skip
        found = ppo_math.masked_whiten(
            values[mine], mask[mine], reduce=lambda total, theirs=theirs: total + next(theirs), variance=variance
        )
        close(found, wanted[mine])


@pytest.mark.parametrize("case", cases("adv."))
def test_advantages(case: str) -> None:
    args = META[f"adv.{case}"]
    rewards, values = PPO["adv.in.shaped_rewards"], PPO["adv.in.values"]
    mask = full(values)
    scope = args["whitening_async_stats"]
    rewards = whiten(rewards, mask, scope, shift_mean=False) if args["whiten_rewards"] else 10 * rewards
    advantages, returns = ppo_math.gae(rewards, values, mask, args["gamma"], args["lam"])
    close(returns, PPO[f"adv.{case}.returns"])
    close(whiten(advantages, mask, scope), PPO[f"adv.{case}.advantages"])


def test_advantages_of_padded_rows() -> None:
    rewards, values = PPO["adv.in.shaped_rewards"], PPO["adv.in.values"]
    mask, gamma, lam = ragged(values.shape[1], len(values)), 0.97, 0.9
    wanted = torch.zeros_like(values)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            for later in range(t, length):
                following = values[i, later + 1] if later + 1 < length else 0.0
                delta = rewards[i, later] + gamma * following - values[i, later]
                wanted[i, t] += (gamma * lam) ** (later - t) * delta
    advantages, returns = ppo_math.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(returns[mask], (wanted + values)[mask], atol=1e-4, rtol=1e-4)
    assert not returns[~mask].any()


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", cases("loss."))
def test_clipped_losses(case: str, padded: bool) -> None:
    args = META[f"loss.{case}"]["args"]
    given = {name.removeprefix("loss.in."): value for name, value in PPO.items() if name.startswith("loss.in.")}
    logprobs = given["new_logprobs"].clone().requires_grad_()
    values = given["new_values"].clone().requires_grad_()
    mask = ragged(logprobs.shape[1], len(logprobs)) if padded else full(logprobs)
    policy = ppo_math.policy_loss(logprobs, given["old_logprobs"], given["advantages"], mask, args["cliprange"])
    value = ppo_math.value_loss(values, given["old_values"], given["returns"], mask, args["cliprange_value"])
    policy_loss, value_loss = policy.losses.sum() / mask.sum(), value.losses.sum() / mask.sum()
    (policy_loss + args["vf_coef"] * value_loss).backward()
    if not padded:
        wanted = {name: PPO[f"loss.{case}.{name}"] for name in ("policy_loss", "grad_logprobs", "grad_values")}
        wanted["value_loss"] = PPO[f"loss.{case}.value_loss"] / args["vf_coef"]  # the original's holds the weight
        stats = META[f"loss.{case}"]["policy_stats"], META[f"loss.{case}"]["value_stats"]
        close(policy.clipped.float().mean(), stats[0]["policy/clipfrac"])
        close(value.clipped.float().mean(), stats[1]["val/clipfrac"])
        close(0.5 * (policy.log_ratio**2).mean(), stats[0]["policy/approxkl"])
    else:
        wanted = reference_losses(given, mask, args)
    close(policy_loss, wanted["policy_loss"])
    close(value_loss, wanted["value_loss"])
    close(logprobs.grad, wanted["grad_logprobs"])
    close(values.grad, wanted["grad_values"])


def reference_losses(given: dict[str, torch.Tensor], mask: torch.Tensor, args: dict[str, float]) -> dict[str, Any]:
    """The clipped losses, token by token over the real ones."""
    logprobs = given["new_logprobs"].clone().requires_grad_()
    values = given["new_values"].clone().requires_grad_()
    low, high, near = 1 - args["cliprange"], 1 + args["cliprange"], args["cliprange_value"]
    policy, value = [], []
    for i, t in mask.nonzero().tolist():
        ratio, advantage = (logprobs[i, t] - given["old_logprobs"][i, t]).exp(), given["advantages"][i, t]
        policy.append(torch.maximum(-ratio * advantage, -ratio.clamp(low, high) * advantage))
        old, target = given["old_values"][i, t], given["returns"][i, t]
        moved = torch.minimum(torch.maximum(values[i, t], old - near), old + near)
        value.append(0.5 * torch.maximum((values[i, t] - target) ** 2, (moved - target) ** 2))
    losses = {"policy_loss": torch.stack(policy).mean(), "value_loss": torch.stack(value).mean()}
    (losses["policy_loss"] + args["vf_coef"] * losses["value_loss"]).backward()
    return {**losses, "grad_logprobs": logprobs.grad, "grad_values": values.grad}


def test_logprobs_of_tokens() -> None:
    labels = PPO["compute_logprobs.labels"]
    wanted = PPO["compute_logprobs.out"]
    found = logprobs_of(PPO["compute_logprobs.logits"], labels.clamp(min=0))
    close(found * (wanted != 0), wanted)


# --- the update loop ------------------------------------------------------------------------------------------------


class LinearRoles(nn.Module):
    """The set's policy and value: each adds a linear function of features to what was at the rollout."""

    def __init__(self, start: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(start["w0"].clone()), nn.Parameter(start["u0"].clone())

    def forward(self, part: Rollout, sampling: Sampling, share_prefix: bool) -> tuple[torch.Tensor, ...]:
        features = part.inputs.image_tensors()
        logprobs, values = part.logprobs + features["F1"] @ self.w, part.values + features["F2"] @ self.u
        return logprobs, torch.zeros_like(logprobs), values


@pytest.mark.parametrize("case", LOOP)
def test_update_loop(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, given = LOOP[case], golden_data.tensors("3b_loop.safetensors")
    args, saved = golden["args"], {name.removeprefix(f"{case}."): value for name, value in given.items()}
    model = LinearRoles(saved)
    rows, per_device = args["rollout_batch_size"], args["step_per_device_batch_size"]
    settings = SimpleNamespace(
        seed=0, num_ppo_epochs=args["noptepochs"], num_mini_batches=rows // args["step_batch_size"],
        per_device_train_batch_size=per_device, max_grad_norm=args["max_grad_norm"], temperature=1.0,
        cliprange=SCRIPT_CLIPRANGE, cliprange_value=SCRIPT_CLIPRANGE, vf_coef=SCRIPT_VF_COEF,
        check_first_step=False, first_step_ratio_tolerance=0.0, max_tokens_per_micro_batch=None,
    )  # fmt: skip
    # The published scripts leave weight decay at 0, whatever AdamW's own default is.
    defaults = {name: golden["optimizer_defaults"][name] for name in ("betas", "eps")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=golden["lr"], weight_decay=0.0, **defaults)
    steps = record_steps(model, optimizer)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=golden["gradient_accumulation_steps"])
    orders = iter(epoch_orders(golden["calls"], rows))
    monkeypatch.setattr(ppo_update, "mini_batch_order", lambda *args: np.array(next(orders)))
    update = Updater(settings, accelerator, model, optimizer, Sampling())
    update.train_on(loop_rollout(given), 1, nothing_moved_yet=False)
    assert next(orders, None) is None
    assert len(steps) == golden["n_optimizer_steps"]
    for i, name in enumerate(("grad_w_clipped", "grad_u_clipped", "w_after", "u_after")):
        close(torch.stack([step[i] for step in steps]), saved[name])


def epoch_orders(calls: list[Any], rows: int) -> list[list[int]]:
    """The order in which the original's sampler drew the rows, epoch by epoch."""
    order = [row for role, part in calls if role == "policy" for row in part]
    assert [part for role, part in calls if role == "value"] == [part for role, part in calls if role == "policy"]
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def record_steps(model: LinearRoles, optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """Gradients as each optimizer step finds them, and parameters as it leaves them."""
    steps: list[list[torch.Tensor]] = []
    step = optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> None:
        gradients = [model.w.grad.clone(), model.u.grad.clone()]
        step(*args, **kwargs)
        steps.append([*gradients, model.w.detach().clone(), model.u.detach().clone()])

    optimizer.step = recorded  # type: ignore[method-assign]
    return steps


def loop_rollout(given: dict[str, torch.Tensor]) -> Rollout:
    """The set's rollout: full rows."""
    logprobs = given["old_logprobs"]
    nothing = torch.zeros(len(logprobs), 1, dtype=torch.long)
    # One "image" per row carries its features along.
    inputs = ModelInputs(nothing, nothing + 1, {"F1": list(given["F1"].split(1)), "F2": list(given["F2"].split(1))})
    return Rollout(
        inputs=inputs, value_inputs=inputs, columns={}, responses=torch.zeros_like(logprobs, dtype=torch.long),
        mask=full(logprobs), stopped=torch.ones(len(logprobs), dtype=torch.bool), logprobs=logprobs,
        ref_logprobs=logprobs, values=given["old_values"], advantages=given["advantages"], returns=given["returns"],
    )  # fmt: skip


def test_schedule() -> None:
    for golden in LOOP.values():
        if "lr_from_step6_of_40" not in golden:
            continue
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=golden["lr"])
        schedule = get_cosine_schedule_with_warmup(optimizer, 5, 40)
        warm_up_above_zero(schedule, 5)
        rates = []
        for _ in range(5 + len(golden["lr_from_step6_of_40"])):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates[5:] == pytest.approx(golden["lr_from_step6_of_40"], abs=1e-9)
        # The original's first step has rate 0, and throws a rollout away.
        assert rates[:5] == pytest.approx([golden["lr"] * step / 6 for step in (1, 2, 3, 4, 5)])


# --- a whole rollout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ROLLOUT["configs"])
def test_rollout(config: str) -> None:
    args, prefix = ROLLOUT["configs"][config]["args"], f"rollout.{config}."
    raw, responses = PPO["rollout.in.raw_rewards"], PPO[f"{prefix}responses"]
    out = {name.removeprefix(prefix): value for name, value in PPO.items() if name.startswith(prefix)}
    stopped = (responses == EOS).any(1)
    ours = scorer(
        raw,
        missing_eos_penalty=-args["penalty_reward_value"] if args["penalize_no_stop_token"] else None,
        missing_eos_replaces=not args["relative_stop_token_penalty"],
        length_coef=args["length_bonus_score"] or None,
        correctness_coef=None,
        response_length=args["response_len"],
        reward_bias=args["reward_bias"],
    )
    texts = [[{"role": "assistant", "content": text}] for text in ROLLOUT["configs"][config]["text_responses"]]
    ids = [[token for token in row.tolist() if token != PAD] for row in responses]
    columns = {"prompts": texts, "length_multiplier": [row["length_bonus_multiplier"] for row in ROLLOUT["rows"]]}
    scores, terms = ours(texts, ids, stopped, columns, 1)
    close(terms["model"] + terms.get("missing_eos", 0.0), out["rewards"])
    # The words that the original takes for others are another test's: its own number here.
    scores = scores + args["correct_bonus_score"] * out["correct_bonus"]
    mask = full(responses)
    kl = ppo_math.kl_per_token(
        out["logprobs"], out["ref_logprobs"], mask, args["kl_approximator"], clamp=args["kl_approximator"] == "k1"
    )
    close(kl, out["kl"])
    shaped = ppo_math.shape_rewards(scores, kl, mask, args["kl_coef"])
    close(shaped, out["shaped_rewards"])
    rewards = whiten(shaped, mask, args["whitening_async_stats"], False) if args["whiten_rewards"] else 10 * shaped
    # The original computes each of its rollout batches apart, and whitens over all of them.
    advantages, returns = ppo_math.gae(rewards, out["values"], mask, args["gamma"], args["lam"])
    torch.testing.assert_close(returns, out["returns"], atol=1e-4, rtol=1e-5)
    close(whiten(advantages, mask, args["whitening_async_stats"]), out["advantages"])


def test_the_score_is_on_the_last_real_token() -> None:
    responses = PPO["rollout.fact_script.responses"]
    mask = ppo_math.response_mask(responses, EOS) & (responses != PAD)
    score = torch.arange(1.0, len(responses) + 1)
    ours = ppo_math.shape_rewards(score, torch.zeros(responses.shape), mask, 0.1)
    assert [row.nonzero().item() for row in ours] == [length - 1 for length in mask.sum(1).tolist()]
    padded = responses[:, -1] == PAD
    assert padded.any()
    kl_part = PPO["rollout.fact_script.non_score_rewards"][padded, -1]
    assert (PPO["rollout.fact_script.shaped_rewards"][padded, -1] != kl_part).any()  # the original's is on a pad
