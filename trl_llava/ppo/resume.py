"""What a PPO run saves, and goes on from: policy, value model, optimizer, schedule, counters and normalisers."""

from pathlib import Path

from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from trl_llava.ppo.checkpoint import (
    load_optimizer,
    load_roles,
    load_scheduler,
    load_state,
    save_roles,
    save_state,
)
from trl_llava.ppo.scoring import Scorer
from trl_llava.run.safe_checkpoints import SafeCheckpoints

_KEPT = ("global_step", "episode", "epoch", "log_history", "best_metric", "best_model_checkpoint")


class PPOCheckpoints(SafeCheckpoints):
    """Mixed into the PPO trainer, before it: both models are saved and restored, whatever shares them out."""

    scorer: Scorer

    def restore(self, checkpoint: str) -> None:
        """Put everything back as it was when a checkpoint was written.

        Args:
            checkpoint: the folder.

        Raises:
            FileNotFoundError: if it is no checkpoint of a PPO run.
        """
        folder = Path(checkpoint)
        load_state(self.scorer, folder)
        saved = type(self.state).load_from_json(str(folder / "trainer_state.json"))
        for name in _KEPT:
            setattr(self.state, name, getattr(saved, name))
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model, str(folder), load_module_strict=False)
        else:
            load_roles(self.accelerator.unwrap_model(self.model), folder, "default")
            load_optimizer(self.optimizer, folder)
        load_scheduler(self.lr_scheduler, folder)
        self._load_rng_state(checkpoint)  # our own draws need none; a reward function of the user's may

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy (its adapter alone, if it has one) and, in `value_model/`, the value model with its head.

        Args:
            output_dir: folder; `args.output_dir` by default.
            _internal_call: `True` keeps `push_to_hub` from pushing.
        """
        folder = Path(output_dir or self.args.output_dir)
        state = self.accelerator.get_state_dict(self.model)  # gathers what is sharded, so every process calls it
        if self.args.should_save:
            save_roles(self.accelerator.unwrap_model(self.model), state, folder, "default")
            self.processing_class.save_pretrained(folder)
            save_state(self.scorer, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
