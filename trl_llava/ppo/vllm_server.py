"""A vLLM server as PPO needs it: which command starts one, and what is checked before anything is sent to it."""

import shlex
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from requests.adapters import HTTPAdapter
from trl.generation import vllm_client

from trl_llava.configs.vllm import vllm_version
from trl_llava.errors import ExplainedError

OLDEST_SERVER = Version("0.26")
"""The first whose `/reset_prefix_cache` answers in JSON, and which takes images as `kwargs_data`."""
NEW_TRANSFER = Version("0.28")
"""From here on both sides of the weight transfer agree on its form when they meet, before for each update."""
SCALE_OUT = Version("0.30")
"""From here on images are taken only with a flag."""
UPDATE_PATHS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class RolloutEngineError(ExplainedError, RuntimeError):
    """A vLLM that cannot be reached, serves something else or returns completions that cannot be used."""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def start_command(name: str, dtype: torch.dtype) -> str:
    """What starts a server that PPO can use, of the vLLM that is installed here."""
    here = vllm_version()
    words = ["vllm", "serve", name, "--dtype", dtype_name(dtype), "--weight-transfer-config", '{"backend": "nccl"}']
    words += ["--logprobs-mode", "processed_logprobs"]  # of the distribution that tokens are drawn from
    words += ["--enable-scale-out"] * (here is None or here >= SCALE_OUT)
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(words)}"


def connect(url: str, group_port: int, timeout: float, name: str, dtype: torch.dtype) -> tuple[Any, int | None]:
    """TRL's client of a server that has passed all checks, and the most tokens of a prompt with its completion.

    A `RolloutEngineError` says if its version, model, dtype or flags do not fit.
    """
    client = vllm_client.VLLMClient(base_url=url, group_port=group_port, connection_timeout=timeout)
    for path in UPDATE_PATHS:
        # TRL's session tries whatever fails up to five times, waiting longer each time, but an update that has failed
        # once stays broken.
        client.session.mount(f"{client.base_url}/{path}", HTTPAdapter())
    _check_version(client)
    model = client.session.get(f"{client.base_url}/v1/models").json()["data"][0]
    found = [str(model[key]) for key in ("id", "root") if model.get(key)]
    if Path(name).name not in [Path(path).name for path in found]:
        raise RolloutEngineError(
            f"the vLLM server at {url} serves '{found[0]}', but the policy is '{name}'. Start it with "
            f"`{start_command(name, dtype)}`"
        )
    _check_settings(client, url, name, dtype)
    return client, model.get("max_model_len")


def _check_version(client: Any) -> None:
    response = client.session.get(f"{client.base_url}/version")
    response.raise_for_status()
    served, here = Version(response.json()["version"]), vllm_version()
    if served < OLDEST_SERVER:
        raise RolloutEngineError(
            f"the server at {client.base_url} runs vLLM {served}, and PPO needs {OLDEST_SERVER} or newer there: older "
            "ones take no images as TRL sends them. Install the same version there and here"
        )
    if here is not None and (served >= NEW_TRANSFER) != (here >= NEW_TRANSFER):
        raise RolloutEngineError(
            f"the server at {client.base_url} runs vLLM {served}, and vLLM {here} is installed here: weights are sent "
            f"in another way since {NEW_TRANSFER}. Install the same version there and here"
        )


def _check_settings(client: Any, url: str, name: str, dtype: torch.dtype) -> None:
    """Stop if the server lacks the endpoints for weights or images, or computes in another dtype."""
    response = client.session.get(f"{client.base_url}/server_info", params={"config_format": "json"})
    if response.status_code == 404:
        raise RolloutEngineError(
            f"the vLLM server at {url} takes no weights: it was started without VLLM_SERVER_DEV_MODE=1. Start "
            f"it with `{start_command(name, dtype)}`"
        )
    response.raise_for_status()
    settings = response.json()["vllm_config"]
    if settings["weight_transfer_config"] is None:
        raise RolloutEngineError(
            f"the vLLM server at {url} takes no weights: it was started without `--weight-transfer-config`. "
            f"Start it with `{start_command(name, dtype)}`"
        )
    # The path takes POST only: 405 where there is one.
    if client.session.get(f"{client.base_url}/v1/chat/completions/render").status_code == 404:
        raise RolloutEngineError(
            f"the vLLM server at {url} takes no images: from {SCALE_OUT} on it needs `--enable-scale-out`. "
            f"Start it with `{start_command(name, dtype)}`"
        )
    served = str(settings["model_config"]["dtype"]).removeprefix("torch.")
    if served != dtype_name(dtype):
        raise RolloutEngineError(
            f"the vLLM server at {url} computes in {served}, but the policy in {dtype_name(dtype)}: their "
            f"log-probabilities would differ. Start it with `{start_command(name, dtype)}`"
        )
