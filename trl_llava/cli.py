"""The `trl-llava` command: the three stages through `accelerate launch`, and tools around their checkpoints."""

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import trl_llava
from trl_llava.errors import ExplainedError, InputError, RecipeError
from trl_llava.run.launch import (
    COMMAND_VARIABLE,
    LEFT_TO_TORCHRUN,
    config_folder,
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
LAUNCH_HELP = """
launching:
  --num_processes N            processes (default: one per GPU)
  --accelerate_config NAME     a file, or one of {names} in accelerate_configs/ of a checkout
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
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser()
    if words[:1] == ["demo"]:
        return importlib.import_module("trl_llava.demo.run").main(words[1:]) or 0
    try:
        if words and words[0] in STAGES:
            return launch_stage(words[0], words[1:])
        if words[:1] == ["check-data"]:
            return importlib.import_module("trl_llava.tools.check_data.check_data").main(words[1:])
        if words[:1] == ["plan"]:
            return importlib.import_module("trl_llava.tools.plan.command").main(words[1:])
        if words[:1] == ["push"]:
            return importlib.import_module("trl_llava.publish.push_later").main(words[1:])
        args = parser.parse_args(words or ["--help"])
        return {"score": _score, "convert": _convert, "merge": _merge}[args.command](args)
    except ExplainedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def launch_stage(stage: str, words: Sequence[str]) -> int:
    """Checks the recipe, then starts the stage with `accelerate launch`, as `trl` does.

    Args:
        stage: One of `STAGES`.
        words: Recipe, overrides and launch options.

    Returns:
        0; 1 if one of several processes failed (a single one that fails ends this process, with 1 too); 128 + signal
            after SIGTERM or Ctrl-C, once the processes have saved.

    Raises:
        RecipeError: If the recipe or an option cannot be used.
    """
    parser = importlib.import_module(f"trl_llava.train_{stage}").make_parser(f"trl-llava {stage}")
    if {"-h", "--help"} & set(words):
        parser.print_help()
        names = ", ".join(sorted(path.stem for path in config_folder().glob("*.yaml"))) or "the names"
        print(LAUNCH_HELP.format(names=names))
        return 0
    if not words:
        raise RecipeError(f"give a recipe: `trl-llava {stage} --config recipe.yaml`; --help lists its keys.")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    own_words = ["trl-llava", stage, *words]
    launch_parser = launch_command_parser()
    launch_parser.error = _refuse_launch_option
    launch, training = split_arguments(words, parser.field_names, launch_parser)
    parser.check(training)
    # --quiet: the stage has already said what is wrong, the launcher's own traceback would only hide it.
    command = [*_complete(launch), "--quiet", "-m", f"trl_llava.train_{stage}", *training]
    options = launch_parser.parse_args(command)
    start_all_processes(options)
    options.signals_to_handle = LEFT_TO_TORCHRUN
    with signals_passed_on() as received, patch_environment(**{COMMAND_VARIABLE: json.dumps(own_words)}):
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


def split_arguments(
    words: Sequence[str], fields: frozenset[str], launch_parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """Tells launch options from recipe fields; a name that both have is the recipe's.

    Args:
        words: The command line.
        fields: The recipe's fields.
        launch_parser: The parser of `accelerate launch`.

    Returns:
        Words for the launcher, and words for the stage.

    Raises:
        RecipeError: If an option is neither.
    """
    options = {
        name.lstrip("-").replace("-", "_")
        for action in launch_parser._actions
        for name in action.option_strings
        if name.startswith("--")
    } | {"accelerate_config"}
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

    words, config = [], None
    pending = iter(launch)
    for word in pending:
        if word.partition("=")[0].replace("-", "_") == "__accelerate_config":
            value = word.partition("=")[2] or next(pending, "")
            if not value:
                raise RecipeError("--accelerate_config needs a name or a file.")
            config = find_accelerate_config(value)
        else:
            words.append(word)
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


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-llava", description=trl_llava.__doc__)
    parser.add_argument("--version", action="version", version=f"trl-llava {trl_llava.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in STAGES.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("demo", help="all three stages in minutes, on a drawn world", add_help=False)
    commands.add_parser("check-data", help="walk all rows of a recipe, without a model", add_help=False)
    commands.add_parser("plan", help="the memory that a recipe will need, and what fits", add_help=False)
    commands.add_parser("push", help="push a run that lies in a folder to the Hub", add_help=False)
    score = commands.add_parser("score", help="score one answer with a factual reward model")
    score.add_argument("--reward_model", required=True, help="FactualReward checkpoint: Hub ID or folder")
    score.add_argument("--image", required=True, help="image file")
    score.add_argument("--question", required=True)
    score.add_argument("--answer", required=True)
    score.add_argument(
        "--caption", action="append", default=[], help="a caption of the image; may be given many times"
    )
    score.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    _add_checkpoint_tools(commands)
    return parser


def _add_checkpoint_tools(commands: Any) -> None:
    convert = commands.add_parser("convert", help="the paper's or LLaVA's own checkpoint -> one that loads anywhere")
    convert.add_argument("source", metavar="SRC", help="folder, or Hub ID with the folder inside (org/name/sft_model)")
    convert.add_argument("target", metavar="DST", help="new folder")
    convert.add_argument("--base", help="for adapters: Hub ID or folder of the converted base; the adapter names it")
    convert.add_argument("--base_folder", help="where that base is now, if not yet on the Hub")
    convert.add_argument("--base_revision", help="branch, tag or commit of the base")
    convert.add_argument("--value_base", help="for PPO checkpoints: base of the value model, if it has its own")
    convert.add_argument("--vision_tower", help="for models: CLIP folder or Hub ID, if not as config.json says")
    convert.add_argument(
        "--no_captions", action="store_true", help="for reward models: trained on judging prompts without captions"
    )
    convert.add_argument("--revision", help="branch, tag or commit of SRC")
    merge = commands.add_parser("merge", help="an adapter and its base -> one model with dense weights")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or Hub ID")
    merge.add_argument("target", metavar="DST", help="new folder")
    merge.add_argument("--base", help="the base model, if not the one that the adapter names")
    merge.add_argument("--revision", help="branch, tag or commit of ADAPTER")
    merge.add_argument("--quantized", action="store_true", help="merge into a base that is stored in 4 or 8 bits")
    merge.add_argument("--tolerance", type=float, help="largest logit difference to keep, as a share of the largest")


def _score(args: argparse.Namespace) -> int:
    """Prints one number."""
    from transformers.utils import logging as transformers_logging

    from trl_llava.data.contract import RowError
    from trl_llava.data.images import load_image
    from trl_llava.rewards.factual_reward import FactualReward

    transformers_logging.disable_progress_bar()
    try:
        image = load_image(args.image, "--image")
    except RowError as error:
        raise InputError(f"--image: {error.problem}.") from error  # what to do about a row is of no use here
    reward = FactualReward.from_pretrained(args.reward_model, revision=args.revision)
    if reward.needs_captions and not args.caption:
        raise RecipeError(f'the reward model {args.reward_model} reads captions: give at least one --caption "...".')
    prompt: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": args.question}]}
    ]
    completion = [{"role": "assistant", "content": args.answer}]
    scores = reward(prompts=[prompt], completions=[completion], images=[[image]], captions=[args.caption or None])
    print(f"{scores[0]:.4f}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    """Prints what was converted, and where its parts came from."""
    from trl_llava.tools.convert.convert_checkpoint import convert

    options = ("base", "base_folder", "base_revision", "value_base", "vision_tower", "revision")
    given = {name: getattr(args, name) for name in options}
    kind, notes = convert(args.source, args.target, with_captions=not args.no_captions, **given)
    print("\n".join([f"{args.source}: {kind} -> {args.target}", *(f"  {note}" for note in notes)]))
    return 0


def _merge(args: argparse.Namespace) -> int:
    """Prints how far the merged model is from base and adapter."""
    from trl_llava.tools.convert.merge import merge

    check = merge(
        args.adapter,
        args.target,
        base=args.base,
        revision=args.revision,
        quantized=args.quantized,
        tolerance=args.tolerance,
    )
    print(
        f"{args.adapter} -> {args.target} ({check.dtype}): largest logit difference {check.largest_difference:.3g} on "
        f"a probe batch; largest logit {check.largest_logit:.3g}, the adapter moves logits by up to "
        f"{check.adapter_effect:.3g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
