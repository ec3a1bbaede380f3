"""How many prompts are completed at once: as many as have their keys and values within a bound of memory.

Whatever the split, the completions are the same in float32: a draw depends on seed, step and row alone
(`ppo/randomness.py`). In 16 bit a batch of another size rounds otherwise, and a draw close to a bound may differ.
"""

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.std import tqdm
from transformers import PreTrainedConfig

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.models.base_model import base_of
from trl_llava.models.sharded_weights import shards_weights

GIB = 2**30
CPU_GIB = 4.0
"""The bound on a CPU where the recipe has none."""
SHARE_OF_FREE = 0.5
"""Of what a GPU has free, where the recipe has no bound; the rest is for the pass over the prompts."""


def bytes_per_token(config: PreTrainedConfig, bytes_per_number: int) -> int:
    """Keys and values of one token: 2 * (layers + 1) * key-value heads * head size numbers.

    One layer more, because a layer is there twice while its cache moves to a larger one.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * (text.num_hidden_layers + 1) * heads * head_size * bytes_per_number


def rows_at_once(row: int, bound: float, most: int) -> int:
    """How many rows a bound has room for: 1 at least, as a row that needs more is completed on its own."""
    return max(1, int(min(most, bound // row)))


class GenerationBatches:
    """Sizes the batches of generation by `generation_cache_gib`."""

    def __init__(self, args: LlavaPPOConfig, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        self.bound: float | None = None

    def rows(self, policy: nn.Module, prompt_tokens: int) -> int:
        """How many rows of a rollout, with prompts of at most `prompt_tokens`, are completed at once.

        1 at least and `local_rollout_forward_batch_size` at most; where processes share weights, so that all must make
        the same passes, the same on each.
        """
        base = base_of(policy)
        # The embeddings' dtype is that of the hidden states, which no autocast lowers for keys.
        number = base.get_input_embeddings().weight.dtype.itemsize
        row = bytes_per_token(base.config, number) * (prompt_tokens + self.args.response_length)
        first = self.bound is None
        if self.bound is None:
            self.bound = self._find_bound()
        found = rows_at_once(row, self.bound, self.args.local_rollout_forward_batch_size)
        if shards_weights(self.accelerator):
            counts = self.accelerator.gather(torch.tensor([found], device=self.accelerator.device))
            found = int(counts.min())
        if first:
            with tqdm.external_write_mode():  # above the progress bar
                self.accelerator.print(
                    f"Generation completes up to {found} prompts at once: {row / GIB:.3g} GiB of keys and values "
                    f"each, {self.bound / GIB:.3g} GiB for all (generation_cache_gib), "
                    f"{self.args.local_rollout_forward_batch_size} at most (local_rollout_forward_batch_size)"
                )
        return found

    def _find_bound(self) -> float:
        """Bytes; what a GPU has free is looked up once, so that a run keeps to what it has begun with."""
        if self.args.generation_cache_gib is not None:
            return self.args.generation_cache_gib * GIB
        device = self.accelerator.device
        if device.type != "cuda":
            return CPU_GIB * GIB
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return SHARE_OF_FREE * (torch.cuda.mem_get_info(device)[0] + unused)
