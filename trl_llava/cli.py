"""The `trl-llava` command: the stages through `accelerate launch`, and tools around their checkpoints."""

import argparse
import ast
import difflib
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import trl_llava
from trl_llava.configs.shipped import recipe_path
from trl_llava.errors import ExplainedError, RecipeError
from trl_llava.run.launch import (
    COMMAND_VARIABLE,
    LEFT_TO_TORCHRUN,
    accelerate_config_names,
    find_accelerate_config,
    signals_passed_on,
    start_all_processes,
)

STAGES = {
    "sft": "stage 1: fine-tune a policy on conversations about images",
    "reward": "stage 2: train the factual reward model on preferences",
    "ppo": "stage 3: PPO with the factual reward",
    "grpo": "instead of stage 3: GRPO with the factual reward",
    "rloo": "instead of stage 3: RLOO with the factual reward",
    "dpo": "instead of stages 2 and 3: DPO on the preferences",
}
TOOLS = {
    "demo": ("trl_llava.demo.run", "all three stages in minutes, on a drawn world"),
    "init": ("trl_llava.tools.init.command", "recipes for a folder of one's own images and rows"),
    "check-data": ("trl_llava.tools.check_data.check_data", "walk all rows of a recipe, without a model"),
    "families": ("trl_llava.tools.families", "the models that the stages know, as a table"),
    "plan": ("trl_llava.tools.plan.command", "the memory that a recipe will need, and what fits"),
    "report": ("trl_llava.tools.report.command", "a page that shows what a run did, or how several compare"),
    "push": ("trl_llava.publish.push_later", "push a run that lies in a folder to the Hub"),
    "eval": ("trl_llava.tools.evaluate.command", "how much models invent and how right they are, with intervals"),
    "eval-reward": ("trl_llava.tools.evaluate.eval_reward", "how often a reward model prefers what people prefer"),
    "generate": ("trl_llava.tools.evaluate.generate", "completions of a model for rows of data, as JSON lines"),
    "chat": ("trl_llava.tools.evaluate.chat", "talk with a model about an image, in the terminal"),
    "score": ("trl_llava.tools.score", "score one completion, or every row of a data set, with a reward model"),
    "convert": ("trl_llava.tools.convert.command", "the paper's or LLaVA's own checkpoint -> one that loads anywhere"),
    "assemble": ("trl_llava.tools.assemble", "a vision tower and a language model -> a LLaVA to train"),
    "env": ("trl_llava.tools.env", "versions, cards and settings of this machine, for a bug report"),
    "merge": ("trl_llava.tools.convert.merge_command", "an adapter and its base -> one model with dense weights"),
}
LAUNCH_HELP = """
launching:
  --num_processes N            processes (default: one per GPU)
  --accelerate_config NAME     a file, or one of {names}
  Any other option of `accelerate launch` works too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Command line without the program's name; by default that of the process.

    Returns:
        Exit status: 0, 2 if the command line or recipe cannot be used, 1 for anything else that went wrong. A stage
            that has been launched and fails ends this process with 1, whatever was the matter: the launcher does.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trl-llava", description=trl_llava.__doc__)
    parser.add_argument("--version", action="version", version=f"trl-llava {trl_llava.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in {**STAGES, **{name: text for name, (_, text) in TOOLS.items()}}.items():
        commands.add_parser(name, help=text, add_help=False)
    words = list(argv) or ["--help"]
    try:
        _check_command(words[0])
        command = parser.parse_known_args(words[:1])[0].command
        if command in STAGES:
            return launch_stage(command, words[1:])
        return importlib.import_module(TOOLS[command][0]).main(words[1:]) or 0
    except ExplainedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _check_command(word: str) -> None:
    """Name what a misspelt command may have meant, instead of all of them."""
    commands = (*STAGES, *TOOLS)
    if word in commands or word.startswith("-"):
        return
    close = difflib.get_close_matches(word.lower().removeprefix("train_").replace("_", "-"), commands, n=1, cutoff=0.5)
    meant = f"; did you mean `{close[0]}`?" if close else "; `trl-llava --help` lists them."
    raise RecipeError(f"there is no command `{word}`{meant}")


def launch_stage(stage: str, words: Sequence[str]) -> int:
    """Checks the recipe, then starts the stage with `accelerate launch`, as `trl` does.

    Returns 0; 1 if one of several processes failed (a single one that fails ends this process, with 1 too); 128 +
    signal after SIGTERM or Ctrl-C, once the processes have saved.
    """
    _check_recipe_is_there(words)
    from trl_llava.configs.recipe import make_parser
    from trl_llava.configs.stage_help import short_help

    parser = make_parser(stage, f"trl-llava {stage}")
    if {"-h", "--help", "--help-all", "--help_all"} & set(words):
        print(_what_it_does(stage))
        print(short_help(parser) if {"-h", "--help"} & set(words) else parser.format_help())
        print(LAUNCH_HELP.format(names=", ".join(accelerate_config_names())))
        return 0
    if not words:
        raise RecipeError(f"give a recipe: `trl-llava {stage} --config recipe.yaml`; --help lists its keys.")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch_parser = launch_command_parser()
    launch_parser.error = _refuse_launch_option
    launch, training = split_arguments(words, parser.field_names, launch_parser)
    parser.check(training)
    # --quiet: the stage has already said what is wrong, the launcher's own traceback would only hide it.
    command = [*_complete(launch), "--quiet", "-m", f"trl_llava.train_{stage}", *training]
    options = launch_parser.parse_args(command)
    start_all_processes(options)
    options.signals_to_handle = LEFT_TO_TORCHRUN
    own_words = json.dumps(["trl-llava", stage, *words])
    with signals_passed_on() as received, patch_environment(**{COMMAND_VARIABLE: own_words}):
        try:
            launch_command(options)
        except SystemExit:  # the one process failed, and has said why
            if not received:
                raise
        except ChildFailedError as error:  # of several processes; the one that failed has said why
            rank, failure = error.get_first_failure()
            if not received:
                status = f"exit status {failure.exitcode}"
                print(f"error: {stage} ended, because its process {rank} did ({status})", file=sys.stderr)
                return 1
    return 128 + received[0] if received else 0


def _check_recipe_is_there(words: Sequence[str]) -> None:
    """Miss a recipe at once: what reads it imports for seconds."""
    path = recipe_path(words)
    if path is not None and not Path(path).exists():
        raise RecipeError(f"cannot read the recipe {path}: No such file or directory.")


def _what_it_does(stage: str) -> str:
    """What the stage's entry point says of itself; read, as importing it takes seconds."""
    source = Path(__file__).with_name(f"train_{stage}.py").read_text(encoding="utf-8")
    return f"{ast.get_docstring(ast.parse(source))}\n"


