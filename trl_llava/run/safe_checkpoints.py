"""Checkpoints that survive a kill at any moment, and a training that stops at a signal and resumes exactly."""

import json
import logging
import pickle
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME

from trl_llava.configs.alarms import AlarmOptions
from trl_llava.errors import InputError
from trl_llava.health import UnhealthyRunError
from trl_llava.run.alarms import Alarms
from trl_llava.run.checkpoint_folders import (
    checkpoint_to_resume,
    checkpoints,
    clear_leftovers,
    discard_checkpoint,
    finish_checkpoint,
    remove_oldest,
    set_later_aside,
    start_checkpoint,
    unfinished,
)
from trl_llava.run.disk_full import explain_full_disk
from trl_llava.run.launch import resume_command
from trl_llava.run.loop_state import load_loop_state, save_loop_state
from trl_llava.run.manifest import DamagedCheckpointError, check_manifest
from trl_llava.run.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)


def load_full_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the saved weights of a whole model in place.

    A checkpoint has the names of the Hub, which only `from_pretrained` translates: transformers' trainer reads the
    file as it is, finds no name of a LLaVA, and trains on from the base.
    """
    saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


@dataclass(eq=False)
class _AtStepEnds(TrainerCallback):
    """Restores the loop's sums before the first step, and ends the run after a step if there was a signal."""

    trainer: "SafeCheckpoints"
    stop: StopSignals
    checkpoint: str | None

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.loop_started = time.time()
        if self.checkpoint is not None and hasattr(self.trainer, "_tr_loss"):
            self.trainer._restore_loop(Path(self.checkpoint))

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.stop.agree():
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.stop.agreed:  # the epoch has not ended: what is due at its end would be logged at the wrong step
            control.should_save = control.should_evaluate = control.should_log = False
        return control


