"""No value of a field ends in a traceback: each runs two steps or is one line that names the field."""

from pathlib import Path

import pytest
from field_sweep import Sweep

from trl_llava.configs.recipe import make_parser


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo", "reward", "dpo", "grpo", "rloo"])
def test_each_value_runs_or_is_explained(stage: str, tiny_llava_dir: Path, tmp_path: Path) -> None:
    # All but PPO train with transformers' own loop: of fields that SFT has too, they parse each value.
    shared = make_parser("sft").field_names if stage not in ("sft", "ppo") else frozenset()
    sweep = Sweep(stage, tmp_path, tiny_llava_dir, shared)
    sweep.run()
    wrong = {key: said for key, (outcome, said) in sweep.results.items() if outcome in ("traceback", "unnamed")}
    assert not wrong
    assert len(sweep.results) > 300