def split_arguments(
    words: Sequence[str], fields: frozenset[str], launch_parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """Splits a command line into options of `accelerate launch` and recipe fields; a name of both is the recipe's."""
    flags = [flag for action in launch_parser._actions for flag in action.option_strings if flag.startswith("--")]
    options = {"accelerate_config", *(flag[2:].replace("-", "_") for flag in flags)}
    launch: list[str] = []
    training: list[str] = []
    target = training
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if name == "config" or name in fields or name.removeprefix("no_") in fields:
                target = training
            elif name in options:
                target = launch
            else:
                close = difflib.get_close_matches(name, [*fields, *options], n=1)
                raise RecipeError(f"unknown option `{word}`" + (f"; did you mean `--{close[0]}`?" if close else "."))
        target.append(word)
    return launch, training


def _refuse_launch_option(message: str) -> NoReturn:
    """The launcher's parser would print all of its options first."""
    raise RecipeError(f"command line: {message}.")


def _complete(launch: list[str]) -> list[str]:
    """Resolves the configuration's name, and says explicitly what `accelerate launch` would warn about."""
    from accelerate.commands.config.config_args import default_config_file

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse_launch_option  # type: ignore[method-assign]
    parser.add_argument("--accelerate_config", "--accelerate-config")
    known, words = parser.parse_known_args(launch)
    config = find_accelerate_config(known.accelerate_config) if known.accelerate_config else None
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words}
    extra = [] if config is None else ["--config_file", str(config)]
    if "num_processes" not in given:
        extra += ["--num_processes", str(_default_processes(config))]
    if config is None and "config_file" not in given and not Path(default_config_file).is_file():
        for name, value in (("num_machines", "1"), ("mixed_precision", "no"), ("dynamo_backend", "no")):
            extra += [] if name in given else [f"--{name}", value]
    return extra + words


def _default_processes(config: Path | None) -> int:
    """One process per GPU; one where the configuration, or the machine, has none."""
    import torch
    import yaml

    wanted = yaml.safe_load(config.read_text(encoding="utf-8")).get("num_processes", -1) if config else -1
    return int(wanted) if wanted > 0 else max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
