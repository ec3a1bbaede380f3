"""One PPO step beside what people would otherwise run.

    python -m benchmarks.ppo_step [--only time|memory] [--json FILE] [--runs 5]

Time, against (a) TRL's own `PPOTrainer` on text of the same token counts: it cannot see images; (b) the paper's
schedule in our trainer: image features recomputed in every pass, answers padded to `response_length`, logits of all
positions, a backward pass for the policy and one for the value model. Peak memory, with gradient checkpointing and
micro-batches of one row as where memory is short, against (c) four copies of the base, one for each role, with the
same adapters; and four whole models, of which policy and value model are trained whole.

Same language model, adapters, batch and micro-batch on all sides that are compared. The lengths of the answers are
forced, to be equal on all sides: a logits processor that runs last bans the stop token until an answer has its length,
and then allows nothing else.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness import quiet, returning_freed_memory, side_by_side, steps_needed
from benchmarks.paper_schedule import PaperSchedule
from benchmarks.ppo_sides import Step, copies_side, our_side, prepare, trl_side, whole_side
from benchmarks.tables import Ratio, arguments, report
from benchmarks.workload import Size

OURS, TRL, PAPER = "ours", "TRL on text", "the paper's schedule"
LOW, COPIES, WHOLE = "ours, low memory", "four copies, low memory", "four whole models, low memory"
RATIOS = {
    "time_vs_trl_on_text": Ratio(OURS, TRL, "seconds", 0.7),
    "time_vs_paper_schedule": Ratio(OURS, PAPER, "seconds", 0.4),
    "peak_memory_vs_four_copies": Ratio(LOW, COPIES, "peak_mib", 0.35),
    "peak_memory_vs_four_whole_models": Ratio(LOW, WHOLE, "peak_mib", 0.35),
}


def measure(step: Step, runs: int, only: str = "") -> list[dict[str, Any]]:
    """Run the sides.

    Args:
        step: What a step does.
        runs: How many steps of each side count.
        only: "time" or "memory" for the sides whose time, or whose memory, is compared; all otherwise.

    Returns:
        What `alternate` returns, of the sides that are timed and of those whose memory is compared.
    """
    low = replace(step, micro_batch=1, epochs=1, low_memory=True)
    timed = {
        OURS: functools.partial(our_side, step=step),
        TRL: functools.partial(trl_side, step=step),
        PAPER: functools.partial(our_side, step=step, trainer_class=PaperSchedule, share_base=False),
    }
    small = {
        LOW: functools.partial(our_side, step=low),
        COPIES: functools.partial(copies_side, step=low),
        WHOLE: functools.partial(whole_side, step=low),
    }
    runs_of_both = []
    if only != "memory":
        runs_of_both += side_by_side(step, prepare, timed, runs, count=list(timed))
    if only != "time":
        with returning_freed_memory():
            runs_of_both += side_by_side(low, prepare, small, runs)
    return runs_of_both


def measured(runs: list[dict[str, Any]]) -> dict[str, Ratio]:
    """The ratios that runs are enough for.

    Args:
        runs: What `measure` returns.

    Returns:
        Name -> ratio, of those whose both sides were run.
    """
    sides = {run["side"] for run in runs}
    return {name: ratio for name, ratio in RATIOS.items() if {ratio.side, ratio.against} <= sides}


def main(words: Sequence[str]) -> None:
    """Measure, and print the tables.

    Args:
        words: The command line without the program's name.
    """
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary, help="tokens of the language model")
    parser.add_argument("--hidden", type=int, default=Size.hidden, help="width of the language model")
    parser.add_argument("--layers", type=int, default=Size.layers, help="layers of the language model")
    parser.add_argument("--image-tokens", type=int, default=Size.image_tokens, help="a square number")
    parser.add_argument("--only", choices=("time", "memory"), default="", help="one half of the measurement")
    options = parser.parse_args(words)
    quiet()
    size = Size(options.vocabulary, options.hidden, options.layers, image_tokens=options.image_tokens)
    runs = measure(Step(size, steps=steps_needed(options.runs)), options.runs, options.only)
    report(runs, measured(runs), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
