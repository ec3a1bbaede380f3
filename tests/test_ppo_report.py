"""What a PPO step says of itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl_llava.ppo.report import PhaseClock


@pytest.mark.parametrize(("device", "waited_for"), [("cuda:1", ["cuda:1"] * 5), ("cpu", [])])
def test_a_phase_is_measured_when_its_device_has_done_it(
    device: str, waited_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU queues: a clock that does not wait for it charges a phase with what the one before has queued."""
    now, devices = iter([10.0, 11.0, 14.0, 20.0, 25.0]), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: devices.append(str(device)))
    monkeypatch.setattr("trl_llava.ppo.report.time.perf_counter", lambda: next(now))
    handler: Any = SimpleNamespace(callbacks=[])
    clock = PhaseClock(handler, torch.device(device))
    with clock.phase("rollout"):
        pass
    assert clock.seconds == {"rollout": 3.0}
    clock.start()
    assert clock.metrics() == {"time/step": 5.0}
    assert devices == waited_for
