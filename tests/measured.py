"""What real steps hold in memory on the CPU, and what the plan says of them.

Measured is the peak of live storage, as `MemoryTrace` counts it, over two real steps. Rows differ in length, so that
there are padding masks, as in any real batch; the longest is the plan's.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset, Image, List
from PIL import Image as Pictures
from torch.utils._python_dispatch import _disable_current_modes

from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.tools.plan.command import need_of
from trl_llava.tools.plan.job import Job, Settings
from trl_llava.tools.plan.memory_trace import MemoryTrace
from trl_llava.tools.plan.processes import Processes

QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_length": None}


def question(count: int = 1) -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is in the picture? " * count}]


def answer(count: int) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": "There is a red square. " * count}]


def with_pictures(**columns: list[Any]) -> Dataset:
    """Rows, each with a picture of its own."""
    count = len(next(iter(columns.values())))
    pictures = [[Pictures.new("RGB", (40, 32), (20 * index, 0, 0))] for index in range(count)]
    return Dataset.from_dict({**columns, "images": pictures}).cast_column("images", List(Image()))


@contextmanager
def logits_folded_in_place() -> Any:
    """What torch takes to fold TRL's tiles of logits (1.16 and newer) is left out: a GPU's kernel does it in place."""
    with ExitStack() as stack:
        if find_spec("trl.kernels") is not None:
            from trl.kernels import chunked_logprob

            for name in ("_forward_tile", "_backward_tile"):
                untraced = _disable_current_modes()(getattr(chunked_logprob, name))
                stack.enter_context(patch.object(chunked_logprob, name, untraced))
        yield


def peak_of(trainer: Any, *others: Any) -> int:
    """The peak of training; `others` are models besides the trainer's."""
    with logits_folded_in_place(), MemoryTrace() as trace:
        for model in (trainer.model, *others):
            trace.hold([*model.parameters(), *model.buffers()], "weights")
        trainer.train()
    return trace.peak


def longest(trainer: Any) -> int:
    return trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape[1]


def planned(stage: str, args: Any, model_args: LlavaModelConfig, length: int, **changes: Any) -> int:
    settings = Settings(
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing,
        four_bit=model_args.load_in_4bit,
    )
    job = Job(stage, args, model_args, Processes(), images=1, length=length, **changes)
    return need_of(job, settings).worst.total


def fields_for(base: Path, **changes: Any) -> LlavaModelConfig:
    return LlavaModelConfig(
        **{"model_name_or_path": str(base), "dtype": "float32", "use_peft": True, "lora_r": 16, **changes}
    )


def phases_of(trainer: Any, *others: Any) -> Counter[str]:
    """The peak of each phase of PPO; `others` are models that it was given."""
    peaks: Counter[str] = Counter()
    with MemoryTrace() as trace:
        for model in (trainer.model, *others):
            trace.hold([*model.parameters(), *model.buffers()], "weights")
        phase = trainer.clock.phase

        @contextmanager
        def measured(name: str) -> Any:
            trace.restart()
            with phase(name):
                yield
            peaks[name] = max(peaks[name], trace.peak)

        trainer.clock.phase = measured
        trainer.train()
    return peaks
