"""Rollouts in vLLM: TRL's real client against a loopback server, TRL's engine around a tiny one; no vLLM, no GPU."""

import base64
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_trainers import even_tokens, favour_the_stop_token, make_adapter, make_policy, ppo_trainer, prompt_rows
from tiny_vllm import TinyLLM, TinyServer, pretend_vllm
from transformers import AutoProcessor
from trl.generation import vllm_client

from trl_llava import train_ppo
from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.errors import InputError, MissingPackageError
from trl_llava.health import UnhealthyRunError
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.models.vision_tower import set_square_padding
from trl_llava.ppo.vllm_prompts import as_seen, one_token_each, place_images
from trl_llava.ppo.vllm_server import RolloutEngineError
from trl_llava.ppo_trainer import LlavaPPOTrainer

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_vllm(lambda *what: monkeypatch.setattr(*what, raising=False))


@pytest.fixture
def server(pretended: None, tiny_llava_dir: Path) -> Iterator[TinyServer]:
    with TinyServer(tiny_llava_dir) as served:
        yield served


def on_server(server: TinyServer, **changes: Any) -> dict[str, Any]:
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    return {**settings, "vllm_server_timeout": 1e-9, **changes}


def greedy(trainer: LlavaPPOTrainer, batch: dict[str, Any]) -> tuple[list, list]:
    """Greedy answers of vLLM, and of transformers with the same policy."""
    inputs = ModelInputs.from_batch(batch, trainer.accelerator.device)
    theirs = trainer.complete_greedily(batch).responses.tolist()
    with torch.no_grad(), trainer.gathered() as model:
        ours = trainer.generator.generate(model.policy, inputs, step=None).responses.tolist()
    return theirs, ours


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_vllm_answers_as_the_policy_does_before_and_after_updates(
    mode: str, server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    where = on_server(server) if mode == "server" else {"use_vllm": True}
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, learning_rate=0.1, **where)
    base = {k: v.clone() for k, v in trainer.policy_model.state_dict().items() if "lora" not in k}
    batch = next(iter(trainer._batches_from(0)))
    before, ours = greedy(trainer, batch)
    assert before == ours
    trainer.train()
    assert trainer.state.global_step == 2
    batch = next(iter(trainer._batches_from(0)))
    after, ours = greedy(trainer, batch)
    assert after == ours
    assert after != before
    state = trainer.policy_model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert logged[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in logged)
    engine = server.engine if mode == "server" else TinyLLM.made.engine
    # Before the first rollout, after each of two updates; colocated, each tensor is loaded on its own.
    assert engine.loads == 3 * (1 if mode == "server" else 64)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_images_are_encoded_anew_after_an_update(
    mode: str, server: TinyServer, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    """With a trained projector, features from before an update are another policy's."""
    where = on_server(server) if mode == "server" else {"use_vllm": True}
    adapter = make_adapter(tiny_llava_dir, tmp_path / "adapter", trained_whole=["multi_modal_projector"])
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path / "run", learning_rate=0.1, total_episodes=12, **where)
    trainer.train()
    theirs, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
    assert theirs == ours
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logged) < 1e-4


def test_a_second_run_on_the_same_server_has_its_own_images(
    server: TinyServer, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    for factor, whole in ((1, None), (2, ["multi_modal_projector"])):
        adapter = make_adapter(tiny_llava_dir, tmp_path / f"adapter{factor}", trained_whole=whole)
        trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path / f"run{factor}", **on_server(server))
        theirs, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
        assert theirs == ours


