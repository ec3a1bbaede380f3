"""Four roles on one base compute, and learn, what four copies do."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError
from trl_llava.models.adapter_role import AdapterRole, computing, in_eval_mode
from trl_llava.models.adapter_switching import active_adapter, checkpoint_contexts
from trl_llava.models.adapters import load_adapter
from trl_llava.models.load import load_policy, load_sequence_classifier
from trl_llava.models.shared_base import SharedBase, add_role, find_shared_base
from trl_llava.models.starts import load_score_model, zero_head

TARGETS = r".*language_model\..*\.(q_proj|v_proj|down_proj)"
IDS = torch.tensor([[5, 17, 301, 44, 9, 250, 7, 12], [8, 3, 99, 41, 100, 31, 6, 60]])
ROLES = ("policy", "reference", "value", "reward")
QUANTISED = {8: {"load_in_8bit": True, "dtype": "bfloat16"}, 4: {"load_in_4bit": True, "dtype": "bfloat16"}}
BITS = [32, pytest.param(8, id="int8"), pytest.param(4, id="nf4")]


def args_for(folder: Path, **changes: Any) -> LlavaModelConfig:
    return LlavaModelConfig(model_name_or_path=str(folder), **{"dtype": "float32", **changes})


def save_adapters(folder: Path, out: Path, dropout: float = 0.0, **changes: Any) -> dict[str, Path]:
    """An adapter of its own for each role, those of value and reward with a head."""
    args, folders = args_for(folder), {}
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        scores = role in ("value", "reward")
        model = load_sequence_classifier(str(folder), args, seed=seed) if scores else load_policy(args)
        config = LoraConfig(
            r=4,
            target_modules=TARGETS,
            lora_dropout=dropout,
            init_lora_weights=False,
            task_type="SEQ_CLS" if scores else "CAUSAL_LM",
            modules_to_save=[*(["score"] if scores else []), *changes.get(role, [])] or None,
        )
        model = get_peft_model(model, config)
        with torch.no_grad():  # PEFT copies what is saved whole: make each copy its own
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(out / role)
        folders[role] = out / role
    return folders


def build_copies(folder: Path, adapters: dict[str, Path], args: LlavaModelConfig) -> dict[str, nn.Module]:
    copies = {}
    for role, adapter in adapters.items():
        scores = role in ("value", "reward")
        base = load_sequence_classifier(str(folder), args) if scores else load_policy(args)
        copies[role] = load_adapter(base, str(adapter), is_trainable=True)
    return copies


def build_shared(folder: Path, adapters: dict[str, Path], args: LlavaModelConfig) -> tuple[PeftModel, dict[str, Any]]:
    host = load_adapter(load_policy(args), str(adapters["policy"]), is_trainable=True)
    load_adapter(host, str(adapters["reference"]), adapter_name="reference", is_trainable=True)
    loaded = SharedBase(host, str(folder), None)
    roles = {
        role: add_role(loaded, str(adapters[role]), f"{role}_role", is_trainable=True) for role in ("value", "reward")
    }
    return host, {"policy": "default", "reference": "reference", **roles}


@contextlib.contextmanager
def computing_as(host: PeftModel, role: str | AdapterRole) -> Iterator[nn.Module]:
    if isinstance(role, str):
        with active_adapter(host, role):
            yield host
    else:
        yield role


def loss(model: nn.Module, seed: int, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(seed)  # of the dropout
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **kwargs).logits.float().square().mean()


def role_of(name: str, role: str) -> str | None:
    """A parameter's name as its copy has it, if the role owns it."""
    own = {"policy": "default", "reference": "reference"}.get(role, f"{role}_role")
    parts = name.split(".")
    return ".".join("default" if part == own else part for part in parts) if own in parts else None


