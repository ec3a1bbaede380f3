"""Who is trained in a PPO run, and against whom: policy, reference and value model, as the recipe names them."""

import logging
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, ProcessorMixin

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.errors import InputError, RecipeError
from trl_llava.hub.lookup import check_there, find_file
from trl_llava.models.adapter_role import AdapterRole
from trl_llava.models.adapters import freeze_as_configured, load_adapter, lora_config
from trl_llava.models.families import family_of
from trl_llava.models.load import load_config, load_policy, load_processor
from trl_llava.models.same_tokenizer import check_same_tokenizer
from trl_llava.models.shared_base import SharedBase, add_fresh_role, add_role, find_shared_base
from trl_llava.models.starts import (
    adapter_base,
    agreed_base,
    load_score_model,
    revision_of_base,
    with_base,
    zero_head,
)
from trl_llava.ppo.vllm_prompts import require_served

logger = logging.getLogger(__name__)


class Policy(NamedTuple):
    """The policy and what it is compared with.

    Attributes:
        model: The policy; with an adapter, the frozen copy "reference" of it is there too.
        reference: A model of its own, or None if the policy's base and adapters serve as one.
        processor: Its processor.
        base: Hub ID or folder of the base model.
        start: Hub ID or folder of the weights it starts from, with their revision.
        shared: The policy as a base for other roles; empty if they shall have bases of their own.
    """

    model: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    processor: ProcessorMixin
    base: str
    start: tuple[str, str | None]
    shared: list[SharedBase]


class Value(NamedTuple):
    """The value model.

    Attributes:
        model: An adapter on the policy's base, or a model of its own.
        processor: Its processor, if that differs from the policy's.
        shared: The value model as a base for the reward model; empty if it is none.
    """

    model: PreTrainedModel | PeftModel | AdapterRole
    processor: ProcessorMixin | None
    shared: list[SharedBase]


