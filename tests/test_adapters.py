"""LoRA targets, adapters that must fit, and switching roles without touching what is trainable."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.adapter_switching import active_adapter
from trl_llava.models.adapters import load_adapter, lora_config
from trl_llava.models.load import load_policy, load_sequence_classifier

IDS = torch.tensor([[1, 300, 301, 302, 2]])
ALL_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def args_for(folder: Path, **fields: object) -> LlavaModelConfig:
    return LlavaModelConfig(model_name_or_path=str(folder), use_peft=True, lora_r=4, lora_dropout=0.0, **fields)


def policy(folder: Path) -> PreTrainedModel:
    return load_policy(args_for(folder))


def classifier(folder: Path, seed: int = 0) -> PreTrainedModel:
    return load_sequence_classifier(str(folder), args_for(folder), seed=seed)


def randomise(model: PeftModel, adapter: str, seed: int) -> None:
    """Give an adapter weights that compute something; a fresh one is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.normal_(std=0.1, generator=generator)


def with_two_adapters(folder: Path, build: Callable[[Path], PreTrainedModel] = classifier) -> PeftModel:
    base = build(folder)
    config = lora_config(args_for(folder), base, task="SEQ_CLS" if build is classifier else "CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="policy")
    model.add_adapter("value", config)
    model.set_requires_grad(["policy", "value"])
    randomise(model, "policy", 1)
    randomise(model, "value", 2)
    return model.eval()


# ------------------------------------------------------------------------------------------------ where LoRA goes


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("build", [policy, classifier])
def test_default_targets_are_the_language_models_linears(
    family: str, build: Callable[[Path], PreTrainedModel], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_dir")
    base = build(folder)
    task = "CAUSAL_LM" if build is policy else "SEQ_CLS"
    model = get_peft_model(base, lora_config(args_for(folder), base, task=task))
    touched = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert len(touched) == 14  # 7 in each of 2 layers
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in touched)
    assert {name.split(".")[-1] for name in touched} == ALL_LINEARS


def test_default_targets_of_a_text_only_llama(tiny_llama_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = lora_config(args_for(tiny_llama_dir), base, task="CAUSAL_LM")
    matched = [name for name, _ in base.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(matched) == 14
    assert "lm_head" not in matched


@pytest.mark.parametrize("wanted", [["q_proj", "v_proj"], ["q_proj"], "q_proj"])
def test_names_mean_layers_of_the_language_model(wanted: list[str] | str, tiny_llava_dir: Path) -> None:
    base = policy(tiny_llava_dir)
    config = lora_config(args_for(tiny_llava_dir, lora_target_modules=wanted), base, task="CAUSAL_LM")
    matched = [name for name, _ in base.named_modules() if re.fullmatch(config.target_modules, name)]
    assert len(matched) == 2 * (2 if len(wanted) == 2 else 1)
    assert all("language_model" in name for name in matched)


def test_targets_in_a_frozen_tower_or_nowhere_are_refused(tiny_llava_dir: Path) -> None:
    base = policy(tiny_llava_dir)
    args = args_for(tiny_llava_dir, lora_target_modules=[r".*\.q_proj"])
    with pytest.raises(ValueError, match=r"matches 2 modules of frozen parts, e.g. model.vision_tower"):
        lora_config(args, base, task="CAUSAL_LM")
    args.freeze_vision_tower = False
    assert lora_config(args, base, task="CAUSAL_LM").target_modules == r".*\.q_proj"
    with pytest.raises(ValueError, match="matches nothing"):
        lora_config(args_for(tiny_llava_dir, lora_target_modules=["c_attn"]), base, task="CAUSAL_LM")


@pytest.mark.parametrize(
    ("field", "names", "problem"),
    [
        ("lora_target_modules", ["q_proj", "vproj"], "the model has no 'vproj'; did you mean `v_proj`?"),
        ("lora_modules_to_save", ["lm_heads"], "the model has no 'lm_heads'; did you mean `lm_head`?"),
        ("lora_target_parameters", ["mlp.experts.gate_up_proj"], "the model has no 'mlp.experts.gate_up_proj'."),
    ],
)
def test_a_name_that_the_model_has_not_is_not_left_out(
    tiny_llava_dir: Path, field: str, names: list[str], problem: str
) -> None:
    with pytest.raises(InputError, match=re.escape(f"`{field}`: {problem}")):
        lora_config(args_for(tiny_llava_dir, **{field: names}), policy(tiny_llava_dir), task="CAUSAL_LM")


def test_what_is_trained_whole_beside_the_adapter(tiny_llava_dir: Path) -> None:
    base = classifier(tiny_llava_dir)
    assert lora_config(args_for(tiny_llava_dir), base, task="SEQ_CLS").modules_to_save == ["score"]
    assert lora_config(args_for(tiny_llava_dir), base, task="CAUSAL_LM").modules_to_save is None
    args = args_for(tiny_llava_dir, freeze_projector=False)
    assert lora_config(args, base, task="SEQ_CLS").modules_to_save == ["multi_modal_projector", "score"]
    assert lora_config(LlavaModelConfig(), base, task="SEQ_CLS") is None


# ---------------------------------------------------------------------------------------------- which one computes


def test_switching_changes_what_is_computed_and_nothing_that_is_trainable(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    plain = classifier(tiny_llava_dir).eval()(input_ids=IDS).logits.item()
    trainable = [p.requires_grad for p in model.parameters()]
    scores = {}
    for name in ("policy", "value", None, "policy"):
        with active_adapter(model, name) as inside:
            assert inside is model
            assert [p.requires_grad for p in model.parameters()] == trainable
            found = model(input_ids=IDS).logits.item()
        assert [p.requires_grad for p in model.parameters()] == trainable
        assert scores.setdefault(name, found) == found
    assert len({round(score, 4) for score in scores.values()}) == 3
    assert scores[None] == plain  # LoRA and head both off
    assert model.active_adapter == "policy"
    assert model(input_ids=IDS).logits.item() == scores["policy"]


def test_switching_equals_pefts_own_switch(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    with active_adapter(model, "value"):
        ours = model(input_ids=IDS).logits.item()
        assert model.active_adapter == model.base_model.active_adapter == "value"
    model.set_adapter("value")
    assert model(input_ids=IDS).logits.item() == ours


def test_blocks_nest_and_an_exception_restores(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    before = model(input_ids=IDS).logits.item()
    with pytest.raises(KeyError, match="inside"), active_adapter(model, "value"):
        value = model(input_ids=IDS).logits.item()
        with active_adapter(model, None):
            assert model(input_ids=IDS).logits.item() != value
        assert model(input_ids=IDS).logits.item() == value
        raise KeyError("inside")
    assert model(input_ids=IDS).logits.item() == before
    assert model.active_adapter == "policy"


def test_unknown_and_merged_adapters_are_refused(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    with pytest.raises(ValueError, match=r"no adapter 'reward' in this model; it has \['policy', 'value'\]"):
        active_adapter(model, "reward").__enter__()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['policy'\] is merged into the base weights"):
        active_adapter(model, "value").__enter__()


def gradients(model: PeftModel, losses: list[tuple[str, float]]) -> dict[str, torch.Tensor]:
    """The gradients of one joint backward pass over several roles' losses."""
    model.zero_grad()
    total = torch.zeros(())
    for name, weight in losses:
        with active_adapter(model, name):
            total = total + weight * model(input_ids=IDS).logits.square().sum()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_joint_backward_gives_each_role_the_gradient_it_has_alone(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    joint = gradients(model, [("policy", 1.0), ("value", 0.3)])
    alone = gradients(model, [("policy", 1.0)])
    value = gradients(model, [("value", 0.3)])
    assert not alone.keys() & value.keys()
    assert joint.keys() == alone.keys() | value.keys()
    assert len(alone) == len(value) == 2 * 14 + 2  # A and B of each layer, weight and bias of the head
    for name, grad in {**alone, **value}.items():
        torch.testing.assert_close(joint[name], grad, msg=name)
        assert grad.abs().max() > 0, name


def test_shared_base_gives_the_gradients_of_separate_copies_under_checkpointing(tiny_llava_dir: Path) -> None:
    model = with_two_adapters(tiny_llava_dir)
    expected = gradients(model, [("value", 0.3)])
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.zero_grad()
    with active_adapter(model, "value"):  # backward inside: the recomputation needs the role
        (0.3 * model(input_ids=IDS).logits.square().sum()).backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, msg=name)


def test_roles_switch_on_a_4_bit_base(tiny_llava_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    args = args_for(tiny_llava_dir, load_in_4bit=True, dtype="bfloat16")
    model = with_two_adapters(tiny_llava_dir, lambda folder: load_policy(args))
    outputs = {}
    for name in ("policy", "value", None):
        with torch.no_grad(), active_adapter(model, name):
            outputs[name] = model(input_ids=IDS).logits
    assert not torch.equal(outputs["policy"], outputs["value"])
    assert torch.equal(outputs[None], load_policy(args)(input_ids=IDS).logits)
    joint = gradients(model, [("policy", 1.0), ("value", 0.5)])
    alone = gradients(model, [("policy", 1.0)])
    assert len(alone) == 2 * 14
    assert len(joint) == 2 * 2 * 14
    assert all(torch.equal(joint[name], grad) for name, grad in alone.items())


# ------------------------------------------------------------------------------------------- adapters that must fit


def saved(folder: Path, out: Path, task: str, seed: int = 1) -> PeftModel:
    base = classifier(folder) if task == "SEQ_CLS" else policy(folder)
    model = get_peft_model(base, lora_config(args_for(folder), base, task=task))
    randomise(model, "default", seed)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_loaded_adapter_computes_what_was_saved(task: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = saved(tiny_llava_dir, tmp_path, task)
    base = classifier(tiny_llava_dir, seed=9) if task == "SEQ_CLS" else policy(tiny_llava_dir)
    loaded = load_adapter(base, str(tmp_path), is_trainable=True)
    assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in trained.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 14 + (2 if task == "SEQ_CLS" else 0)
    frozen = load_adapter(policy(tiny_llava_dir) if task == "CAUSAL_LM" else classifier(tiny_llava_dir), str(tmp_path),
                          is_trainable=False)  # fmt: skip
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapter_with_the_hubs_old_module_names_loads(task: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    trained = saved(tiny_llava_dir, tmp_path, task)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = {key.replace("model.model.language_model.", "model.language_model.model."): weights[key] for key in weights}
    assert len(old.keys() - weights.keys()) == 2 * 14
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = classifier(tiny_llava_dir, seed=9) if task == "SEQ_CLS" else policy(tiny_llava_dir)
    loaded = load_adapter(base, str(tmp_path), is_trainable=False)
    assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)


def test_second_adapter_leaves_the_first_as_it_is(tiny_llava_dir: Path, tmp_path: Path) -> None:
    saved(tiny_llava_dir, tmp_path / "a", "SEQ_CLS", seed=1)
    other = saved(tiny_llava_dir, tmp_path / "b", "SEQ_CLS", seed=2)
    model = load_adapter(classifier(tiny_llava_dir), str(tmp_path / "a"), adapter_name="policy", is_trainable=True)
    model.train()
    score = model(input_ids=IDS).logits.item()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    again = load_adapter(model, str(tmp_path / "b"), adapter_name="reward", is_trainable=False)
    assert again is model
    assert model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert model(input_ids=IDS).logits.item() == score
    with active_adapter(model, "reward"):
        assert model(input_ids=IDS).logits.item() == other(input_ids=IDS).logits.item()


def test_adapter_for_another_base_names_both(tiny_llava_dir: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2)).save_pretrained(
        tmp_path / "llama"
    )
    with pytest.raises(ValueError) as caught:
        load_adapter(policy(tiny_llava_dir), str(tmp_path / "llama"), is_trainable=False)
    for part in (f"adapter '{tmp_path / 'llama'}'", str(tiny_llava_dir), str(tiny_llama_dir), "does not fit"):
        assert part in str(caught.value)

    saved(tiny_llava_dir, tmp_path / "llava", "CAUSAL_LM")
    weights = load_file(tmp_path / "llava" / "adapter_model.safetensors")
    wider = {key: torch.zeros(2 * value.shape[0], 2 * value.shape[1]) for key, value in weights.items()}
    save_file(wider, tmp_path / "llava" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit model.*size mismatch"):
        load_adapter(policy(tiny_llava_dir), str(tmp_path / "llava"), is_trainable=False)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_and_left_over_weights_are_errors(change: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    saved(tiny_llava_dir, tmp_path, "CAUSAL_LM")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(weights))
    value = weights[key].clone()
    if change == "missing":
        del weights[key]
    else:
        weights[key.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = value
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit model.*First of 1 problems: {change} "):
        load_adapter(policy(tiny_llava_dir), str(tmp_path), is_trainable=False)


def test_heads_must_be_on_both_sides_or_on_none(tiny_llava_dir: Path, tmp_path: Path) -> None:
    saved(tiny_llava_dir, tmp_path / "sft", "CAUSAL_LM")
    saved(tiny_llava_dir, tmp_path / "reward", "SEQ_CLS")
    with pytest.raises(ValueError, match="has no score head"):
        load_adapter(classifier(tiny_llava_dir), str(tmp_path / "sft"), is_trainable=False)
    with pytest.raises(ValueError, match="is a reward model's"):
        load_adapter(policy(tiny_llava_dir), str(tmp_path / "reward"), is_trainable=False)
    weights = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    headless = {key: value for key, value in weights.items() if "score" not in key}
    assert len(weights) == len(headless) + 2
    save_file(headless, tmp_path / "reward" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no score head"):
        load_adapter(classifier(tiny_llava_dir), str(tmp_path / "reward"), is_trainable=False)


def test_a_whole_model_named_as_an_adapter_is_an_error(tiny_llava_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"is no adapter: it has no adapter_config\.json"):
        load_adapter(policy(tiny_llava_dir), str(tiny_llava_dir), is_trainable=False)


def test_adapter_that_does_not_exist_is_named(tiny_llava_dir: Path) -> None:
    with pytest.raises(OSError, match="adapter: cannot load 'nobody/no-such-adapter'"):
        load_adapter(policy(tiny_llava_dir), "nobody/no-such-adapter", is_trainable=False)