def compare_gradients(host: PeftModel, roles: dict[str, Any], copies: dict[str, nn.Module]) -> None:
    for role, copy in copies.items():
        theirs = {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}
        ours = {role_of(name, role): p.grad for name, p in host.named_parameters() if role_of(name, role)}
        if isinstance(roles[role], AdapterRole):
            head = "base_model.model.score.modules_to_save.default."
            ours |= {head + name: p.grad for name, p in roles[role].score.named_parameters()}
        assert ours.keys() == theirs.keys() and len(ours) >= 12
        for name, grad in theirs.items():
            assert grad.abs().max() > 0, name
            assert torch.equal(ours[name], grad), (role, name)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_four_copies(
    bits: int, dropout: float, checkpointing: bool, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    if bits != 32:
        pytest.importorskip("bitsandbytes")
    args = args_for(tiny_llava_dir, **QUANTISED.get(bits, {}))
    adapters = save_adapters(tiny_llava_dir, tmp_path, dropout)
    copies = build_copies(tiny_llava_dir, adapters, args)
    host, roles = build_shared(tiny_llava_dir, adapters, args)
    train_as_in_a_run(host, copies, checkpointing)
    assert_gradients_agree(host, roles, copies)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_8_bit_base_as_gpus_compute_it(
    checkpointing: bool, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    args = args_for(tiny_llava_dir, **QUANTISED[8])
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    copies = build_copies(tiny_llava_dir, adapters, args)
    host, roles = build_shared(tiny_llava_dir, adapters, args)
    train_as_in_a_run(host, copies, checkpointing)
    layers = [part for model in (host, *copies.values()) for part in model.modules()]
    layers = [part for part in layers if isinstance(part, bnb.nn.Linear8bitLt)]
    for layer in layers:
        layer.eval()  # in training, on a CPU, bitsandbytes unpacks the weights instead of rounding the inputs
    assert_gradients_agree(host, roles, copies)
    assert len(layers) == 5 * 14 and not any(layer.state.is_training for layer in layers)
    assert "inputs will be cast" not in caplog.text  # in every layer of every pass


def train_as_in_a_run(host: PeftModel, copies: dict[str, nn.Module], checkpointing: bool) -> None:
    for model in (host, *copies.values()):
        model.train()
        if checkpointing:
            kwargs = {"use_reentrant": False}
            kwargs |= {"context_fn": checkpoint_contexts(host)} if model is host else {}
            model.activation_checkpointing_enable(kwargs)


def assert_gradients_agree(host: PeftModel, roles: dict[str, Any], copies: dict[str, nn.Module]) -> None:
    total = torch.zeros(())
    for seed, role in enumerate(ROLES):
        loss(copies[role], seed).backward()
        with computing_as(host, roles[role]) as model:
            total = total + loss(model, seed)
    total.backward()  # all four at once, when the policy is active again
    compare_gradients(host, roles, copies)


def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_role_sees_with_the_projector_or_tower_of_its_own_adapter(
    part: str, checkpointing: bool, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    args = args_for(tiny_llava_dir)
    adapters = save_adapters(tiny_llava_dir, tmp_path, policy=[part], value=[part])
    copies = build_copies(tiny_llava_dir, adapters, args)
    host, roles = build_shared(tiny_llava_dir, adapters, args)
    train_as_in_a_run(host, copies, checkpointing)
    ids = torch.tensor([[1, *[4] * 16, 17, 301, 44]])
    total = torch.zeros(())
    for role in ROLES:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels()}
        expected = copies[role](**given).logits.square().mean()
        expected.backward()
        with computing_as(host, roles[role]) as model:
            found = model(**given).logits.square().mean()
        assert found.item() == expected.item(), role
        total = total + found
    total.backward()
    for role, copy in copies.items():
        theirs = {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}
        ours = {role_of(name, role): p.grad for name, p in host.named_parameters() if role_of(name, role)}
        assert any(part in name for name in theirs) == (role in ("policy", "value"))
        for name in theirs.keys() & ours.keys():
            assert torch.equal(ours[name], theirs[name]), (role, name)


def test_without_its_contexts_checkpointing_would_give_the_wrong_gradients(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    found = []
    for contexts in (True, False):
        host, roles = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
        kwargs = {"use_reentrant": False} | ({"context_fn": checkpoint_contexts(host)} if contexts else {})
        host.train().activation_checkpointing_enable(kwargs)
        value = loss(roles["value"], 0)
        with contextlib.suppress(torch.utils.checkpoint.CheckpointError):
            value.backward()
        found.append([p.grad for name, p in host.named_parameters() if ".value_role." in name])
    assert all(grad is not None and grad.abs().max() > 0 for grad in found[0])
    assert any(wrong is None or not torch.equal(right, wrong) for right, wrong in zip(*found, strict=True))


def test_a_graph_may_be_run_backward_twice_and_an_exception_leaves_no_role_behind(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    host, roles = build_shared(tiny_llava_dir, adapters, args_for(tiny_llava_dir))
    host.train().activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts(host)})
    policys = loss(host, 0).item()
    value = loss(roles["value"], 0)
    value.backward(retain_graph=True)
    once = [p.grad.clone() for name, p in host.named_parameters() if ".value_role." in name]
    value.backward()
    twice = [p.grad for name, p in host.named_parameters() if ".value_role." in name]
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
    trained = {name: p.requires_grad for name, p in host.named_parameters()}
    with pytest.raises(KeyError), in_eval_mode(roles["reward"]), computing(roles["reward"]):
        assert host.active_adapter == "reward_role" and not host.training
        raise KeyError
    layer = next(part for name, part in host.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    handle = layer.register_forward_hook(stop)
    with pytest.raises(KeyError):
        loss(roles["value"], 0)
    handle.remove()
    assert loss(host, 0).item() == policys
    assert host.active_adapter == "default" and all(module.training for module in host.modules())
    assert {name: p.requires_grad for name, p in host.named_parameters()} == trained
    host.zero_grad()
    loss(roles["value"], 0).backward()
    after = [p.grad for name, p in host.named_parameters() if ".value_role." in name]
    assert all(torch.equal(a, b) for a, b in zip(once, after, strict=True))
    assert all(p.grad is None for name, p in host.named_parameters() if ".value_role." not in name)


def stop(*_: Any) -> None:
    raise KeyError


@pytest.mark.parametrize("bits", BITS)
def test_the_base_is_there_once_and_a_switch_copies_nothing(bits: int, tiny_llava_dir: Path, tmp_path: Path) -> None:
    if bits != 32:
        pytest.importorskip("bitsandbytes")
    args = args_for(tiny_llava_dir, **QUANTISED.get(bits, {}))
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    host, roles = build_shared(tiny_llava_dir, adapters, args)
    together = nn.ModuleList([host, roles["value"], roles["reward"]])
    names = [name for name, _ in together.named_parameters()]
    base = [name for name in names if not any(adapter in name for adapter in ("lora_", "score"))]
    plain = dict(load_policy(args).named_parameters())
    assert len(base) == len(plain) and len(set(names)) == len(names)
    heads = [name for name in names if "score" in name]
    assert heads == ["1.score.weight", "1.score.bias", "2.score.weight", "2.score.bias"]
    assert len(set(places(together).values())) == len(places(together))  # every tensor once
    loss(host, 0)  # bitsandbytes lays 8-bit weights out in the first pass
    before = places(together), {name: p.requires_grad for name, p in together.named_parameters()}
    for role in roles.values():
        with computing_as(host, role) as model, torch.no_grad():
            loss(model, 0)
            assert (places(together), {name: p.requires_grad for name, p in together.named_parameters()}) == before


def places(model: nn.Module) -> dict[str, int]:
    """Where the tensors are, what bitsandbytes keeps beside its weights too."""
    found = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, part in model.named_modules():
        if (state := getattr(part, "state", None)) is not None and state.CB is not None:
            assert state.CB.data_ptr() == part.weight.data_ptr()
            found[f"{name} scales"] = state.SCB.data_ptr()
        if (state := getattr(part._parameters.get("weight"), "quant_state", None)) is not None:
            found[f"{name} scales"] = state.absmax.data_ptr()
    return found


@pytest.mark.parametrize("start", ["reward", "policy"])
def test_a_role_is_saved_as_a_model_with_a_base_of_its_own_is(
    start: str, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    args = args_for(tiny_llava_dir)
    alone = load_score_model(str(adapters[start]), args, base=str(tiny_llava_dir))
    host = load_adapter(load_policy(args), str(adapters["policy"]), is_trainable=True)
    role = add_role(SharedBase(host, str(tiny_llava_dir), None), str(adapters[start]), "value_role", is_trainable=True)
    if start == "policy":
        zero_head(alone)  # a head that is not in the checkpoint starts at zero
    alone.save_pretrained(tmp_path / "alone")
    role.save_pretrained(tmp_path / "role")
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("alone", "role")]
    assert files[0] == files[1]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "role")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value) and weights[1][name].dtype == value.dtype, name
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("alone", "role")]
    for config in configs:
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))  # PEFT repeats names, growing each time
    assert configs[0] == configs[1]
    again = load_score_model(str(tmp_path / "role"), args, base=str(tiny_llava_dir)).eval()
    mask = torch.ones_like(IDS)
    with in_eval_mode(role), torch.no_grad():
        expected = role(input_ids=IDS, attention_mask=mask).logits
    assert torch.equal(again(input_ids=IDS, attention_mask=mask).logits, expected)


