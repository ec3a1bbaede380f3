"""What each process of a launched test runs: PPO's real entry point, with the stand-in for vLLM in place.

accelerate launch ... tests/launched_vllm.py WORD ...
"""

import sys

from launched_stages import without_operations_of_inference
from tiny_vllm import pretend_vllm

from trl_llava import train_ppo
from trl_llava.run.console import run_as_program

if __name__ == "__main__":
    without_operations_of_inference()
    pretend_vllm()
    run_as_program(lambda: train_ppo.main(sys.argv[1:]))