def test_what_is_said_to_the_server(server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path) -> None:
    changes = {"num_generations_per_prompt": 2, "total_episodes": 4, "temperature": 0.7, "seed": 5}
    changes["train_dataset"] = prompt_rows(3).select([0, 2])  # one with a picture, one without
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server), **changes)
    batch = next(iter(trainer._batches_from(0)))
    rollout = trainer.rollout(batch, 1)
    assert [path for path, _ in server.requests[:7]] == [
        *("/health", "/v1/models", "/version", "/v1/models", "/server_info"),
        *("/get_world_size", "/init_weight_transfer_engine"),
    ]
    assert server.bodies("/init_weight_transfer_engine") == [
        {
            "init_info": {
                "master_address": "127.0.0.1",
                "master_port": 51216,
                "rank_offset": 1,
                "world_size": 2,
            }
        }
    ]
    sync = ["/health", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    sync.append("/reset_encoder_cache")
    assert [path for path, _ in server.requests if path in sync][1:] == sync
    announced = server.bodies("/update_weights")[0]["update_info"]
    assert announced["packed"] is True
    assert (len(announced["names"]), len(set(announced["names"]))) == (64, 64)
    place = announced["names"].index(Q_PROJ)
    assert (announced["dtype_names"][place], announced["shapes"][place]) == ("float32", [32, 32])

    pictured = [bool(images) for images in batch["columns"]["images"]]
    assert sorted(pictured) == [False, True]
    (rendered,) = server.bodies("/v1/chat/completions/render")
    (part,) = rendered["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    (picture,) = batch["columns"]["images"][pictured.index(True)]
    assert (sent.mode, sent.tobytes()) == ("RGB", picture.tobytes())

    asked = {len(body["token_ids"]): body for body in server.bodies("/inference/v1/generate")}
    assert len(asked) == 2
    for row, has_picture in enumerate(pictured):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        body = asked[len(ids)]
        assert (body["token_ids"], body["model"]) == (ids, str(tiny_llava_dir))
        seed = body["sampling_params"].pop("seed")
        assert 0 <= seed < 2**48
        assert body["sampling_params"] == {
            "n": 2,
            "temperature": 0.7,
            "repetition_penalty": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 8,
            "logprobs": 0,
            "ignore_eos": True,
            "stop_token_ids": [2],
            "logit_bias": {"4": -100.0},
            "detokenize": False,
            "output_kind": 2,
        }
        if has_picture:
            assert body["features"]["mm_placeholders"] == {"image": [{"offset": ids.index(4), "length": 16}]}
        else:
            assert body["features"] is None
    assert len(rollout) == 4
    assert rollout.responses.shape == rollout.logprobs.shape


def seeds(server: TinyServer) -> list[int]:
    return sorted(body["sampling_params"]["seed"] for body in server.bodies("/inference/v1/generate"))


def test_draws_depend_on_seed_step_and_row(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server))
    batches = [next(iter(trainer._batches_from(0))) for _ in range(3)]
    found = []
    for batch, step in zip(batches, (1, 1, 2), strict=True):
        server.requests.clear()
        found.append((seeds_of := trainer.rollout(batch, step).responses.tolist(), seeds(server)))
        assert len(set(found[-1][1])) == len(seeds_of) == 4
    assert found[0] == found[1]
    assert not set(found[0][1]) & set(found[2][1])


def test_answers_of_mixed_length_keep_the_contract(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    policy = make_policy(tiny_llava_dir, adapter)
    favour_the_stop_token(policy)
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, model=policy, **on_server(server))
    rollout = trainer.rollout(next(iter(trainer._batches_from(0))), 1)
    lengths = rollout.mask.sum(1).tolist()
    assert min(lengths) < max(lengths) == rollout.responses.shape[1]
    for row, length in enumerate(lengths):
        assert (rollout.responses[row, length:] == 3).all()
        assert (
            rollout.stopped[row] == (2 in rollout.responses[row, :length]) == (rollout.responses[row, length - 1] == 2)
        )
        assert 4 not in rollout.responses[row]


def test_a_whole_policy_is_sent_too(server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_llava_dir, adapter)
    whole = policy.merge_and_unload()
    changes = {"model": whole, "ref_adapter_name": None, "check_first_step": False}
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server), **changes)
    theirs, ours = greedy(trainer, next(iter(trainer._batches_from(0))))
    assert theirs == ours
    sent, own = server.engine.weights[Q_PROJ], whole.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(sent, own)


