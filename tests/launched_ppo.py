"""What each process of a launched PPO test runs: a few steps on a tiny LLaVA, then a record of what came out.

accelerate launch ... tests/launched_ppo.py BASE ADAPTER OUT_DIR JSON_OF_CHANGES
"""

import json
import sys
from pathlib import Path

from tiny_trainers import favour_the_stop_token, make_policy, ppo_trainer


def main(base: str, adapter: str, out: str, changes: str) -> None:
    policy = make_policy(Path(base), Path(adapter))
    favour_the_stop_token(policy)  # before ZeRO-3 shares the weights out
    trainer = ppo_trainer(Path(base), Path(adapter), Path(out), model=policy, **json.loads(changes))
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        sums = {name: value.double().sum().item() for name, value in state.items() if ".default." in name}
        record = {"log": trainer.state.log_history, "sums": sums, "processes": trainer.accelerator.num_processes}
        (Path(out) / "record.json").write_text(json.dumps(record))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
