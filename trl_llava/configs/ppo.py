"""The dataclass behind every recipe key of PPO, with all its checks."""

from dataclasses import dataclass
from typing import Literal

from trl.trainer.base_config import _BaseConfig

from trl_llava.configs.alarms import AlarmOptions, check_alarms
from trl_llava.configs.stages import (
    BATCH_FIELDS,
    OVERLONG_HELP,
    ROWS_ARE_OURS,
    TEMPLATE_HELP,
    Overlong,
    keep_heads,
    option,
    refuse,
    require_positive,
)
from trl_llava.configs.vllm import VLLMOptions, check_vllm
from trl_llava.hub.names import split_fields

# Names, defaults and meanings of fields are those of PPOConfig in TRL 1.12 (trl/experimental/ppo, Apache-2.0), the
# last release with PPO, so that recipes and habits carry over. The words are ours.
_COMPUTED = (
    *("world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size"),
    *("local_mini_batch_size", "mini_batch_size"),
)


@dataclass
class LlavaPPOConfig(VLLMOptions, AlarmOptions, _BaseConfig):
    """PPO for models that see: TRL 1.12's `PPOConfig`, plus images, the factual reward's terms and health checks.

    With our own fields at their defaults and text-only rows, training is that of TRL 1.12's `PPOTrainer`.

    Raises:
        ValueError: If a field is set that cannot work, or two fields contradict each other.

    Example:
        >>> args = LlavaPPOConfig("ppo", total_episodes=10_000, response_length=256, stop_token="eos")
        >>> args.kl_coef
        0.05
    """

    # TRL's fields
    learning_rate: float = option(3e-6, "Peak learning rate of AdamW, for policy and value model.")
    dataset_num_proc: int | None = option(None, "Number of processes that check and prepare the rows.")
    num_mini_batches: int = option(1, "Number of mini-batches, each one optimizer step, that a batch is split into.")
    total_episodes: int | None = option(
        None, "Number of completions to train on. None: `num_train_epochs` over the prompts."
    )
    local_rollout_forward_batch_size: int = option(
        64, "Most rows of a process that generate, or pass without gradients, at once."
    )
    num_sample_generations: int = option(
        10, "How many times in a run a batch of evaluation prompts is completed and shown. 0: never."
    )
    response_length: int = option(53, "Most tokens of a completion.")
    stop_token: Literal["eos"] | None = option(
        None, "'eos' ends a completion at the tokenizer's end-of-text token. Excludes `stop_token_id`."
    )
    stop_token_id: int | None = option(
        None, "Token ID that ends a completion; None, with `stop_token` None too: completions have full length."
    )
    temperature: float = option(0.7, "Temperature that completions are sampled at.")
    missing_eos_penalty: float | None = option(
        None, "Subtracted from the score of a completion without a stop token; must be positive. None: off."
    )
    world_size: int | None = option(None, "Computed: number of processes.")
    num_total_batches: int | None = option(None, "Computed: number of steps.")
    micro_batch_size: int | None = option(None, "Computed: `per_device_train_batch_size` over all processes.")
    local_batch_size: int | None = option(None, "Computed: completions per process and step.")
    batch_size: int | None = option(None, "Computed: completions per step.")
    local_mini_batch_size: int | None = option(None, "Computed: completions per process and optimizer step.")
    mini_batch_size: int | None = option(None, "Computed: completions per optimizer step.")
    push_to_hub: bool = option(False, "Push the run to the Hub.")
    model_adapter_name: str | None = option(None, "Adapter that is trained. None: 'default'.")
    ref_adapter_name: str | None = option(
        None, "Adapter of a PEFT policy that is the reference. None: the base without adapters."
    )
    num_ppo_epochs: int = option(4, "Number of times that each step trains on its rollout.")
    whiten_rewards: bool = option(False, "Scale the per-token rewards to unit variance.")
    kl_coef: float = option(0.05, "Weight of the KL penalty against the reference.")
    kl_estimator: Literal["k1", "k3"] = option(
        "k1",
        "Estimator of the KL (http://joschu.net/blog/kl-approx.html): 'k1' is unbiased, 'k3' unbiased and of less "
        "variance. 'k2' is for the log only.",
    )
    cliprange: float = option(0.2, "How far from 1 the policy's probability ratio may gain.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    cliprange_value: float = option(0.2, "How far a value may gain from its value in the rollout.")
    gamma: float = option(1.0, "Discount factor.")
    lam: float = option(0.95, "Lambda of generalised advantage estimation.")
    ds3_gather_for_generation: bool = option(
        True,
        "Under DeepSpeed ZeRO-3: gather the weights for generation. False is slower, and lets models train that no "
        "single GPU holds.",
    )
    trust_remote_code: bool = option(False, "Allow models and processors that ship their own Python code.")
    # What is loaded
    sft_model_path: str | None = option(
        None, "Stage 1: the adapter, or full model, that the policy starts from (Hub ID or folder)."
    )
    sft_model_revision: str | None = option(None, "Branch, tag or commit of `sft_model_path`.")
    reward_model_path: str | None = option(
        None, "Stage 2: the FactualReward checkpoint (Hub ID or folder). Optional with `reward_funcs`."
    )
    reward_model_revision: str | None = option(None, "Branch, tag or commit of `reward_model_path`.")
    value_model_path: str | None = option(None, "Checkpoint the value model starts from. None: as `value_init` says.")
    value_model_revision: str | None = option(None, "Branch, tag or commit of `value_model_path`.")
    value_init: Literal["reward", "policy"] = option(
        "reward",
        "Backbone that the value model starts from: the reward model's or the policy's. With `use_peft`, a whole "
        "model is trained by a fresh adapter on it.",
    )
    value_head: Literal["zero", "reward"] = option(
        "zero",
        "Head that the value model starts with: 'zero' (the paper), or that of the 'reward' model it starts from.",
    )
    share_base: bool = option(
        True,
        "Load a base model once: policy, reference, value and reward are then adapters on it, where they were trained "
        "on the same base. False: each of policy, value and reward has a copy.",
    )
    adapter_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "What LoRA weights and score heads are kept in. None: LoRA in float32, heads as the base model."
    )
    image_cache_gib: float = option(
        4.0, "Kept for older recipes, does nothing: image features are made once a step for all roles and passes."
    )
    # Prompts
    chat_template_path: str | None = option(None, f"{TEMPLATE_HELP} The reward model keeps its own.")
    max_prompt_length: int | None = option(None, "Longest prompt in tokens, image tokens included. None: no limit.")
    overlong: Overlong = option("error", OVERLONG_HELP)
    # Several completions of one prompt
    num_generations_per_prompt: int = option(
        1,
        "Completions of each prompt of a batch. A batch still holds `per_device_train_batch_size` * "
        "`gradient_accumulation_steps` completions per process, of so many times fewer prompts.",
    )
    share_prefix: bool = option(
        True,
        "Run a prompt once for all of its completions that are in the same micro-batch. Where a model's attention "
        "has no mask for packed rows (all but sdpa, eager and flex), every completion runs with its prompt, which is "
        "logged.",
    )
    # Memory and time; none of these changes a result
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Most tokens, padding included, that a pass over a rollout or of the update takes at once, besides "
        "`local_rollout_forward_batch_size` and `per_device_train_batch_size` rows; a row that is longer on its own "
        "runs on its own. None: no limit.",
    )
    generation_cache_gib: float | None = option(
        None,
        "GiB of keys and values that a batch of generation may hold: so many of at most "
        "`local_rollout_forward_batch_size` prompts are answered at once. A row that needs more is answered on its "
        "own. None: on a GPU half of what is free when the run first generates, on a CPU 4.",
    )
    cache_implementation: Literal["static", "dynamic"] = option(
        "static",
        "How the policy generates: 'static': keys and values in a cache of fixed length, which lets a GPU replay a "
        "recorded step for each token; a model that cannot, uses the other, which is logged. 'dynamic': transformers' "
        "`generate`. Both draw the same tokens.",
    )
    recompute_logprobs: bool | None = option(
        None,
        "Compute the policy's log-probabilities in a pass of its own, instead of keeping those that the tokens were "
        "drawn with. None: only where the two differ by more than the last digits of float32, which is "
        "in 16 bit, with tf32 and on a quantised base: there KL and ratios would start from the rounding of "
        "generation's KV cache, and False also needs a larger `first_step_kl_tolerance`; and on a GPU without "
        "`generation_cache_gib`, where the memory that is free would have a part in those last digits.",
    )
    logits_chunk_size: int = option(
        512, "For how many response tokens the language-model head runs at once: memory of this times the vocabulary."
    )
    # The score of a response
    reward_funcs: list[str] | None = option(
        None,
        "Reward functions with TRL's signature, 'package.module:function' or 'file.py:function' (a path from the "
        "current directory), besides or instead of the reward model.",
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each reward: the reward model (if any), then `reward_funcs`. None: 1."
    )
    correctness_coef: float | None = option(None, "Weight of the correctness term (paper: 2). None: off.")
    yes_no: Literal["no_only", "both"] = option(
        "no_only", "Correctness of yes/no questions: the paper's bonus for 'No' only, or the same for 'Yes'."
    )
    length_coef: float | None = option(None, "Weight of length / response_length (paper: -10). None: off.")
    missing_eos_replaces: bool = option(
        False, "A response without a stop token gets -`missing_eos_penalty` instead of its rewards, not besides them."
    )
    reward_bias: float = option(0.0, "Added to every score.")
    normalize_scores: Literal["first_batch"] | None = option(
        None, "'first_batch': shift and scale the rewards by mean and spread of the first batch."
    )
    # The loss
    clamp_kl: bool = option(False, "Clamp the per-token KL at 0 from below (paper: True).")
    reward_scale: float = option(1.0, "Factor on the per-token rewards unless they are whitened (paper: 10).")
    whiten_variance: Literal["sample", "population"] = option(
        "sample",
        "Whitening divides by the number of tokens minus 1 ('sample') or by their number (paper: 'population').",
    )
    # Health
    check_first_step: bool = option(
        True, "Stop with an explanation if the first step's KL is not 0 or its ratio not 1."
    )
    first_step_kl_tolerance: float = option(1e-3, "Largest |KL| per response that the first step may show.")
    first_step_ratio_tolerance: float | None = option(
        None, "Largest mean |ratio - 1| that the first step may show. None: 0.001, or 0.05 where it runs in 16 bit."
    )

    def __post_init__(self) -> None:
        split_fields(
            self,
            sft_model_path="sft_model_revision",
            reward_model_path="reward_model_revision",
            value_model_path="value_model_revision",
        )
        computed = "the trainer computes it from the batch size per device, accumulation and the number of processes"
        refuse(self, dict.fromkeys(_COMPUTED, (None, computed)))
        refuse(
            self,
            {
                "train_sampling_strategy": ROWS_ARE_OURS["train_sampling_strategy"],
                "eval_strategy": ("no", "PPO has no evaluation loss; `test_split_size` rows fill its tables"),
                "fp16": (False, "ratios and KL need bf16's range, and loss scaling skips the first steps"),
            },
        )
        if self.save_strategy not in ("no", "steps"):
            raise ValueError(
                f"`save_strategy` must be 'no' or 'steps' (found {self.save_strategy!r}): PPO has no epochs."
            )
        if self.model_adapter_name not in (None, "default"):
            raise ValueError(
                f"`model_adapter_name` must stay 'default' (found {self.model_adapter_name!r}): that is the adapter "
                "which is trained and saved."
            )
        require_positive(self, "num_mini_batches", "num_ppo_epochs", "total_episodes", "response_length")
        require_positive(self, "local_rollout_forward_batch_size", "max_prompt_length", "temperature")
        require_positive(self, "max_tokens_per_micro_batch", "logits_chunk_size", "generation_cache_gib")
        require_positive(self, "num_generations_per_prompt", *BATCH_FIELDS)
        require_positive(self, "missing_eos_penalty", "reward_scale")
        if self.value_head == "reward" and self.value_init != "reward" and self.value_model_path is None:
            raise ValueError(
                f"`value_head: reward` needs a value model that starts with a head, but `value_init` is "
                f"{self.value_init!r}: set it to 'reward', or `value_head` to 'zero'."
            )
        self._check_batches()
        check_vllm(self)
        check_alarms(self)
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("`stop_token` and `stop_token_id` exclude each other: leave one of them out.")
        if self.missing_eos_penalty is not None and self.stop_token is None and self.stop_token_id is None:
            raise ValueError(
                f"`missing_eos_penalty={self.missing_eos_penalty}` needs a stop token, or it hits all responses: "
                "set `stop_token: eos`, or `stop_token_id`."
            )
        keep_heads(self)
        super().__post_init__()  # last: it looks at the hardware

    def _check_batches(self) -> None:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        product = (
            f"`per_device_train_batch_size` ({self.per_device_train_batch_size}) * `gradient_accumulation_steps` "
            f"({self.gradient_accumulation_steps}) = {rows} rollouts per process"
        )
        if rows % self.num_mini_batches:
            raise ValueError(
                f"`num_mini_batches` ({self.num_mini_batches}) must divide {product}: change one of the three."
            )
        if rows % self.num_generations_per_prompt:
            raise ValueError(
                f"`num_generations_per_prompt` ({self.num_generations_per_prompt}) must divide {product}: change one "
                "of the three."
            )
        if self.whiten_rewards and rows // self.num_mini_batches < 8:
            raise ValueError(
                f"`whiten_rewards` needs at least 8 rollouts per process in a mini-batch: {product} in "
                f"`num_mini_batches` ({self.num_mini_batches}) leaves {rows // self.num_mini_batches}."
            )
