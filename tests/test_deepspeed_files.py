import pickle
import re
from pathlib import Path

import pytest
import torch

from trl_llava.run.manifest import DamagedCheckpointError, check_deepspeed_files


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def checkpoint(folder: Path, state: object) -> Path:
    (folder / "global_step2").mkdir()
    torch.save(state, folder / "global_step2" / "mp_rank_00_model_states.pt")
    return folder


def test_what_deepspeed_writes_passes(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {"scaler": LossScaler(1.0), "stage": ZeroStageEnum(2), "at": fragment_address(2, 0), "w": torch.ones(2)}
    check_deepspeed_files(checkpoint(tmp_path, state))


def test_a_checkpoint_without_deepspeed_passes(tmp_path: Path) -> None:
    torch.save(Evil(), tmp_path / "optimizer.pt")  # `weights_only` is what refuses that
    check_deepspeed_files(tmp_path)


def test_what_would_call_something_else_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, {"w": torch.ones(2), "scaler": Evil()})
    where = re.escape(f"checkpoint {tmp_path} is refused: global_step2/mp_rank_00_model_states.pt has more than")
    with pytest.raises(DamagedCheckpointError, match=rf"^{where} .* it would call builtins\.print\. Nothing"):
        check_deepspeed_files(folder)
    assert capsys.readouterr().out == ""


def test_a_bare_pickle_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, {})
    (folder / "global_step2" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedCheckpointError, match="Nothing of it was run"):
        check_deepspeed_files(folder)
    assert capsys.readouterr().out == ""
