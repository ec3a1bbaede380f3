"""DeepSpeed's own files in a checkpoint, which it unpickles: looked through before it does.

DeepSpeed loads with `weights_only=False`, so that whatever a file names would be called. What it writes itself names
three classes of its own, and tensors.
"""

from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

from torch.serialization import get_unsafe_globals_in_checkpoint

from trl_llava.run.manifest import DamagedCheckpointError

WRITTEN_BY_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def check_deepspeed_files(checkpoint: Path) -> None:
    """Refuse DeepSpeed's files if reading them would call anything but what DeepSpeed writes.

    Nothing of them is run; a checkpoint without DeepSpeed passes.

    Args:
        checkpoint: The folder, with `global_step*` in it where DeepSpeed wrote.

    Raises:
        DamagedCheckpointError: If a file would call something else, or is none of torch's.
    """
    for file in sorted(checkpoint.glob("global_step*/**/*.pt")):
        try:
            called = set(get_unsafe_globals_in_checkpoint(file)) - WRITTEN_BY_DEEPSPEED
        except (BadZipFile, UnpicklingError, RuntimeError, ValueError) as error:
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint} is refused: {file.relative_to(checkpoint)} is not a file that torch writes "
                f"({' '.join(str(error).split())[:200]}). Nothing of it was run. Go on from another checkpoint"
            ) from error
        if called:
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint} is refused: {file.relative_to(checkpoint)} has more than DeepSpeed writes, "
                f"it would call {', '.join(sorted(called))}. Nothing of it was run. Go on from another checkpoint"
            )