def test_a_run_through_the_entry_point(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    prompt_rows().to_parquet(tmp_path / "rows.parquet")
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    processor.save_pretrained(adapter)
    words = [
        *("--sft_model_path", str(adapter), "--dataset_name", str(tmp_path / "rows.parquet"), "--use_cpu"),
        *("--reward_funcs", "tiny_trainers:even_tokens", "--value_init", "policy", "--response_length", "8"),
        *("--stop_token", "eos", "--total_episodes", "8", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--bf16", "false", "--report_to", "none", "--disable_tqdm"),
        *("--output_dir", str(tmp_path / "run"), "--num_sample_generations", "0", "--dtype", "float32"),
        *("--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url),
    ]
    trainer = train_ppo.main(words)
    assert trainer.state.global_step == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert len(server.bodies("/update_weights")) == 2
    assert len(server.bodies("/inference/v1/generate")) == 8
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    start = load_file(adapter / "adapter_model.safetensors")
    assert any(not torch.equal(saved[name], start[name]) for name in saved)


# --- faults -------------------------------------------------------------------------------------------------------


def test_without_vllm_it_says_what_to_install(tiny_llava_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError) as caught:
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, use_vllm=True)
    assert "pip install 'trl[vllm]'` (vllm" in str(caught.value)


def test_no_model_is_loaded_without_vllm(tmp_path: Path) -> None:
    words = ["--sft_model_path", "nowhere", "--output_dir", str(tmp_path / "run"), "--dataset_name", "nothing"]
    with pytest.raises(MissingPackageError, match="needs vLLM"):
        train_ppo.main([*words, "--use_cpu", "--bf16", "false", "--use_vllm", "true"])
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_not_there(server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(RolloutEngineError) as caught:
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server))
    command = f"""`VLLM_SERVER_DEV_MODE=1 vllm serve {tiny_llava_dir} --dtype float32 --weight-transfer-config """
    command += """'{"backend": "nccl"}' --logprobs-mode processed_logprobs --enable-scale-out`"""
    for part in (server.url, "vllm_server_timeout", command):
        assert part in str(caught.value)


def test_weights_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    """TRL's own refusal, in our words; everywhere else in this file it is passed by."""
    real = vllm_client.VLLMClient.init_communicator
    pretend_vllm(lambda *what: monkeypatch.setattr(*what, raising=False))
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", real)
    monkeypatch.setattr(vllm_client, "get_ip", lambda: "127.0.0.1", raising=False)
    with TinyServer(tiny_llava_dir) as served, pytest.raises(RolloutEngineError, match="cannot be sent to vLLM from"):
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(served))


def test_a_server_with_another_model(pretended: None, tiny_llava_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with (
        TinyServer(tiny_llava_dir, name="llava-hf/llava-1.5-13b-hf") as served,
        pytest.raises(RolloutEngineError, match=r"serves 'llava-hf/llava-1.5-13b-hf', but the policy is .*tiny_llava"),
    ):
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(served))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.25.1"}, r"runs vLLM 0\.25\.1, and PPO needs 0\.26 or newer there"),
        ({"missing": {"/server_info"}}, "started without VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/v1/chat/completions/render"}}, "needs `--enable-scale-out`"),
        ({"settings": {"weight_transfer_config": None}}, "started without `--weight-transfer-config`"),
        (
            {"settings": {"weight_transfer_config": {}, "model_config": {"dtype": "torch.bfloat16"}}},
            r"computes in bfloat16, but the policy in float32: .* Start it with `.*vllm serve .* --dtype float32 ",
        ),
    ],
)
def test_a_server_that_could_not_be_used_is_refused_before_the_run(
    change: dict[str, Any], message: str, server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(RolloutEngineError, match=message) as caught:
        ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server))
    assert "\n" not in str(caught.value)
    assert not server.bodies("/init_weight_transfer_engine")


def test_a_server_left_inside_an_update_is_not_asked_again_and_again(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    """As a run leaves it that was killed there; TRL's session would try for 46 s."""
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server))
    server.missing_with = 500
    server.missing = {"/start_weight_update"}
    with pytest.raises(RolloutEngineError, match="start the server again"):
        trainer.train()
    assert server.refusals == 1


def dropped(answer: dict[str, Any]) -> dict[str, Any]:
    raise ConnectionError


def twice(answer: dict[str, Any]) -> dict[str, Any]:
    return {"choices": answer["choices"] * 2}


def with_tokens(ids: list[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    content = [{"token": f"token_id:{token}", "logprob": -1.0, "top_logprobs": []} for token in ids]
    return lambda answer: {"choices": [{"token_ids": ids, "logprobs": {"content": content}}]}


def longer(answer: dict[str, Any]) -> dict[str, Any]:
    answer["features"]["mm_placeholders"]["image"][0]["length"] += 1
    return answer


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/inference/v1/generate", dropped, r"failed \(ConnectionError: .*checkpoints of this run are whole.*resume"),
        ("/update_weights", lambda answer: 1 / 0, r"failed \(Exception: Request failed: 400, .*ZeroDivisionError"),
        ("/inference/v1/generate", twice, "gave 2 completions of a prompt instead of 1"),
        ("/inference/v1/generate", with_tokens([7] * 7 + [600]), r"token id 600, .*\(0 to 599, without \[4\]\)"),
        ("/inference/v1/generate", with_tokens([4, 2]), "token id 4, which is no id"),
        ("/inference/v1/generate", with_tokens([7, 7]), "ends after 2 tokens, without the stop token 2"),
        ("/inference/v1/generate", with_tokens([7] * 9), r"another length than `response_length` \(8\)"),
        ("/v1/chat/completions/render", longer, "makes 17 image tokens of 1 images .*policy's processor makes 16"),
    ],
)
def test_a_server_that_fails(
    path: str, fault: Any, message: str, server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server))
    server.faults[path] = fault
    with pytest.raises((RolloutEngineError, InputError), match=message):
        trainer.train()


