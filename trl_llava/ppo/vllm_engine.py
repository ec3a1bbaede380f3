"""TRL's connection to vLLM, colocated or a server's: weights go in, prompts with images go in, completions come out.

Two things differ from TRL's: an adapter is added to the weights on their way out instead of being merged in place, as
other roles compute with the same base; and every prompt has its own seed. Colocated engines also get one image token
for each image, which vLLM expands by itself: TRL hands over prompts that are expanded already
(https://github.com/huggingface/trl/issues/6294).
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import requests
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.generation import vllm_generation
from trl.trainer.utils import ensure_master_addr_port

from trl_llava.configs.ppo import LlavaPPOConfig
from trl_llava.errors import ExplainedError, InputError
from trl_llava.ppo.dense_weights import DenseWeights
from trl_llava.ppo.vllm_prompts import one_token_each, place_images
from trl_llava.ppo.vllm_server import RolloutEngineError, connect, start_command
from trl_llava.run.launch import resume_command

REQUESTS_AT_ONCE = 64
Result = TypeVar("Result")


@dataclass
class Request:
    """A prompt to be answered.

    Attributes:
        token_ids: the prompt, its images expanded to as many image tokens as the policy's processor makes of them.
        images: its images.
        settings: how it is answered, by the names of vLLM's `SamplingParams`.
    """

    token_ids: list[int]
    images: list[Image.Image]
    settings: dict[str, Any]


@dataclass
class EngineCompletion:
    """What came back.

    Attributes:
        token_ids: the completion, with its stop token.
        logprobs: vLLM's log-probability of each token.
    """

    token_ids: list[int]
    logprobs: list[float]


def _trls_names(args: LlavaPPOConfig) -> dict[str, Any]:
    """What `VLLMGeneration` calls the fields of the config."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        "mode": args.vllm_mode,
        "server_base_url": args.vllm_url,
        "server_timeout": args.vllm_server_timeout,
        "group_port": args.vllm_group_port,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "max_model_length": args.vllm_max_model_length,
        "max_num_seqs": rows * args.vllm_tensor_parallel_size,
        "enable_sleep_mode": args.vllm_enable_sleep_mode,
        "model_impl": args.vllm_model_impl,
        "trust_remote_code": args.trust_remote_code,
    }


