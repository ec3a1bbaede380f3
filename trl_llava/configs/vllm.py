"""The recipe keys of rollouts in vLLM, by the names and with the defaults of TRL's GRPOConfig, and their checks."""

import importlib.metadata
from dataclasses import dataclass, fields
from typing import Any, Literal

from trl import import_utils

from trl_llava.configs.stages import option
from trl_llava.errors import MissingPackageError

_SERVED = {
    "vllm_model_impl": "--model-impl",
    "vllm_gpu_memory_utilization": "--gpu-memory-utilization",
    "vllm_max_model_length": "--max-model-len",
    "vllm_tensor_parallel_size": "--tensor-parallel-size",
    "vllm_enable_sleep_mode": "--enable-sleep-mode",
}
"""Fields of colocated engines, and with what a server of its own is told the same."""


@dataclass
class VLLMOptions:
    """Where vLLM runs, if it answers the prompts."""

    use_vllm: bool = option(
        False, "Answer the prompts with vLLM instead of transformers. Needs `pip install 'trl[vllm]'` and a GPU."
    )
    vllm_mode: Literal["server", "colocate"] = option(
        "colocate",
        "'server': one on GPUs of its own (`trl vllm-serve --model MODEL`); 'colocate': an engine in each process.",
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = option(
        "vllm", "Colocated: whose implementation of the model vLLM runs."
    )
    vllm_server_base_url: str | None = option(
        None, "Server: its URL, e.g. http://localhost:8000, in place of host and port."
    )
    vllm_server_host: str = option("0.0.0.0", "Server: its host.")
    vllm_server_port: int = option(8000, "Server: its port.")
    vllm_server_timeout: float = option(240.0, "Server: seconds to wait for it at the start.")
    vllm_group_port: int = option(51216, "Server: port through which weights are sent.")
    vllm_gpu_memory_utilization: float = option(0.3, "Colocated: share of each GPU's memory that vLLM takes.")
    vllm_max_model_length: int | None = option(
        None, "Colocated: longest prompt and answer together, in tokens. None: what the model allows."
    )
    vllm_tensor_parallel_size: int = option(1, "Colocated: over how many processes an engine is spread.")
    vllm_enable_sleep_mode: bool = option(False, "Colocated: free vLLM's memory during the update.")
    vllm_logprob_tolerance: float | None = option(
        0.2,
        "Largest mean difference, in nats per token, between vLLM's log-probabilities and the policy's own. Above it "
        "the run stops: vLLM has other weights or sees other pictures. None: only logged.",
    )

    @property
    def vllm_url(self) -> str:
        """Where the server is."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"


def check_vllm(config: Any) -> None:
    """Raises if what is set does not go with rollouts in vLLM.

    Args:
        config: A config with the fields of `VLLMOptions`.

    Raises:
        ValueError: If a field cannot be honoured.
    """
    if not config.use_vllm:
        return
    if config.recompute_logprobs is False:
        raise ValueError(
            "`recompute_logprobs` must not be false with `use_vllm`: vLLM's log-probabilities are another program's, "
            "rounded otherwise, so the policy is always asked itself."
        )
    if config.vllm_mode == "server":
        defaults = {field.name: field.default for field in fields(VLLMOptions)}
        for name, flag in _SERVED.items():
            if (found := getattr(config, name)) != defaults[name]:
                raise ValueError(
                    f"`{name}` ({found!r}) has no effect with `vllm_mode: server`: leave it out, and start the server "
                    f"with `{flag}`."
                )
    elif config.vllm_server_base_url is not None:
        raise ValueError(
            f"`vllm_server_base_url` ({config.vllm_server_base_url!r}) names a server, but `vllm_mode` is 'colocate': "
            "set it to 'server', or leave the URL out."
        )
    if config.vllm_logprob_tolerance is not None and config.vllm_logprob_tolerance <= 0:
        raise ValueError(f"`vllm_logprob_tolerance` must be above 0 or null, found {config.vllm_logprob_tolerance!r}.")


def require_vllm(config: Any) -> None:
    """Stop before anything is loaded if there is no vLLM where it is asked for.

    Args:
        config: A config with the fields of `VLLMOptions`.

    Raises:
        MissingPackageError: If it is not installed.
    """
    if config.use_vllm and not import_utils.is_vllm_available():
        versions = [need.split(";")[0] for need in importlib.metadata.requires("trl") or [] if need.startswith("vllm")]
        raise MissingPackageError(
            f"`use_vllm: true` needs vLLM, which is not installed: `pip install 'trl[vllm]'` ({', '.join(versions)} "
            "for this TRL), on a machine with a GPU; or leave `use_vllm` out, which generates in transformers"
        )
