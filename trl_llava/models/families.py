"""What must be known of each family of image-text models; everything else is asked of its processor and its model.

Images of these families are encoded once a step. A family that is not here runs on the plain path: its processor's
tensors go to the model as they are, images are encoded in every pass, and transformers' own loop generates.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from trl_llava.prompts import PALIGEMMA_CHAT_TEMPLATE


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as people call it.
        model_type: of its config.
        processor: class of its processor.
        tower: names of the module that sees.
        projector: names of the modules between tower and language model; for Qwen they lie inside the tower.
        tower_type: `model_type` of the tower, where families differ in nothing else.
        token_kinds: the tensor that says what kind each token is, where the model takes one.
        first_position: position of the first token.
        attends_to_whole_prompt: whether prompt tokens attend to those behind them, and only completions are causal.
        caps_logits: whether the image-text model caps its logits at `final_logit_softcapping` of its text config.
        chat_template: for checkpoints that come without one.
        vllm: whether rollouts in vLLM are known to be right.
    """

    name: str
    model_type: str
    processor: str
    tower: tuple[str, ...] = ("vision_tower",)
    projector: tuple[str, ...] = ("multi_modal_projector",)
    tower_type: str | None = None
    token_kinds: str | None = None
    first_position: int = 0
    attends_to_whole_prompt: bool = False
    caps_logits: bool = False
    chat_template: str | None = None
    vllm: bool = False

    @property
    def shares_prefix(self) -> bool:
        """Whether rows that begin alike can run as one: plain positions, and causal attention everywhere."""
        return self.token_kinds is None

    @property
    def decodes_statically(self) -> bool:
        """Whether PPO's decoder can run it with a static cache: causal attention, of all layers to all tokens."""
        return self.token_kinds != "token_type_ids"


GRID = "image_grid_thw"
"""Of families that cut an image into patches: its size in patches. Positions are made of it as well as features."""

MERGER = ("merger", "deepstack_merger_list")
"""What joins patches at the end of Qwen's towers."""

FAMILIES = (
    Family("LLaVA with a Pixtral tower", "llava", "PixtralProcessor", tower_type="pixtral"),
    Family("LLaVA-1.5", "llava", "LlavaProcessor", vllm=True),
    Family(
        "LLaVA-NeXT",
        "llava_next",
        "LlavaNextProcessor",
        projector=("multi_modal_projector", "image_newline"),
        vllm=True,
    ),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        "LlavaOnevisionProcessor",
        projector=("multi_modal_projector", "image_newline"),
        vllm=True,
    ),
    Family("Qwen2-VL", "qwen2_vl", "Qwen2VLProcessor", ("visual",), MERGER, token_kinds="mm_token_type_ids"),
    Family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        "Qwen2_5_VLProcessor",
        ("visual",),
        MERGER,
        token_kinds="mm_token_type_ids",
        vllm=True,
    ),
    Family("Qwen3-VL", "qwen3_vl", "Qwen3VLProcessor", ("visual",), MERGER, token_kinds="mm_token_type_ids"),
    Family("InternVL", "internvl", "InternVLProcessor"),
    Family("SmolVLM", "smolvlm", "SmolVLMProcessor", ("vision_model",), ("connector",)),
    Family("Idefics3", "idefics3", "Idefics3Processor", ("vision_model",), ("connector",)),
    Family("Gemma 3", "gemma3", "Gemma3Processor", token_kinds="token_type_ids"),
    Family(
        "PaliGemma 2",
        "paligemma",
        "PaliGemmaProcessor",
        token_kinds="token_type_ids",
        first_position=1,
        attends_to_whole_prompt=True,
        caps_logits=True,
        chat_template=PALIGEMMA_CHAT_TEMPLATE,
    ),
)

TOWER_NAMES = tuple(dict.fromkeys(name for family in FAMILIES for name in family.tower))
PROJECTOR_NAMES = tuple(dict.fromkeys((*(name for family in FAMILIES for name in family.projector), "mm_projector")))


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a model by its config; None for one that is not known."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    for family in FAMILIES:
        if family.model_type == config.model_type and family.tower_type in (None, tower):
            return family
    return None


def family_of_processor(processor: object) -> Family | None:
    """The family of a processor; None for a tokenizer, and for one that is not known."""
    kinds = {kind.__name__ for kind in type(processor).__mro__}
    return next((family for family in FAMILIES if family.processor in kinds), None)


STAGES = ("SFT", "reward", "PPO", "GRPO", "RLOO", "DPO")


def table() -> str:
    """What each family can, as a Markdown table; tests hold it to runs of every stage and to what models say."""
    columns = ("family", "`model_type`", *STAGES, "shared prompt", "fast decoding", "vLLM")
    lines = [columns, ["---"] * len(columns)]
    for family in FAMILIES:
        paths = (family.shares_prefix, family.decodes_statically, family.vllm)
        marks = ["yes"] * len(STAGES) + ["yes" if path else "no" for path in paths]
        lines.append([family.name, f"`{family.model_type}`", *marks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