def test_a_server_that_dies_leaves_a_run_that_goes_on_as_if_nothing_had_been(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 12}
    whole = ppo_trainer(tiny_llava_dir, adapter, tmp_path / "whole", **saving, **on_server(server))
    whole.train()

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        reward.calls += 1
        if reward.calls == 2:
            server.close()
        return even_tokens(completion_ids)

    reward.calls = 0
    run = tmp_path / "run"
    died = ppo_trainer(tiny_llava_dir, adapter, run, reward_funcs=reward, **saving, **on_server(server))
    with pytest.raises(RolloutEngineError, match="start the server again"):
        died.train()
    assert sorted(folder.name for folder in run.iterdir() if folder.is_dir()) == ["checkpoint-1", "checkpoint-2"]
    with TinyServer(tiny_llava_dir) as again:
        resumed = ppo_trainer(tiny_llava_dir, adapter, run, **saving, **on_server(again))
        resumed.train(resume_from_checkpoint=True)
    expected = whole.policy_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy_model.state_dict().items())


def test_a_prompt_that_is_too_long_for_the_server(
    pretended: None, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    with TinyServer(tiny_llava_dir, max_model_len=20) as served:
        trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(served))
        with pytest.raises(RolloutEngineError, match="but vLLM allows 20: start the server with a larger"):
            trainer.train()


def test_a_server_with_other_weights_is_found_out(
    server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine, "load", lambda named: None)
    trainer = ppo_trainer(tiny_llava_dir, adapter, tmp_path, **on_server(server, vllm_logprob_tolerance=0.01))
    with pytest.raises(
        UnhealthyRunError, match=r"at step 1 vLLM's log-probabilities are .* \(vllm_logprob_tolerance\)"
    ):
        trainer.train()


# --- colocated ----------------------------------------------------------------------------------------------------


def test_what_is_said_to_a_colocated_engine(
    pretended: None, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    changes = {"vllm_enable_sleep_mode": True, "vllm_max_model_length": 512, "vllm_gpu_memory_utilization": 0.5}
    trainer = ppo_trainer(
        tiny_llava_dir, adapter, tmp_path, use_vllm=True, num_generations_per_prompt=2, total_episodes=4, **changes
    )
    llm = TinyLLM.made
    assert llm.calls[0] == (
        "LLM",
        {
            "model": str(tiny_llava_dir),
            "dtype": "float32",
            "tensor_parallel_size": 1,
            "gpu_memory_utilization": 0.5,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "enable_sleep_mode": True,
            "model_impl": "vllm",
            "distributed_executor_backend": "external_launcher",
            "seed": 0,
            "max_num_batched_tokens": 4096,
            "logprobs_mode": "processed_logprobs",
            "trust_remote_code": False,
        },
    )
    batch = next(iter(trainer._batches_from(0)))
    trainer.rollout(batch, 1)
    told = [call for call in llm.calls[1:] if call[0] != "load_weights"]
    assert told[:5] == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("reset_prefix_cache", None),
        ("reset_encoder_cache", None),
        ("wake_up", ["kv_cache"]),
    ]
    assert [name for name, _ in told[5:]] == ["generate", "sleep"]
    for row, (prompt, settings) in enumerate(told[5][1]):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        images = batch["columns"]["images"][row]
        assert prompt["prompt_token_ids"].count(4) == len(images)
        assert len(prompt["prompt_token_ids"]) == len(ids) - 15 * len(images)
        assert [image.tobytes() for image in prompt.get("multi_modal_data", {}).get("image", [])] == [
            image.tobytes() for image in images
        ]
        assert (settings["n"], settings["logprobs"], settings["max_tokens"]) == (2, 0, 8)
        assert settings["logit_bias"] == {4: -100.0}
    # What sleeps has lost its weights: they are sent again though nothing has moved.
    sent = len([call for call in llm.calls if call[0] == "load_weights"])
    trainer.rollout(next(iter(trainer._batches_from(0))), 1)
    assert len([call for call in llm.calls if call[0] == "load_weights"]) == 2 * sent == 128