class VLLMEngine(vllm_generation.VLLMGeneration):
    """TRL's `VLLMGeneration`, which the policy is sent to as dense weights and which gets prompt by prompt."""

    _llm_weights_sleeping: bool  # set by TRL's class, where engines may sleep

    def __init__(
        self,
        args: LlavaPPOConfig,
        policy: nn.Module,
        accelerator: Accelerator,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    ) -> None:
        """Connect to the server, or load an engine in this process.

        Args:
            args: `vllm_*`, and how many rows are answered at once.
            policy: the unwrapped policy.
            accelerator: knows the processes.
            processing_class: the policy's processor.

        Raises:
            InputError: if the policy cannot be sent.
            RolloutEngineError: if the server cannot be reached, or serves another model.
        """
        self.weights = DenseWeights(policy)
        self.url = args.vllm_url
        name = str(policy.name_or_path)
        if args.vllm_mode == "colocate" and getattr(policy, "is_quantized", False):
            raise InputError(
                f"`vllm_mode: colocate` cannot take the quantised base '{name}': vLLM would quantise it on its own, "
                "and differently. Use `vllm_mode: server`, which is sent what the base computes with, or load it in "
                "16 bit"
            )
        try:
            super().__init__(policy, accelerator, processing_class, **_trls_names(args))
        except (requests.ConnectionError, socket.gaierror) as error:
            raise RolloutEngineError(
                f"no vLLM server replies at {self.url} (waited {args.vllm_server_timeout:g} s, "
                f"`vllm_server_timeout`). Start it with `{start_command(name, self.weights.dtype)}`, on other GPUs "
                "than those of the training, and name it with `vllm_server_base_url`, or `vllm_server_host` and "
                "`vllm_server_port`"
            ) from error
        except NotImplementedError as error:
            raise RolloutEngineError(
                f"weights cannot be sent to vLLM from '{accelerator.device}': {error}. Train on a GPU, or leave "
                "`use_vllm` out"
            ) from error

    def _init_vllm(self) -> None:
        """As TRL's, but that a server is checked first, and that a colocated engine computes in the policy's dtype."""
        if self.mode == "colocate":
            self._start_engine()
        elif self.accelerator.is_main_process:
            self.vllm_client, self.max_model_length = connect(
                self.url, self.group_port, self.server_timeout, self.model.name_or_path, self.weights.dtype
            )
            self.vllm_client.init_communicator(device=self.accelerator.device)
        self.accelerator.wait_for_everyone()  # DeepSpeed hangs if some processes go on earlier

    def _start_engine(self) -> None:
        processes, size = self.accelerator.num_processes, self.tensor_parallel_size
        if processes % size:
            raise InputError(f"`vllm_tensor_parallel_size` ({size}) must divide the number of processes ({processes})")
        if size > 1:
            ranks = [list(range(first, first + size)) for first in range(0, processes, size)]
            self.tp_group, _ = torch.distributed.new_subgroups_by_enumeration(ranks)
        os.environ["RANK"] = str(self.accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(processes)
        ensure_master_addr_port()
        self.llm = vllm_generation.LLM(
            model=self.model.name_or_path,
            dtype=str(self.weights.dtype).removeprefix("torch."),
            tensor_parallel_size=size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            enable_sleep_mode=self.enable_sleep_mode,
            model_impl=self.model_impl,
            trust_remote_code=self.trust_remote_code,
            distributed_executor_backend="external_launcher",
            seed=self.accelerator.process_index // size,  # one for all processes of an engine
            max_num_batched_tokens=4096,  # vLLM sets memory aside for this many
            logprobs_mode="processed_logprobs",  # of the distribution that tokens are drawn from
        )
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
        self._llm_weights_sleeping = self.enable_sleep_mode

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight as vLLM takes it; TRL's own merges the adapter into the base and back."""
        if self._dist.is_zero3:
            return self.weights.tensors(self._gathered)
        speaks = self.mode == "colocate" or self.accelerator.is_main_process
        return self.weights.tensors() if speaks else iter(())

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Make these whole under ZeRO-3, but for those that an outer block has gathered and will release."""
        away = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
        return self._dist.gather_params(away) if away else nullcontext()

    def sync_weights(self) -> None:
        """Send the policy's weights, and have vLLM forget what the last ones made of prompts and images."""
        super().sync_weights()
        # vLLM keeps an image's features by the image's hash, across updates too; TRL resets the prefix cache only.
        if self.mode == "colocate":
            self.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            url = f"{self.vllm_client.base_url}/reset_encoder_cache"
            self.vllm_client.session.post(url).raise_for_status()  # replies with an empty body

    def send_weights(self) -> None:
        """Let vLLM complete as the policy does now; on every process.

        Raises:
            RolloutEngineError: if the server fails.
        """
        if self.mode == "colocate":
            self.sync_weights()
            return
        # Asked before: under ZeRO-3 the processes make each tensor together, and would wait for one that has stopped.
        speaks = self.accelerator.is_main_process
        self._agree(None, self._failure_of(self.vllm_client.check_server) if speaks else None)
        failure = self._failure_of(self.sync_weights)
        if failure is not None and self._dist.is_zero3:
            raise RolloutEngineError(self._explained(failure)) from failure
        self._agree(None, failure)

    @staticmethod
    def _failure_of(work: Callable[[], None]) -> Exception | None:
        try:
            work()
        except Exception as error:  # TRL raises plain ones for whatever a server replies
            return error
        return None

    def generate(self, requests: Sequence[Request]) -> list[list[EngineCompletion]]:
        """Complete the prompts of this process; on every process, with as many prompts.

        Args:
            requests: the prompts.

        Returns:
            Of each prompt as many completions as its settings' `n`.

        Raises:
            RolloutEngineError: if the server fails, or sees an image as another number of tokens.
        """
        if self.mode == "colocate":
            return self._generate_here(requests)
        everybody = gather_object(list(requests))
        completions: list[list[EngineCompletion]] = []
        failure = None
        if self.accelerator.is_main_process:
            failure = self._failure_of(lambda: completions.extend(self._generate_on_server(everybody)))
        completions = self._agree(completions, failure)
        first = self.accelerator.process_index * len(requests)
        return completions[first : first + len(requests)]

    def _agree(self, result: Result, failure: Exception | None) -> Result:
        """Give the main process's result to all, or let all of them stop with its failure."""
        words = None if failure is None else self._explained(failure)
        result, words = broadcast_object_list([result, words])
        if words is not None:
            raise RolloutEngineError(words) from failure
        return result

    def _explained(self, failure: Exception) -> str:
        """What failed, and how to go on."""
        if isinstance(failure, ExplainedError):
            return str(failure)
        words = " ".join(str(failure).split())[:300]
        return (
            f"the vLLM server at {self.url} failed ({type(failure).__name__}: {words}). The checkpoints of "
            f"this run are whole: start the server again with "
            f"`{start_command(self.model.name_or_path, self.weights.dtype)}`, and go on with {resume_command()}"
        )

    def _generate_on_server(self, requests: Sequence[Request]) -> list[list[EngineCompletion]]:
        token: Any = getattr(self.processing_class, "image_token_id", None)  # a request with images has one
        features = self.vllm_client.image_features([request.images or None for request in requests])
        for request, feature in zip(requests, features, strict=True):
            self._check_length(request)
            if feature is not None:
                lengths = [place["length"] for place in feature["mm_placeholders"]["image"]]
                feature["mm_placeholders"]["image"] = place_images(request.token_ids, token, lengths)

        def send(index: int) -> list[EngineCompletion]:
            settings = dict(requests[index].settings)
            given = {key: settings.pop(key) for key in ("n", "temperature", "max_tokens")}
            output = self.vllm_client.generate(
                [requests[index].token_ids], [features[index]], **given, logprobs=0, generation_kwargs=settings
            )
            return _completions(output["completion_ids"], output["logprobs"])

        with ThreadPoolExecutor(max_workers=min(REQUESTS_AT_ONCE, len(requests))) as executor:
            return list(executor.map(send, range(len(requests))))

    def _check_length(self, request: Request) -> None:
        needed = len(request.token_ids) + request.settings["max_tokens"]
        if self.max_model_length is not None and needed > self.max_model_length:
            raise RolloutEngineError(
                f"a prompt of {len(request.token_ids)} tokens and `response_length` "
                f"{request.settings['max_tokens']} need {needed} tokens, but vLLM allows {self.max_model_length}: "
                "start the server with a larger `--max-model-len` (`vllm_max_model_length` where it is colocated), or "
                "lower `response_length` or `max_prompt_length`"
            )

    def _generate_here(self, requests: Sequence[Request]) -> list[list[EngineCompletion]]:
        own, everybody = slice(None), list(requests)
        if self.tensor_parallel_size > 1:  # the processes of an engine ask the same
            shares: list[Any] = [None] * self.tensor_parallel_size
            torch.distributed.all_gather_object(shares, everybody, group=self.tp_group)
            first = torch.distributed.get_rank(group=self.tp_group) * len(requests)
            own, everybody = slice(first, first + len(requests)), list(chain.from_iterable(shares))
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        token = getattr(self.processing_class, "image_token_id", None)
        prompts: list[dict[str, Any]] = []
        for request in everybody:
            self._check_length(request)
            prompts.append({"prompt_token_ids": one_token_each(request.token_ids, token, len(request.images))})
            if request.images:
                prompts[-1]["multi_modal_data"] = {"image": request.images}
        settings = [vllm_generation.SamplingParams(**request.settings, logprobs=0) for request in everybody]
        outputs = self.llm.generate(prompts, sampling_params=settings, use_tqdm=False)
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        for request, output in zip(everybody, outputs, strict=True):
            if list(output.prompt_token_ids) != request.token_ids:
                raise RolloutEngineError(
                    f"vLLM made {len(output.prompt_token_ids)} tokens of a prompt that the policy's processor makes "
                    f"{len(request.token_ids)} of: the two process images differently"
                )
        return [
            _completions([part.token_ids for part in output.outputs], _logprobs([output])) for output in outputs[own]
        ]


def _logprobs(outputs: list[Any]) -> list[list[list[float | None]]] | None:
    return vllm_generation.extract_logprobs(outputs)[0]


def _completions(
    token_ids: list[list[int]], logprobs: list[list[list[float | None]]] | None
) -> list[EngineCompletion]:
    """Completions to one prompt; a log-probability that vLLM could not tell is NaN."""
    nothing: list[list[list[float | None]]] = [[[None]] * len(ids) for ids in token_ids]
    return [
        EngineCompletion(list(ids), [float("nan") if entry[0] is None else entry[0] for entry in row])
        for ids, row in zip(token_ids, logprobs or nothing, strict=True)
    ]
