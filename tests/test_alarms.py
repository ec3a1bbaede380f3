"""Alarms: the formulae by literal numbers, and runs that cross them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import test_beyond_ppo
from tiny_trainers import favour_the_stop_token, make_adapter, ppo_trainer

from trl_llava import train_grpo
from trl_llava.configs.grpo import LlavaGRPOConfig
from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.health import UnhealthyRunError
from trl_llava.publish.model_card import CardFacts, write_model_card
from trl_llava.run.alarms import crossed, empty_alarm, held_out_alarm, kl_alarm, length_alarm, read_alarms

FIVE = [4.0] * 5


def said(folder: Path) -> list[tuple[int, str]]:
    return [(alarm["step"], alarm["alarm"]) for alarm in read_alarms(folder)]


@pytest.mark.parametrize(
    ("lengths", "crosses"),
    [
        ([12.0, *FIVE], False),  # exactly three times shorter
        ([12.1, *FIVE], True),
        ([12.1, *FIVE[1:]], False),  # not yet five after the first
        ([100.0, *[1.0] * 5, 100.0, 100.0, 100.0, 100.0, 100.0], False),  # it has come back
        ([1.3, *FIVE], True),
        ([1.4, *FIVE], False),
        ([12.1, 4.0, 4.0, 4.0, 4.0, 8.0], False),  # one long step among them
    ],
)
def test_length(lengths: list[float], crosses: bool):
    assert (length_alarm(lengths, 3.0) is not None) == crosses


def test_share_of_empty_completions():
    assert empty_alarm([0.0, 0.0, 0.0, 0.0, 0.5], 0.1) is None  # 10 % on average
    assert empty_alarm([0.2, 0.2, 0.2, 0.2], 0.1) is None  # four steps
    assert "12.0% of the completions" in (empty_alarm([0.9, 0.0, 0.0, 0.0, 0.0, 0.6], 0.1) or "")
    assert empty_alarm([0.01] * 5, 0.0) is not None


def test_kl():
    assert kl_alarm([10.0] * 5, 10.0) is None
    assert kl_alarm([99.0, 99.0, 99.0, 99.0], 10.0) is None  # four steps
    assert "is 12.00 nats" in (kl_alarm([99.0, 0.0, 0.0, 10.0, 20.0, 30.0], 11.9) or "")


@pytest.mark.parametrize(
    ("held_out", "rewards", "crosses"),
    [
        # The spread of (3, 4) is sqrt((9 + 16) / 2) = 3.5355.
        ([(4.7, 3.0), (1.2, 4.0)], [0, 0, 0, 0, 0, 1], False),
        ([(4.7, 3.0), (1.1, 4.0)], [0, 0, 0, 0, 0, 1], True),
        ([(4.7, 3.0), (1.1, 4.0)], [1, 0, 0, 0, 0, 1], False),  # the reward has not risen
        ([(4.7, 3.0), (1.1, 4.0)], [0, 0, 0, 0, 1], False),  # too few steps
        ([(4.7, 3.0), (-9.0, 1.0), (4.6, 3.0)], [0, 0, 0, 0, 0, 1], False),  # it has come back
        ([(1.1, 4.0)], [0, 0, 0, 0, 0, 1], False),  # no first one to compare with
        ([(1.0, 0.0), (0.9, 0.0)], [0, 0, 0, 0, 0, 1], True),  # all scored alike, and all fell
    ],
)
def test_held_out_score(held_out: list[tuple[float, float]], rewards: list[float], crosses: bool):
    assert (held_out_alarm(held_out, rewards, 1.0) is not None) == crosses


NAMES = {
    "ppo": {"reward": "objective/scores", "kl": "objective/kl", "held_out": "eval_objective/scores"},
    "trl": {"reward": "reward", "kl": "kl", "held_out": "eval_reward"},
}


def log(stage: str, held_out: float = 1.0, **last: float) -> list[dict[str, Any]]:
    """Six steps that cross nothing, and five with other numbers, between two evaluations."""
    names = {"mean_length": "completions/mean_length", "empty_ratio": "completions/empty_ratio", **NAMES[stage]}
    first = {"reward": 1.0, "kl": 2.0, "mean_length": 9.0, "empty_ratio": 0.0}
    steps = [{names[key]: value for key, value in step.items()} for step in [first] * 6 + [{**first, **last}] * 5]
    evaluated = [{names["held_out"]: mean, f"{names['held_out']}_std": 0.5} for mean in (1.0, held_out)]
    return [evaluated[0], *steps, {**evaluated[1], "eval_completions/mean_length": 999.0}, {"train_runtime": 1.0}]


@pytest.mark.parametrize("stage", ["ppo", "trl"])
def test_a_log_is_read_by_the_names_of_its_trainer(stage: str, tmp_path: Path):
    bounds = LlavaPPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", alarm_kl=5.0)
    assert crossed(log(stage), bounds) == {}
    assert list(crossed(log(stage, mean_length=1.0), bounds)) == ["length"]
    assert list(crossed(log(stage, empty_ratio=0.2), bounds)) == ["empty"]
    assert list(crossed(log(stage, kl=9.0), bounds)) == ["kl"]
    assert list(crossed(log(stage, held_out=-1.0, reward=2.0), bounds)) == ["held_out"]
    odd = [{"reward": None, "kl": float("nan"), "objective/kl": float("nan"), "completions/mean_length": float("nan")}]
    assert crossed([*log(stage), *odd], bounds) == {}
    off = {"alarm_length": None, "alarm_empty": None, "alarm_held_out": None, "alarm_kl": None}
    none = LlavaPPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **off)
    assert crossed(log(stage, mean_length=1.0, empty_ratio=1.0, kl=99.0, held_out=-9.0, reward=2.0), none) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alarm_length": 1.0}, "`alarm_length` is a factor above 1, found 1.0"),
        ({"alarm_empty": 10}, "`alarm_empty` is a share from 0 to below 1, found 10"),
        ({"alarm_held_out": 0}, "`alarm_held_out`"),
        ({"alarm_kl": -1}, "`alarm_kl`"),
        ({"alarm_held_out": float("nan")}, "`alarm_held_out` must be above 0, found nan"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(fields: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        LlavaPPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **fields)


def test_a_bound_for_a_kl_that_nothing_computes_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="`alarm_kl` needs the KL, which is not computed with `beta: 0`"):
        LlavaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.0, alarm_kl=1.0)


# --- runs ----------------------------------------------------------------------------------------------------------


def shorter(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that pays for saying nothing."""
    return [-float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def adapter_dir(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


def shrinking(base: Path, adapter: Path, folder: Path, **changes: Any) -> Any:
    """A run whose completions shrink from some tokens to the stop token within ten steps."""
    trainer = ppo_trainer(
        base, adapter, folder, reward_funcs=shorter, kl_coef=0.0, response_length=24, num_ppo_epochs=4,
        learning_rate=5e-2, per_device_train_batch_size=4, total_episodes=80, alarm_length=2.0, **changes,
    )  # fmt: skip
    favour_the_stop_token(trainer.policy_model)
    return trainer


def test_a_run_whose_completions_shrink_says_so_once(tiny_llava_dir, adapter_dir, tmp_path, caplog):
    trainer = shrinking(tiny_llava_dir, adapter_dir, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history]
    assert lengths[0] > 2 * lengths[-1]
    alarms = read_alarms(tmp_path)
    assert sorted(alarm["alarm"] for alarm in alarms) == ["empty", "length"]  # an empty one is the shortest
    logged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("alarm")]
    assert logged == [f"alarm after step {alarm['step']}: {alarm['message']}." for alarm in alarms]
    step = alarms[0]["step"]
    before = (tmp_path / "alarms.json").read_text()
    caplog.clear()
    resumed = shrinking(tiny_llava_dir, adapter_dir, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step - 1}"))
    assert (tmp_path / "alarms.json").read_text() == before
    assert not [record for record in caplog.records if record.getMessage().startswith("alarm")]
    facts = CardFacts("ppo", str(tiny_llava_dir), {}, [], 0)
    write_model_card(tmp_path, facts, trainer.state.log_history, None)
    lines = "\n".join(f"- After step {alarm['step']}: {alarm['message']}." for alarm in alarms)
    assert f"## Alarms\n\nSaid while the model was trained:\n\n{lines}\n" in (tmp_path / "README.md").read_text()


def test_stop_on_alarm_saves_and_ends_the_run_which_resumes_past_it(tiny_llava_dir, adapter_dir, tmp_path):
    stops = {"stop_on_alarm": True, "alarm_empty": None, "save_only_model": True}
    trainer = shrinking(tiny_llava_dir, adapter_dir, tmp_path, **stops)
    with pytest.raises(
        UnhealthyRunError, match=r"alarm_length.*`stop_on_alarm` has ended the run after step (\d+) of 10"
    ):
        trainer.train()
    ((step, name),) = said(tmp_path)
    assert name == "length" and step < 10
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert (tmp_path / f"checkpoint-{step}" / "optimizer.pt").is_file()
    resumed = shrinking(tiny_llava_dir, adapter_dir, tmp_path, **stops)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10 and said(tmp_path) == [(step, "length")]


world = test_beyond_ppo.world


def test_grpo_stops_too(world: test_beyond_ppo.World, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    words = world.words("prompts", "alarmed", *test_beyond_ppo.LORA, *test_beyond_ppo.SHORT)
    words += ["--reward_funcs", "test_beyond_ppo:noted", "--max_steps", "7", "--beta", "0.1"]
    # A bound that the first five steps cross, whatever is learnt in them.
    words += ["--alarm_empty", "null", "--alarm_length", "null", "--alarm_kl", "1e-30", "--stop_on_alarm", "true"]
    with pytest.raises(
        UnhealthyRunError, match=r"(?s)alarm_kl.*ended the run after step 5 of 7.*resume_from_checkpoint"
    ):
        train_grpo.main(words)
    assert said(world.folder / "alarmed") == [(5, "kl")]
    assert (world.folder / "alarmed" / "checkpoint-5" / "trainer_state.json").is_file()
    history = json.loads((world.folder / "alarmed/checkpoint-5/trainer_state.json").read_text())["log_history"]
    assert all(0 <= entry["completions/empty_ratio"] <= 1 for entry in history)
    train_grpo.main([*words, "--resume_from_checkpoint", "true"])
    assert (world.folder / "alarmed" / "trainer_state.json").is_file()
