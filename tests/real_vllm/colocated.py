"""A colocated engine beside a trainer: python tests/real_vllm/colocated.py BASE FOLDER [MODULE_TRAINED_WHOLE]."""

import sys
from pathlib import Path
from typing import Any

from test_real_vllm import check, trainer_on

import trl_llava.models.sequence_classification  # noqa: F401  # the value model's class


def load_as_weight_transfer_does(llm: Any) -> None:
    """On CPUs vLLM packs weights away, and `load_weights` alone finds none: unpack them first, and pack them again."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    config = llm.llm_engine.vllm_config
    load, reset, unpacked = model.load_weights, llm.reset_prefix_cache, []

    def load_weights(named: Any) -> Any:
        with set_current_vllm_config(config):
            if not unpacked:
                initialize_layerwise_reload(model)
                unpacked.append(True)
            return load([(name, tensor.detach().clone()) for name, tensor in named])

    def reset_prefix_cache() -> Any:
        with set_current_vllm_config(config):
            finalize_layerwise_reload(model, config.model_config)
        unpacked.clear()
        return reset()

    model.load_weights, llm.reset_prefix_cache = load_weights, reset_prefix_cache


if __name__ == "__main__":
    base, folder, *whole = sys.argv[1:]
    trainer = trainer_on(Path(base), Path(folder), whole=whole or None, use_vllm=True, vllm_max_model_length=1024)
    load_as_weight_transfer_does(trainer.vllm.engine.llm)
    check(trainer)
    print("computes what the policy computes")