def load_policy_roles(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> Policy:
    """Load policy and reference; where they are adapters, `args` gets their names."""
    if args.ref_adapter_name is not None:
        raise RecipeError(
            f"`ref_adapter_name` must stay null (found {args.ref_adapter_name!r}): the reference is what the policy "
            "starts from, `sft_model_path` or the base model. For another one use LlavaPPOTrainer itself."
        )
    start, revision = _policy_start(args, model_args)
    check_there("sft_model_path" if args.sft_model_path else "model_name_or_path", start, revision)
    trained_on = adapter_base(start, revision)
    if trained_on is None:
        _check_family(args, model_args, start, revision)
        return _full_policy(args, model_args, start, revision)
    base = agreed_base(model_args.model_name_or_path, start, trained_on)
    base_revision = revision_of_base(base, start, revision, model_args)
    _check_family(args, model_args, base, base_revision)
    model = load_policy(with_base(model_args, base, base_revision))
    model = load_adapter(model, start, adapter_name="default", is_trainable=True, revision=revision)
    load_adapter(model, start, adapter_name="reference", is_trainable=False, revision=revision)
    freeze_as_configured(model, start, model_args)
    args.model_adapter_name, args.ref_adapter_name = "default", "reference"
    processor = _processor(start, args, model_args, revision, base)
    shared = _as_base(args, model, base, base_revision)
    return Policy(model, None, processor, base, (start, revision), shared)


def _check_family(args: LlavaPPOConfig, model_args: LlavaModelConfig, name: str, revision: str | None) -> None:
    """Stop before anything large is loaded if vLLM is to generate and the model's family is none that it serves."""
    if args.use_vllm:
        config = load_config("model_name_or_path", name, revision, model_args.trust_remote_code)
        require_served(family_of(config), name)


def load_policy_processor(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> ProcessorMixin:
    """The policy's processor as `load_policy_roles` loads it, without the policy."""
    start, revision = _policy_start(args, model_args)
    trained_on = adapter_base(start, revision)
    base = start if trained_on is None else agreed_base(model_args.model_name_or_path, start, trained_on)
    return _processor(start, args, model_args, revision, base)


def load_value_model(args: LlavaPPOConfig, model_args: LlavaModelConfig, policy: Policy) -> Value:
    """Load the value model, on the policy's base where it may share it.

    It starts from `value_model_path`, else from what `value_init` says, with the head that `value_head` says. It must
    read the policy's token ids as the same tokens.
    """
    name, revision, field, processor = _value_start(args, model_args, policy)
    given = model_args.model_name_or_path if field == "policy" else None
    model, shared = _value_model(args, model_args, policy, name, given, revision)
    if args.value_head == "zero":
        zero_head(model)
    same = processor.chat_template == policy.processor.chat_template
    same = same and processor.to_dict() == policy.processor.to_dict()  # image processor, patches, image tokens, ...
    return Value(model, None if same else processor, shared)


def _value_start(
    args: LlavaPPOConfig, model_args: LlavaModelConfig, policy: Policy
) -> tuple[str, str | None, str, ProcessorMixin]:
    """What the value model starts from: name, revision, the field that names it ("policy": the policy), processor."""
    of_policy = (*policy.start, "policy", policy.processor)
    if args.value_model_path is None and args.value_init == "policy":
        return of_policy
    name, revision, field = args.value_model_path, args.value_model_revision, "value_model_path"
    if name is None:
        name, revision, field = args.reward_model_path, args.reward_model_revision, "reward_model_path"
    if name is None:
        raise RecipeError(
            "`value_init: reward` needs `reward_model_path`: set it, or `value_init: policy`, or `value_model_path`."
        )
    check_there(field, name, revision)
    processor = _processor(name, args, model_args, revision, adapter_base(name, revision) or name)
    try:
        check_same_tokenizer(policy.processor, processor, f"value model ({field})")
    except InputError:
        if field == "value_model_path" or args.value_head == "reward":  # its weights are wanted
            raise
        # The reward model reads text and images; only a value model must read the policy's ids.
        logger.warning(
            "The value model starts from the policy, as with `value_init: policy`: the tokens of %s are others", name
        )
        return of_policy
    return name, revision, field, processor


def _policy_start(args: LlavaPPOConfig, model_args: LlavaModelConfig) -> tuple[str, str | None]:
    """What the policy starts from, with its revision."""
    if model_args.adapter_name_or_path:
        raise RecipeError("`adapter_name_or_path`: in PPO, name stage 1's adapter as `sft_model_path`.")
    if args.sft_model_path is not None:
        return args.sft_model_path, args.sft_model_revision
    if model_args.model_name_or_path is None:
        raise RecipeError("set `sft_model_path` (stage 1's adapter or model), or `model_name_or_path`.")
    return model_args.model_name_or_path, model_args.model_revision


def _full_policy(args: LlavaPPOConfig, model_args: LlavaModelConfig, start: str, revision: str | None) -> Policy:
    """A policy whose start is a whole model: trained with a fresh adapter, or as a whole against a second copy."""
    model = load_policy(with_base(model_args, start, revision))
    processor = _processor(start, args, model_args, revision)
    peft_config = lora_config(model_args, model, task="CAUSAL_LM")
    if peft_config is None:
        reference = load_policy(with_base(model_args, start, revision)).requires_grad_(False).eval()
        return Policy(model, reference, processor, start, (start, revision), [])
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = get_peft_model(model, peft_config)
    return Policy(model, None, processor, start, (start, revision), _as_base(args, model, start, revision))


def _as_base(args: LlavaPPOConfig, model: PeftModel, name: str, revision: str | None) -> list[SharedBase]:
    """A PEFT model as a base for other roles, if there shall be any."""
    return [SharedBase(model, name, revision)] if args.share_base else []


def _value_model(
    args: LlavaPPOConfig,
    model_args: LlavaModelConfig,
    policy: Policy,
    name: str,
    given: str | None,
    revision: str | None,
) -> tuple[PreTrainedModel | PeftModel | AdapterRole, list[SharedBase]]:
    """The value model, and itself as a base if it is a PEFT model of its own; `given` is the recipe's base."""
    new_head, trained_on = args.value_head == "zero", adapter_base(name, revision)
    if trained_on is None and model_args.use_peft:
        return _fresh_value_model(args, model_args, policy, name, revision)
    if trained_on is not None:
        base = agreed_base(given, name, trained_on)
        base_revision = revision_of_base(base, name, revision, model_args)
        loaded = find_shared_base(policy.shared, "value model", name, base, base_revision, revision)
        if loaded is not None:
            role = add_role(loaded, name, "value_role", is_trainable=True, revision=revision, new_head=new_head)
            freeze_as_configured(loaded.model, name, model_args, role.adapter_name)
            return role, []
    model = load_score_model(name, model_args, base=given, revision=revision, seed=args.seed, new_head=new_head)
    return model, _as_base(args, model, base, base_revision) if trained_on is not None else []


def _fresh_value_model(
    args: LlavaPPOConfig, model_args: LlavaModelConfig, policy: Policy, name: str, revision: str | None
) -> tuple[PeftModel | AdapterRole, list[SharedBase]]:
    """The value model where its start is a whole model and `use_peft` is set: a fresh adapter, as the policy has."""
    seed = args.seed + 1  # other weights than the policy's adapter
    if args.value_head == "zero":  # else the head is in a model of its own
        loaded = find_shared_base(policy.shared, "value model", None, name, revision, None)
        if loaded is not None:
            config = lora_config(model_args, loaded.model, task="SEQ_CLS")
            assert config is not None
            return add_fresh_role(loaded, config, "value_role", seed=seed), []
    model = load_score_model(name, model_args, revision=revision, seed=args.seed, new_head=args.value_head == "zero")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(model, lora_config(model_args, model, task="SEQ_CLS"))
    return model, _as_base(args, model, name, revision)


def _processor(
    name: str, args: LlavaPPOConfig, model_args: LlavaModelConfig, revision: str | None, base: str | None = None
) -> ProcessorMixin:
    """The processor saved with a stage's result, else its base's."""
    fields = {getattr(args, field): field for field in ("sft_model_path", "value_model_path", "reward_model_path")}
    if base is not None and not find_file(name, "tokenizer_config.json", revision):  # an adapter saved on its own
        name, revision = base, revision_of_base(base, name, revision, model_args)
    return load_processor(
        name,
        revision=revision,
        trust_remote_code=model_args.trust_remote_code,
        pad_to_square=model_args.pad_to_square,
        chat_template_path=args.chat_template_path,
        field=fields.get(name, "model_name_or_path"),
    )
