"""A plan of memory as text and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_llava.ppo.generation_batches import GIB
from trl_llava.tools.plan.job import PARTS, Job, Need, Settings


@dataclass
class Plan:
    """What a recipe's own settings need, and what would fit, in bytes; `least` are the settings that need least."""

    job: Job
    settings: Settings
    own: Need
    fitting: list[tuple[Settings, int]]
    least: tuple[Settings, int]

    @property
    def fits(self) -> bool:
        """Whether the recipe fits as it is."""
        return self.job.limit is not None and self.own.worst.total <= self.job.limit


def print_need(console: Console, job: Job, settings: Settings, need: Need, gpu_memory: float, reserve: float) -> None:
    """Prints what the recipe needs as it is."""
    processes = f"{job.processes.count} processes" if job.processes.count > 1 else "one process"
    shared = f" under ZeRO-{job.processes.zero_stage}" if job.processes.zero_stage else ""
    model = job.model_args.model_name_or_path or getattr(job.args, "sft_model_path", None) or job.sources.base
    longest = "longest prompt" if job.stage == "ppo" else "longest row"
    console.print(f"{job.stage}: {model}, {processes}{shared}, {longest} {job.length} tokens", markup=False)
    console.print(f"As the recipe is: {describe(settings)}", markup=False)
    table = Table("GiB of a GPU", *[moment.phase for moment in need.moments])
    for part in PARTS:
        if any(moment.parts[part] for moment in need.moments):
            table.add_row(part, *[_gib(moment.parts[part]) for moment in need.moments])
    table.add_section()
    table.add_row("in all", *[_gib(moment.total) for moment in need.moments])
    console.print(table)
    limit = int((gpu_memory - reserve) * GIB)
    verdict = "fits" if need.worst.total <= limit else "does not fit"
    room = f"{gpu_memory:g} GiB, of which {reserve:g} stay free for CUDA itself and fragmentation (--reserve)"
    console.print(f"It {verdict}: {_gib(need.worst.total)} GiB ({need.worst.phase}) in {room}.", markup=False)
    if need.host:
        made = _gib(need.host["image features of a step"])
        console.print(f"Besides, on the CPU, each process: {made} GiB of image features of a step", markup=False)
    for note in need.notes:
        console.print(f"- {note}", markup=False)


def print_fitting(console: Console, plan: Plan) -> None:
    """Prints the settings that fit."""
    if not plan.fitting:
        settings, need = plan.least
        console.print(f"Nothing fits. Least is {_gib(need)} GiB: {describe(settings)}", markup=False)
        return
    console.print("Largest micro-batches that fit, with the same rows per step:", markup=False)
    for settings, need in plan.fitting:
        console.print(f"  {_gib(need):>6} GiB  {describe(settings)}", markup=False)
    if not plan.fits:
        settings, need = best(plan)
        console.print(f"For the recipe, {_gib(need)} GiB:", markup=False)
        for field, value in fields_of(settings).items():
            console.print(f"  {field}: {value}", markup=False)


def best(plan: Plan) -> tuple[Settings, int]:
    """The settings that change least of what a recipe says of precision, and run most rows at once."""
    return max(plan.fitting, key=lambda pair: (pair[0].four_bit == plan.settings.four_bit, pair[0].rows))


def fields_of(settings: Settings) -> dict[str, str]:
    """Settings as the recipe's fields."""
    fields = {
        "per_device_train_batch_size": str(settings.rows),
        "gradient_accumulation_steps": str(settings.accumulation),
        "gradient_checkpointing": str(settings.checkpointing).lower(),
        "load_in_4bit": str(settings.four_bit).lower(),
    }
    if settings.rollout_rows is not None:
        fields["local_rollout_forward_batch_size"] = str(settings.rollout_rows)
    return fields


def describe(settings: Settings) -> str:
    """Settings as options of the command line."""
    return " ".join(f"--{field} {value}" for field, value in fields_of(settings).items())


def _gib(size: int) -> str:
    if size >= 0.005 * GIB:
        return f"{size / GIB:.2f}"
    return "<0.01" if size else "0"


def as_dict(plan: Plan, gpu_memory: float, reserve: float) -> dict[str, Any]:
    """The plan as JSON takes it; sizes in bytes."""
    return {
        "stage": plan.job.stage,
        "processes": asdict(plan.job.processes),
        "gpu_memory_gib": gpu_memory,
        "reserve_gib": reserve,
        "settings": asdict(plan.settings),
        "phases": {moment.phase: {**moment.parts, "total": moment.total} for moment in plan.own.moments},
        "cpu": dict(plan.own.host),
        "notes": plan.own.notes,
        "total": plan.own.worst.total,
        "fits": plan.fits,
        "fitting": [{**asdict(settings), "total": need} for settings, need in plan.fitting],
        "least": {**asdict(plan.least[0]), "total": plan.least[1]},
    }