# --- settings and prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_logprobs": False}, "`recompute_logprobs` must not be false"),
        ({"vllm_mode": "server", "vllm_tensor_parallel_size": 2}, "start the server with `--tensor-parallel-size`"),
        ({"vllm_mode": "server", "vllm_max_model_length": 99}, "start the server with `--max-model-len`"),
        ({"vllm_server_base_url": "http://here:1"}, "`vllm_mode` is 'colocate'"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "the first not above the second, found 4.0 and 3.0"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "must be above 0 or null"),
        ({"vllm_logprob_tolerance": 0.0}, "`vllm_logprob_tolerance` must be above 0 or null"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match=message):
        LlavaPPOConfig(**given, use_vllm=True, **settings)


def test_a_correction_for_vllm_needs_vllm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs `use_vllm`"):
        LlavaPPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, vllm_importance_sampling_correction=True)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_policy_losses_are_weighed_by_the_policys_probability_over_vllms(
    mode: str, server: TinyServer, tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    """vLLM's log-probabilities are shifted by .1 at each token; the gradient grows by the weight."""

    def shifted(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            for entry in choice["logprobs"]["content"]:
                entry["logprob"] -= 0.1
        return answer

    server.faults["/inference/v1/generate"] = shifted
    norms, means = [], []
    for correction in (False, True):
        trainer = ppo_trainer(
            tiny_llava_dir,
            adapter,
            tmp_path / str(correction),
            total_episodes=4,
            vf_coef=0.0,
            vllm_importance_sampling_correction=correction,
            vllm_importance_sampling_mode=mode,
            **on_server(server),
        )
        trainer.train()
        (logged,) = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
        norms.append(logged["grad_norm"])
        means.append(logged.get("sampling/importance_sampling_ratio/mean"))
    expected = math.exp(0.1 if mode == "token_truncate" else 0.8)  # no completion of 8 tokens has ended earlier
    assert means == [None, pytest.approx(expected, rel=1e-3)]
    assert norms[1] == pytest.approx(expected * norms[0], rel=1e-3)


def test_names_and_defaults_are_grpos() -> None:
    from dataclasses import fields

    from trl import GRPOConfig

    from trl_llava.configs.vllm import VLLMOptions

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    ours = {field.name: field.default for field in fields(VLLMOptions)}
    assert ours.pop("vllm_logprob_tolerance") == 0.2  # the one of our own
    assert ours.pop("vllm_importance_sampling_correction") is False  # GRPO's is on
    assert ours == {name: theirs[name] for name in ours}


def test_pictures_side_by_side_are_told_apart_where_their_lengths_are_known() -> None:
    assert place_images([1, 9, 9, 9, 9, 2], 9, [1, 3]) == [{"offset": 1, "length": 1}, {"offset": 2, "length": 3}]
    for lengths in ([1, 2], [5], [2, 3], []):
        with pytest.raises(InputError, match=r"policy's processor makes 4"):
            place_images([1, 9, 9, 9, 9, 2], 9, lengths)
    with pytest.raises(InputError, match="policy's processor makes 4"):
        place_images([1, 9, 9, 5, 9, 9, 2], 9, [4])


def test_pictures_side_by_side_cannot_be_collapsed() -> None:
    with pytest.raises(InputError, match="shows 2 images in 1 places"):
        one_token_each([1, 9, 9, 9, 9, 2], 9, 2)
    assert one_token_each([1, 5, 5, 2], None, 0) == [1, 5, 5, 2]


def test_a_server_that_crops_sees_what_the_policy_pads(tiny_llava_dir: Path) -> None:
    image = Image.linear_gradient("L").resize((60, 30)).convert("RGB")
    padding, cropping = (AutoProcessor.from_pretrained(tiny_llava_dir) for _ in range(2))
    set_square_padding(padding, True)
    assert as_seen(image, cropping) is image
    seen = cropping.image_processor([as_seen(image, padding)], return_tensors="pt")["pixel_values"]
    expected = padding.image_processor([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, expected)
    assert not torch.equal(expected, cropping.image_processor([image], return_tensors="pt")["pixel_values"])
