"""A plan of memory as text and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_llava.memory_model import PARTS, Moment
from trl_llava.plan_stages import Job, Settings

GIB = 2**30


@dataclass
class Plan:
    """What a recipe needs, and what would fit.

    Attributes:
        job: The stage.
        settings: The recipe's own settings.
        moments: The worst moment of each phase with them.
        limit: Bytes that there are, without the reserve.
        fitting: Settings that fit, with the bytes they need, the fastest first.
        least: The settings that need least.
    """

    job: Job
    settings: Settings
    moments: list[Moment]
    limit: int
    fitting: list[tuple[Settings, int]]
    least: tuple[Settings, int]

    @property
    def worst(self) -> Moment:
        """The phase that decides.

        Returns:
            Its worst moment.
        """
        return max(self.moments, key=lambda moment: moment.total)


def print_plan(console: Console, plan: Plan, gpu_memory: float, reserve: float) -> None:
    """Prints parts and settings.

    Args:
        console: Where to.
        plan: The plan.
        gpu_memory: GiB of one GPU.
        reserve: GiB of them that are not for tensors.
    """
    job, worst = plan.job, plan.worst
    processes = f"{job.processes.count} processes" if job.processes.count > 1 else "one process"
    shared = f", ZeRO-{job.processes.zero_stage}" if job.processes.zero_stage else ""
    console.print(
        f"{job.stage}: {job.model_args.model_name_or_path or job.fallback}, {processes}{shared}", markup=False
    )
    console.print(describe(plan.settings), markup=False)
    table = Table("GiB", *[moment.phase for moment in plan.moments])
    for part in PARTS:
        if any(moment.parts[part] for moment in plan.moments):
            table.add_row(part, *[f"{moment.parts[part] / GIB:.2f}" for moment in plan.moments])
    table.add_section()
    table.add_row("in all", *[f"{moment.total / GIB:.2f}" for moment in plan.moments])
    console.print(table)
    room = f"{gpu_memory:g} GiB, of which {reserve:g} for CUDA itself and fragments"
    verdict = "fits" if worst.total <= plan.limit else "does not fit"
    console.print(f"{worst.total / GIB:.2f} GiB {verdict} in {room}.", markup=False)
    if plan.fitting:
        console.print("Largest micro-batches that fit, with the same rows per step:", markup=False)
        for settings, need in plan.fitting:
            console.print(f"  {need / GIB:6.2f} GiB  {describe(settings)}", markup=False)
    else:
        settings, need = plan.least
        console.print(f"Nothing fits. Least is {need / GIB:.2f} GiB: {describe(settings)}", markup=False)


def describe(settings: Settings) -> str:
    """Settings as options of the command line.

    Args:
        settings: The settings.

    Returns:
        The options.
    """
    words = [
        f"--per_device_train_batch_size {settings.rows}",
        f"--gradient_accumulation_steps {settings.accumulation}",
        f"--gradient_checkpointing {str(settings.checkpointing).lower()}",
        f"--load_in_4bit {str(settings.four_bit).lower()}",
    ]
    if settings.rollout_rows is not None:
        words.append(f"--local_rollout_forward_batch_size {settings.rollout_rows}")
    return " ".join(words)


def as_dict(plan: Plan, gpu_memory: float, reserve: float) -> dict[str, Any]:
    """The plan as JSON takes it; sizes in bytes.

    Args:
        plan: The plan.
        gpu_memory: GiB of one GPU.
        reserve: GiB of them that are not for tensors.

    Returns:
        Stage, processes, limit, settings, phases with their parts, what fits and what needs least.
    """
    return {
        "stage": plan.job.stage,
        "processes": asdict(plan.job.processes),
        "gpu_memory_gib": gpu_memory,
        "reserve_gib": reserve,
        "settings": asdict(plan.settings),
        "phases": {moment.phase: {**moment.parts, "total": moment.total} for moment in plan.moments},
        "total": plan.worst.total,
        "fits": plan.worst.total <= plan.limit,
        "fitting": [{**asdict(settings), "total": need} for settings, need in plan.fitting],
        "least": {**asdict(plan.least[0]), "total": plan.least[1]},
    }
