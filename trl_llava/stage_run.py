"""What every entry point does before its models are loaded, and with its trainer."""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trl_llava.card_samples import write_samples
from trl_llava.configs.recipe import Recipe
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.errors import InputError, MissingPackageError
from trl_llava.models.gpu_kernels import check_gpu_kernels
from trl_llava.publish.model_card import card_facts, write_card_of
from trl_llava.publish.repository import Repository, claim_repository
from trl_llava.publish.saves import push_saves
from trl_llava.run import output_dir
from trl_llava.run.console import quiet_libraries

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class StageRun:
    """A run whose folder and repository are its own.

    Attributes:
        stage: Name of the stage.
        script_args: Where the rows are.
        training_args: The stage's config.
        recipe: All that was asked for, for recipe.yaml.
        checkpoint: What the run goes on from; None for a new one.
        repository: Where it is pushed to; None if it is not.
    """

    stage: str
    script_args: LlavaScriptArguments
    training_args: TrainingArguments
    recipe: Recipe
    checkpoint: str | None
    repository: Repository | None

    def train(self, trainer: AnyTrainer, base: str) -> AnyTrainer:
        """Train, and leave in the folder and on the Hub what belongs there.

        Args:
            trainer: The trainer.
            base: The base model, for the model card.

        Returns:
            The trainer.
        """
        trainer.create_model_card = functools.partial(write_card_of, trainer, self.stage, base, self.recipe.values)
        samples = functools.partial(write_samples, trainer, self.script_args.card_samples)
        push = push_saves(trainer, self.repository, write_samples=samples, end_follows=True)
        output_dir.record(self.training_args, self.recipe)
        if trainer.is_world_process_zero():  # `trl-llava push` reads them when this process is gone
            card_facts(trainer, self.stage, base, self.recipe.values).save(Path(self.training_args.output_dir))
        trainer.train(resume_from_checkpoint=self.checkpoint)
        output_dir.finish(trainer, self.script_args.dataset_name)
        if push is not None:
            push.end()
        return trainer


def begin(
    stage: str,
    script_args: LlavaScriptArguments,
    training_args: TrainingArguments,
    model_args: LlavaModelConfig,
    recipe: Recipe,
) -> StageRun:
    """Claim the run's folder and repository, before anything that takes time.

    Args:
        stage: Name of the stage.
        script_args: Where the rows are.
        training_args: The stage's config.
        model_args: The models; they trust remote code if the config does.
        recipe: All that was asked for.

    Returns:
        The run.

    Raises:
        InputError: If kernels are asked for that need a GPU, and there is none.
        MissingPackageError: If they, or what `report_to` names, are not installed.
        OutputDirError: If `output_dir` cannot be written or belongs to another run.
    """
    _check_reporters(training_args)
    check_gpu_kernels(training_args, model_args.attn_implementation)
    model_args.trust_remote_code = training_args.trust_remote_code
    quiet_libraries(training_args)
    checkpoint = output_dir.claim(training_args, recipe)
    resuming = output_dir.wants_resume(training_args)  # also from the first step, if it was killed before it had more
    repository = claim_repository(training_args, script_args, model_args, recipe, resuming=resuming)
    return StageRun(stage, script_args, training_args, recipe, checkpoint, repository)


def _check_reporters(args: TrainingArguments) -> None:
    """Stop for a reporter that transformers would only miss when all models are loaded."""
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"`report_to`: {name!r} is none of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name in ("comet_ml", "mlflow", "trackio", "wandb") and find_spec(name) is None:
            raise MissingPackageError(f"`report_to: {name}` needs {name}: `pip install {name}`, or leave it out")
