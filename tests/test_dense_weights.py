"""The policy as one dense model: what is sent to another engine computes what the policy computes."""

from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_trainers import TARGETS, make_adapter, make_policy
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from trl_llava.errors import InputError
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.models.quantization import UNQUANTIZED
from trl_llava.ppo.dense_weights import DenseWeights

IDS = torch.tensor([[1, 20, 300, 41, 5, 60]])


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def load_into_a_folder(weights: dict[str, torch.Tensor], base: Path, folder: Path) -> PreTrainedModel:
    """A model that is loaded from a checkpoint of these weights, as a server would."""
    AutoModelForImageTextToText.from_pretrained(base).config.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("adapter"))


def test_the_dense_model_computes_what_base_and_adapter_compute(
    tiny_llava_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    policy = make_policy(tiny_llava_dir, adapter).eval()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    sent = dict(DenseWeights(policy).tensors())
    assert set(sent) == names_in(tiny_llava_dir)
    dense = load_into_a_folder(sent, tiny_llava_dir, tmp_path)
    with torch.no_grad():
        expected, found = policy(input_ids=IDS).logits, dense(input_ids=IDS).logits
        with policy.disable_adapter():
            bare = policy(input_ids=IDS).logits
    assert (found - expected).abs().max() < 1e-5 < 1e-2 < (bare - expected).abs().max()
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_a_layer_with_lora_is_w_plus_scaled_b_a(tiny_llava_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=3, target_modules=TARGETS))
    layer = model.get_base_model().model.language_model.layers[1].self_attn.v_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(0.5)
        layer.lora_A["default"].weight.fill_(2.0)
        layer.lora_B["default"].weight.fill_(0.25)
    sent = dict(DenseWeights(model).tensors())
    assert sent["language_model.model.layers.1.self_attn.v_proj.weight"].unique().tolist() == [2.0]
    assert layer.base_layer.weight.unique().tolist() == [0.5]


def test_names_are_those_of_the_checkpoint_that_was_loaded(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """transformers now names the tower otherwise than checkpoints on the Hub do."""
    weights = {
        name.replace("vision_tower.vision_model.", "vision_tower."): value
        for name, value in load_file(tiny_llava_dir / "model.safetensors").items()
    }
    model = load_into_a_folder(weights, tiny_llava_dir, tmp_path)
    sent = dict(DenseWeights(model).tensors())
    assert set(sent) == set(weights)
    assert all(torch.equal(sent[name], weights[name]) for name in weights)


def test_names_are_found_again_where_the_model_does_not_remember_them(tiny_llava_dir: Path, tmp_path: Path) -> None:
    """As after loading under ZeRO-3."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model._weight_conversions = get_model_conversion_mapping(model)
    assert "language_model.model.model.norm.weight" in revert_weight_conversion(model, dict(model.named_parameters()))
    for folder in (tiny_llava_dir, tmp_path):
        model.name_or_path = str(folder)
        assert {name for name, _ in DenseWeights(model).tensors()} == names_in(tiny_llava_dir)


def test_other_roles_on_the_base_do_not_show(tiny_llava_dir: Path, adapter: Path) -> None:
    policy = make_policy(tiny_llava_dir, adapter)
    alone = dict(DenseWeights(policy).tensors())
    policy.add_adapter("value_role", LoraConfig(r=2, target_modules=r".*language_model\..*\.o_proj"))
    role = AdapterRole(policy, "value_role", torch.nn.Linear(32, 1))
    with role.active():
        pass
    together = dict(DenseWeights(policy).tensors())
    assert list(together) == list(alone)
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_a_projector_that_is_trained_whole_is_sent_as_trained(tiny_llava_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=1, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]))
    wrapper = model.get_base_model().model.multi_modal_projector
    with torch.no_grad():
        wrapper.modules_to_save["default"].linear_1.bias.fill_(7.0)
    sent = dict(DenseWeights(model).tensors())
    assert set(sent) == names_in(tiny_llava_dir)
    assert sent["multi_modal_projector.linear_1.bias"].unique().tolist() == [7.0]


def test_an_nf4_base_is_sent_as_it_computes(tiny_llava_dir: Path) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_llava_dir, quantization_config=config, dtype=torch.bfloat16
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    sent = dict(DenseWeights(model).tensors())
    assert set(sent) == names_in(tiny_llava_dir)
    assert {value.dtype for value in sent.values()} == {torch.bfloat16}
    layer = model.get_base_model().model.language_model.layers[0].mlp.down_proj
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = layer(x)
    found = x @ sent["language_model.model.layers.0.mlp.down_proj.weight"].T
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_only_what_can_be_added_is_sent(tiny_llava_dir: Path) -> None:
    def peft(**kind: object) -> PeftModel:
        model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.float32)
        return get_peft_model(model, LoraConfig(r=1, target_modules=TARGETS, **kind))

    with pytest.raises(InputError, match=r"down_proj|q_proj.*has DoraLinearVariant, and only LoRA matrices"):
        DenseWeights(peft(use_dora=True))
    with pytest.raises(InputError, match="has `lora_bias`"):
        DenseWeights(peft(lora_bias=True, bias="none"))
    with pytest.raises(InputError, match="has TrainableTokensWrapper"):
        DenseWeights(peft(trainable_token_indices=[4]))


def test_bfloat16_weights_are_added_in_float32(tiny_llava_dir: Path) -> None:
    """Added in bfloat16, 1 + 0.004 + 0.004 would stay 1 at each step; added once, in float32, it is 1.0078."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_dir, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(0.004)
    sent = dict(DenseWeights(model).tensors())["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert sent.dtype == torch.bfloat16
    assert sent.unique().tolist() == [1.0078125]


def test_text_only_models_are_sent_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_models.tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {name for name, _ in DenseWeights(model).tensors()} == names_in(folder)