class SafeCheckpoints(Trainer):
    """Mixed into a trainer, before it: its checkpoints are whole or not there, and a resumed run is the uninterrupted.

    A checkpoint is written beside its place and moved there once all processes have written and all is on the disk;
    only then may older ones go. SIGTERM and Ctrl-C end the run after the step, saved.
    """

    loop_started = 0.0
    _stop: StopSignals | None = None
    _alarms: Alarms | None = None
    _written_beside: Path | None = None

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal, or an alarm, has ended the training; `True` from the end of the step in which it came."""
        stopped_by_alarm = self._alarms is not None and self._alarms.stopping is not None
        return stopped_by_alarm or (self._stop is not None and self._stop.agreed > 0)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint that is checked first.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last one in `args.output_dir`.
            *args: passed on.
            **kwargs: passed on.

        Returns:
            transformers' `TrainOutput`.

        Raises:
            NotFoundError: if there is no such checkpoint.
            DamagedCheckpointError: if it is damaged.
            Stopped: after SIGTERM or Ctrl-C, once all is saved.
            UnhealthyRunError: after an alarm, with `stop_on_alarm`, once all is saved.
        """
        with self.resumable(resume_from_checkpoint) as checkpoint:
            return super().train(checkpoint, *args, **kwargs)

    @contextmanager
    def resumable(self, wanted: str | bool | None) -> Iterator[str | None]:
        """Around a training loop: yields the whole checkpoint that it starts from; ends it after a signal or alarm."""
        if self.args.enable_jit_checkpoint:
            raise InputError(
                "`enable_jit_checkpoint` must stay False: SIGTERM and Ctrl-C always save a checkpoint here"
            )
        self._check_reference(wanted)
        run_dir = Path(self.args.output_dir)
        if self.args.should_save:
            clear_leftovers(run_dir)
        self.accelerator.wait_for_everyone()
        found: list[str | None] = [None]
        if wanted and self.accelerator.is_main_process:  # where one process stops, the launcher stops the others
            found = [str(checkpoint_to_resume(run_dir, wanted))]
        checkpoint = broadcast_object_list(found)[0]
        stop = self._stop = StopSignals(self.accelerator)
        at_step_ends = _AtStepEnds(self, stop, checkpoint)
        alarms = self._alarms = Alarms() if isinstance(self.args, AlarmOptions) else None
        callbacks = [callback for callback in (at_step_ends, alarms) if callback is not None]
        for callback in callbacks:
            self.add_callback(callback)
        command = resume_command()  # now: at the end the launcher, whose command line it is, may be gone
        try:
            with stop.watched():
                yield checkpoint
                if stop.agreed:
                    raise self._stopped(run_dir, stop.agreed, command)
                if alarms is not None and alarms.stopping is not None:
                    raise UnhealthyRunError(
                        f"{alarms.stopping}. `stop_on_alarm` has ended the run after step {self.state.global_step} of "
                        f"{self.state.max_steps}; all is saved in {checkpoints(run_dir)[-1]}. To go on all the same:"
                        f"\n    {command}"
                    )
        except pickle.UnpicklingError as error:  # what `weights_only` refuses; all else that is unpickled is ours
            called = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message says how to run it after all
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint} is refused: one of its files holds more than numbers"
                f"{f', it would call {called[1]}' if called else ''}. Nothing of it was run"
            ) from error
        finally:
            for callback in callbacks:
                self.remove_callback(callback)

    def _check_reference(self, wanted: str | bool | None) -> None:
        """TRL's `sync_ref_model` moves the reference, which no checkpoint of its trainers holds."""
        if not getattr(self.args, "sync_ref_model", False):
            return
        problem = "with `sync_ref_model: true` the reference moves with the policy, and is in no checkpoint"
        if wanted:
            raise InputError(f"{problem}: this run cannot resume. Start it again, or without `sync_ref_model`")
        logger.warning("%s: a run that stops cannot resume, it can only start again.", problem)

    def _stopped(self, run_dir: Path, signum: int, command: str) -> Stopped:
        message = (
            f"stopped by {signal.Signals(signum).name} after step {self.state.global_step} of {self.state.max_steps}; "
            f"all is saved in {checkpoints(run_dir)[-1]}. Resume with:\n    {command}"
        )
        if self.accelerator.is_main_process:
            print(message, flush=True)
        self.accelerator.wait_for_everyone()  # where one process ends first, the launcher ends the others
        return Stopped(signum, message)

    # --- saving -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written_beside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        last = next(reversed(checkpoints(run_dir)), None)
        with explain_full_disk(Path(self.args.output_dir), f"checkpoint-{step}", last):
            try:
                self._write_checkpoint(model, trial, run_dir)
            finally:
                self._written_beside = None
                if self.args.should_save:
                    discard_checkpoint(run_dir, step)

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_dir: Path) -> None:
        """Every process writes its share beside the checkpoint's place; then one moves it there."""
        args, state = self.args, self.state
        if args.should_save:
            start_checkpoint(run_dir, state.global_step)
        self.accelerator.wait_for_everyone()
        self._written_beside = unfinished(run_dir, state.global_step)
        only_model = args.save_only_model
        try:
            args.save_only_model = only_model and not self.asked_to_stop  # a stopped run is to be resumed
            super()._save_checkpoint(model, trial)
        finally:
            args.save_only_model = only_model
        if state.best_model_checkpoint and Path(state.best_model_checkpoint).parent == self._written_beside:
            state.best_model_checkpoint = str(run_dir / Path(state.best_model_checkpoint).name)
            if args.should_save:
                state.save_to_json(str(self._written_beside / f"checkpoint-{state.global_step}" / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if args.should_save:
            set_later_aside(run_dir, state.global_step)
            checkpoint = finish_checkpoint(run_dir, state.global_step)
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            remove_oldest(run_dir, args.save_total_limit, keep=[checkpoint, *best])
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if hasattr(self, "_tr_loss"):  # PPO has a loop of its own, which sums nothing over steps
            save_loop_state(self, Path(output_dir))

    # --- resuming -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The loader, its order a function of the seed."""
        config = self.accelerator.dataloader_config
        if config.data_seed is None:  # else it is what the global generator was last seeded with, by whomever
            config.data_seed = self.args.seed
        return super().get_train_dataloader()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled:
            load_full_weights(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _restore_loop(self, checkpoint: Path) -> None:
        load_loop_state(self, checkpoint)
        best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if best is not None and (checkpoint.parent / Path(best).name).is_dir():  # also where the run has been moved
            self.state.best_model_checkpoint = str(checkpoint.parent / Path(best).name)

    # --- the end ------------------------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # else a run resumed at its end takes one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # With a limit of 1, upstream deletes all but the best here: the last one too, before the model is saved.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # Steps and seconds of the run's earlier parts count too, as the sum of the losses does.
            return super()._finalize_training(trial, num_train_samples, min(start_time, self.loop_started))
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self.accelerator.is_main_process:
            check_manifest(best)
        self.accelerator.wait_for_everyone()
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            load_full_weights(self.model, best)
        else:
            super()._load_best_model()
