"""What each process of a launched PPO test runs: a few steps on a tiny LLaVA, then a record of what came out.

accelerate launch ... tests/launched_ppo.py BASE ADAPTER OUT_DIR JSON_OF_CHANGES
"""

import json
import sys
from pathlib import Path

from tiny_trainers import favour_the_stop_token, ppo_trainer


def main(base: str, adapter: str, out: str, changes: str) -> None:
    trainer = ppo_trainer(Path(base), Path(adapter), Path(out), **json.loads(changes))
    favour_the_stop_token(trainer)
    trainer.train()
    if trainer.accelerator.is_main_process:
        sums = {
            name: value.double().sum().item()
            for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
            if ".default." in name
        }
        record = {"log": trainer.state.log_history, "sums": sums, "processes": trainer.accelerator.num_processes}
        (Path(out) / "record.json").write_text(json.dumps(record))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
