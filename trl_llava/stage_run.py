"""What every entry point does before its models are loaded, and with its trainer."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DatasetMixtureConfig

from trl_llava.card_samples import write_samples
from trl_llava.configs.faulty_field import OF_VALUES, about_a_field
from trl_llava.configs.recipe import Recipe, make_parser
from trl_llava.configs.stages import LlavaModelConfig, LlavaScriptArguments
from trl_llava.configs.vllm import require_vllm
from trl_llava.data.contract import Stage
from trl_llava.data.splits import load_splits
from trl_llava.errors import ExplainedError, InputError, MissingPackageError
from trl_llava.models.gpu_kernels import check_gpu_kernels, choose_attention_kernels
from trl_llava.publish.model_card import card_facts, write_card_of
from trl_llava.publish.repository import Repository, claim_repository
from trl_llava.publish.trainer import PushAtSaves
from trl_llava.run import output_dir
from trl_llava.run.console import quiet_libraries

OWN_PACKAGE = frozenset(
    {"clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"}
)
"""Values of `report_to` that are the name of the package they need."""

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
Main = TypeVar("Main", bound=Callable[..., Any])


@dataclass
class StageRun:
    """A run whose folder and repository are its own, with what its recipe says."""

    stage: str
    script_args: LlavaScriptArguments
    training_args: Any
    model_args: LlavaModelConfig
    mixture: DatasetMixtureConfig
    recipe: Recipe
    checkpoint: str | None  # what the run goes on from; None for a new one
    repository: Repository | None  # where it is pushed to; None if it is not

    def load_rows(self, stage: Stage, *, require_captions: bool = False) -> tuple[Dataset, Dataset | None]:
        """The checked rows for training and evaluation."""
        return load_splits(
            self.script_args,
            self.mixture,
            self.training_args,
            stage,
            require_captions=require_captions,
            dataset_num_proc=self.training_args.dataset_num_proc,
        )

    def train(self, trainer: AnyTrainer, base: str) -> AnyTrainer:
        """Trains, and leaves in the folder and on the Hub what belongs there; `base` is for the model card."""
        trainer.create_model_card = functools.partial(write_card_of, trainer, self.stage, base, self.recipe.values)
        samples = functools.partial(write_samples, trainer, self.script_args.card_samples)
        push = None
        if self.repository is not None:
            push = PushAtSaves(trainer, self.repository, samples, end_follows=True)
            trainer.add_callback(push)
        output_dir.record(self.training_args, self.recipe)
        if trainer.is_world_process_zero():  # `trl-llava push` reads them when this process is gone
            card_facts(trainer, self.stage, base, self.recipe.values).save(Path(self.training_args.output_dir))
        trainer.train(resume_from_checkpoint=self.checkpoint)
        output_dir.finish(trainer, self.script_args.dataset_name)
        if push is not None:
            push.end()
        return trainer


def begin(stage: str, args: Sequence[str] | None) -> StageRun:
    """Reads the recipe, and claims the run's folder and repository, before anything that takes time.

    Whatever can be found wrong by now is an error here: the recipe, missing packages, a folder of another run.
    """
    parsed = make_parser(stage).parse(sys.argv[1:] if args is None else args)
    script_args, training_args, model_args, _, recipe = parsed
    _check_packages(training_args)
    check_gpu_kernels(training_args, model_args.attn_implementation)
    choose_attention_kernels(model_args.cudnn_attention)
    model_args.trust_remote_code = training_args.trust_remote_code
    quiet_libraries(training_args)
    _keep_to_cpus(training_args)
    checkpoint = output_dir.claim(training_args, recipe)
    resuming = output_dir.wants_resume(training_args)  # also from the first step, if it was killed before it had more
    repository = claim_repository(training_args, script_args, model_args, recipe, resuming=resuming)
    return StageRun(stage, *parsed, checkpoint, repository)


def _keep_to_cpus(args: TrainingArguments) -> None:
    """No more loading processes than CPUs, of which torch would warn in every epoch; they change no result."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.dataloader_num_workers > here:
        if args.process_index == 0:
            found = f"{args.dataloader_num_workers} of the recipe, as there are so many CPUs"
            print(f"dataloader_num_workers: {here} instead of the {found}", file=sys.stderr)
        args.dataloader_num_workers = here


def explains(stage: str) -> Callable[[Main], Main]:
    """Decorates a stage's `main`: an error that a library raises about a field of the recipe is one line."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def explaining(args: Sequence[str] | None = None) -> Any:
            try:
                return main(args)
            except ExplainedError:
                raise
            except OF_VALUES as error:
                recipe = make_parser(stage).check(sys.argv[1:] if args is None else args)
                text = about_a_field(error, recipe.given)
                if text is None:
                    raise
                raise InputError(text) from error

        return explaining  # type: ignore[return-value]  # the same signature

    return decorate


def _check_packages(args: TrainingArguments) -> None:
    """Stops for a package that would be missed only when all models are loaded."""
    if getattr(args, "use_vllm", False):
        require_vllm(args)
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"`report_to`: {name!r} is none of {', '.join(INTEGRATION_TO_CALLBACK)}")
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
        if name in OWN_PACKAGE and not any(map(find_spec, packages)):
            raise MissingPackageError(f"`report_to: {name}` needs {name}: `pip install {name}`, or leave it out")