def test_on_a_score_head_models_base_the_head_switches_too(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    args = args_for(tiny_llava_dir)
    copies = build_copies(tiny_llava_dir, adapters, args)
    host = load_score_model(str(adapters["value"]), args, base=str(tiny_llava_dir))
    trained = {name for name, p in host.named_parameters() if p.requires_grad}
    role = add_role(
        SharedBase(host, str(tiny_llava_dir), None), str(adapters["reward"]), "reward_role", is_trainable=False
    )
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(role(**given).logits, copies["reward"](**given).logits)
    assert torch.equal(host(**given).logits, copies["value"](**given).logits)
    assert not list(role.parameters())
    assert {name for name, p in host.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": "lora_only"}, "trains the base's biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"trainable_token_indices": [5]}, "has `trainable_token_indices`"),
    ],
)
def test_what_cannot_share_a_base_is_said(
    changes: dict[str, Any], reason: str, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    host = load_adapter(load_policy(args_for(tiny_llava_dir)), str(adapters["policy"]), is_trainable=True)
    loaded = SharedBase(host, str(tiny_llava_dir), None)
    found = find_shared_base([loaded], "value model", str(adapters["value"]), str(tiny_llava_dir), None, None)
    assert found is loaded and not caplog.text
    config = json.loads((adapters["value"] / "adapter_config.json").read_text())
    (adapters["value"] / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    assert not find_shared_base([loaded], "value model", str(adapters["value"]), str(tiny_llava_dir), None, None)
    assert f"The value model gets a base of its own ({tiny_llava_dir}): its adapter {reason}" in caplog.text
    assert not find_shared_base([loaded], "value model", str(adapters["reward"]), "other/base", None, None)
    assert f"{tiny_llava_dir} is loaded, another model" in caplog.text


def test_an_adapter_that_does_not_fit_is_named(tiny_llava_dir: Path, tmp_path: Path) -> None:
    adapters = save_adapters(tiny_llava_dir, tmp_path)
    config = json.loads((adapters["value"] / "adapter_config.json").read_text())
    (adapters["value"] / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    host = load_adapter(load_policy(args_for(tiny_llava_dir)), str(adapters["policy"]), is_trainable=True)
    with pytest.raises(InputError, match=r"does not fit model .*, whose base it was to share.*`share_base: false`"):
        add_role(SharedBase(host, str(tiny_llava_dir), None), str(adapters["value"]), "value_role", is_trainable=True)
