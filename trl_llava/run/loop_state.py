"""What transformers' loop forgets at a restart: the sums behind the next numbers that it logs.

Without them the first loss after a resume is a mean over fewer steps, and the count of tokens starts at 0 again.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
# transformers' numbers, then those of TRL's trainers.
_NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_total_train_tokens", "_step")


def save_loop_state(trainer: Any, checkpoint: Path) -> None:
    """Save this process's sums, within the loop."""
    state = {
        "loss": trainer._tr_loss.item(),
        "metrics": getattr(trainer, "_metrics", {}),
        "seconds": time.time() - trainer.loop_started,
        **{name: getattr(trainer, name) for name in _NUMBERS if hasattr(trainer, name)},
    }
    _file(trainer, checkpoint).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_loop_state(trainer: Any, checkpoint: Path) -> None:
    """Restore them, before the first step."""
    path = _file(trainer, checkpoint)
    if not path.is_file():
        logger.warning(
            "%s has no %s (saved with another number of processes, or by TRL itself): the next logged loss is the "
            "mean of the steps after it alone, and `num_tokens` counts those alone.", checkpoint, path.name,
        )  # fmt: skip
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    trainer._tr_loss = torch.full_like(trainer._tr_loss, state.pop("loss"))
    trainer.loop_started = time.time() - state.pop("seconds")
    for mode, metrics in state.pop("metrics").items():
        trainer._metrics[mode].update(metrics)
    for name, value in state.items():
        setattr(trainer, name, value)


def _file(trainer: Any, checkpoint: Path) -> Path:
    return checkpoint / f"loop_state_{trainer.args.process_index}_of_{trainer.args.world_size}.json"
