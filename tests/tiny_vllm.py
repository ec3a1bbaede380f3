"""What stands in for vLLM where there is none: a tiny engine, a loopback server around it, and TRL's client on a CPU.

The engine has a model of its own, loaded from the folder it is started with; nothing but what is sent changes it. The
server speaks the endpoints of `vllm serve` that TRL's `VLLMClient` uses, and keeps every request.
"""

import base64
import io
import json
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import requests
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl import import_utils
from trl.generation import vllm_client, vllm_generation
from urllib3.util.retry import Retry


class TinyEngine:
    """Generates one prompt after the other, with weights that are named as in its checkpoint.

    As the real one, it keeps the features of an image, whatever weights come afterwards, until `reset_encoder_cache`,
    and takes no tower whose names lack the step `vision_model`.
    """

    def __init__(self, folder: Path) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.weights = load_file(folder / "model.safetensors")
        for name in self.weights:
            if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
                raise ValueError(f"There is no module or parameter named '{name}'")
        self.loads = 0
        self.encoder_cache: dict[tuple[tuple[int, int], bytes], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._model: Any = None

    def load(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Take weights; a name or shape that the checkpoint does not have is an error."""
        for name, tensor in named:
            assert self.weights[name].shape == tensor.shape, name
            self.weights[name] = tensor.detach().clone().contiguous()
        self.loads += 1
        self._model = None

    @property
    def model(self) -> Any:
        if self._model is None:
            with tempfile.TemporaryDirectory() as folder:
                self.config.save_pretrained(folder)
                save_file(self.weights, Path(folder) / "model.safetensors")
                self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return self._model

    def reset_encoder_cache(self) -> None:
        self.encoder_cache.clear()

    def encode(self, images: list[Image.Image]) -> dict[str, Any]:
        """The features of images, each made as if it were alone, as the model takes them."""
        keys = [(image.size, image.tobytes()) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self.encoder_cache:
                pixels = self.processor.image_processor([image], return_tensors="pt")
                features = self.model.get_image_features(**pixels, return_dict=True).pooler_output[0]
                self.encoder_cache[key] = (features, pixels.get("image_grid_thw"))
        kept = [self.encoder_cache[key] for key in keys]
        encoded = BaseModelOutputWithPooling(pooler_output=[features for features, _ in kept])
        grids = [grid for _, grid in kept if grid is not None]
        return {"mm_encoder_outputs": {"image": encoded}} | ({"image_grid_thw": torch.cat(grids)} if grids else {})

    def image_tokens(self, image: Image.Image) -> int:
        """How many tokens a picture takes."""
        ids = self.processor(text=self.processor.image_token, images=[image])["input_ids"][0]
        return list(ids).count(self.config.image_token_id)

    @torch.no_grad()
    def generate(
        self, token_ids: list[int], images: list[Image.Image], settings: dict[str, Any]
    ) -> list[tuple[list[int], list[float]]]:
        """`n` answers with the log-probabilities of their tokens."""
        features = self.encode(images) if images else {}
        bias = {int(token): value for token, value in (settings.get("logit_bias") or {}).items()}
        assert settings["temperature"] > 0 or settings["n"] == 1  # as in vLLM
        answers = []
        for copy in range(settings["n"]):
            dice = torch.Generator().manual_seed((settings["seed"] or 0) + copy)
            ids, logprobs = list(token_ids), []
            for _ in range(settings["max_tokens"]):
                if "image_grid_thw" in features:  # positions are made of both
                    kinds = [int(token == self.config.image_token_id) for token in ids]
                    features["mm_token_type_ids"] = torch.tensor([kinds])
                logits = self.model(input_ids=torch.tensor([ids]), **features).logits[0, -1]
                for token, value in bias.items():
                    logits[token] += value
                greedy = settings["temperature"] == 0
                logprob = (logits / (1 if greedy else settings["temperature"])).log_softmax(0)
                token = int(logits.argmax() if greedy else logprob.exp().multinomial(1, generator=dice))
                ids.append(token)
                logprobs.append(logprob[token].item())
                if token in settings["stop_token_ids"]:
                    break
            answers.append((ids[len(token_ids) :], logprobs))
        return answers


def _from_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


class TinyServer:
    """`vllm serve` on a loopback port, inside a `with` block.

    Attributes:
        requests: (path, body) of everything that was asked, in order.
        faults: what a path answers instead: a function of the answer, which may raise.
        version: of vLLM.
        settings: its resolved configuration.
        missing: paths that it does not have, or that fail; `missing_with` is their status, `refusals` counts them.
    """

    def __init__(self, folder: Path, *, name: str | None = None, max_model_len: int = 2048) -> None:
        self.engine = TinyEngine(folder)
        self.served = {"id": name or str(folder), "root": name or str(folder), "max_model_len": max_model_len}
        self.version = "0.31.0"
        self.settings: dict[str, Any] = {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"dtype": "torch.float32"},
        }
        self.missing: set[str] = set()
        self.missing_with, self.refusals = 404, 0
        self.requests: list[tuple[str, Any]] = []
        self.faults: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self._sent: queue.Queue = queue.Queue()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"tiny": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "TinyServer":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop to listen; may be called twice."""
        self.http.shutdown()
        self.http.server_close()

    def bodies(self, path: str) -> list[Any]:
        """What was sent to a path."""
        return [body for asked, body in self.requests if asked == path]

    def answer(self, path: str, body: Any) -> dict[str, Any] | None:
        """What a path answers; `None` is an empty body."""
        if path == "/stub/weights":  # stands for NCCL
            self._sent.put(torch.load(io.BytesIO(body)))
            return {}
        path = path.partition("?")[0]
        if path in self.missing:
            self.refusals += 1
            raise _Refused(self.missing_with)
        if body is None and path == "/v1/chat/completions/render":
            raise _Refused(405)
        self.requests.append((path, body))
        known = {
            "/health": lambda: {},
            "/v1/models": lambda: {"data": [self.served]},
            "/get_world_size": lambda: {"world_size": 1},
            "/version": lambda: {"version": self.version},
            "/server_info": lambda: {"vllm_config": self.settings},
            "/v1/chat/completions/render": lambda: self._render(body),
            "/inference/v1/generate": lambda: self._generate(body),
            "/update_weights": lambda: self._update(body["update_info"]),
            "/reset_prefix_cache": lambda: {"success": True},
            "/reset_encoder_cache": self.engine.reset_encoder_cache,
        }
        silent = ("init_weight_transfer_engine", "start_weight_update", "finish_weight_update")
        known |= {f"/{name}": lambda: {} for name in silent}
        return self.faults.get(path, lambda result: result)(known[path]())

    def _render(self, body: dict[str, Any]) -> dict[str, Any]:
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"]]
        data = [url.removeprefix("data:image/png;base64,") for url in urls]
        lengths = [self.engine.image_tokens(_from_base64(png)) for png in data]
        places = [{"offset": 0, "length": length} for length in lengths]  # of the server's own prompt: no use to us
        return {
            "features": {"mm_hashes": {"image": data}, "mm_placeholders": {"image": places}, "kwargs_data": data},
        }

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        features, ids = body["features"], body["token_ids"]
        images = [] if features is None else [_from_base64(png) for png in features["kwargs_data"]]
        places = [] if features is None else features["mm_placeholders"]["image"]
        pictured = [place["offset"] + at for place in places for at in range(place["length"])]
        assert pictured == [at for at, token in enumerate(ids) if token == self.engine.config.image_token_id]
        with self._lock:
            answers = self.engine.generate(ids, images, body["sampling_params"])
        choices = []
        for index, (tokens, logprobs) in enumerate(answers):
            content = [
                {"token": f"token_id:{token}", "logprob": logprob, "top_logprobs": []}
                for token, logprob in zip(tokens, logprobs, strict=True)
            ]
            choices.append({"index": index, "token_ids": tokens, "logprobs": {"content": content}})
        return {"choices": choices}

    def _update(self, announced: dict[str, Any]) -> dict[str, Any]:
        named = self._sent.get(timeout=20)
        assert announced["names"] == [name for name, _ in named]
        assert announced["dtype_names"] == [str(tensor.dtype).removeprefix("torch.") for _, tensor in named]
        assert announced["shapes"] == [list(tensor.shape) for _, tensor in named]
        with self._lock:
            self.engine.load(named)
        return {}


class _Refused(Exception):
    """An HTTP status."""


class _Handler(BaseHTTPRequestHandler):
    tiny: TinyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._reply(content if self.path.startswith("/stub/") else json.loads(content or "null"))

    def _reply(self, body: Any) -> None:
        try:
            status, content = 200, self.tiny.answer(self.path, body)
        except _Refused as error:
            status, content = error.args[0], {}
        except ConnectionError:  # a fault: the server is gone in the middle of a request
            self.close_connection = True
            self.connection.close()
            return
        except Exception as error:
            status, content = 400, {"error": f"{type(error).__name__}: {error}"}
        text = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


class _Transfer:
    """In place of vLLM's `NCCLWeightTransferEngine`: tensors go to the server through a path of its own."""

    @staticmethod
    def trainer_init(init_info: dict[str, Any]) -> Any:
        return SimpleNamespace(**init_info)

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        buffer = io.BytesIO()
        torch.save([(name, tensor.detach().cpu().clone()) for name, tensor in iterator], buffer)
        requests.post(f"{trainer_args.group.url}/stub/weights", data=buffer.getvalue(), timeout=30)


def _init_communicator(self: Any, device: Any = 0) -> None:
    """TRL's own, without its demand for a CUDA device."""
    world_size = self.get_world_size() + 1
    info = {"master_address": "127.0.0.1", "master_port": self.group_port, "rank_offset": 1, "world_size": world_size}
    self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": info})
    self.communicator = _Transfer.trainer_init({**info, "url": self.base_url})


class TinyLLM:
    """In place of `vllm.LLM`; every call is kept, and a prompt's one image token becomes its many, as in vLLM."""

    calls: list[tuple[str, Any]]
    made: "TinyLLM"

    def __init__(self, **given: Any) -> None:
        self.engine = TinyEngine(Path(given["model"]))
        self.calls = [("LLM", given)]
        TinyLLM.made = self
        loader = SimpleNamespace(load_weights=self._load)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=loader))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=runner), reset_encoder_cache=self._reset_encoder_cache
        )

    def _load(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append(("load_weights", named[0][0]))
        self.engine.load(named)

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache", None))

    def _reset_encoder_cache(self) -> None:
        self.calls.append(("reset_encoder_cache", None))
        self.engine.reset_encoder_cache()

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))

    def generate(self, prompts: list[dict[str, Any]], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append(
            ("generate", [(prompt, vars(params)) for prompt, params in zip(prompts, sampling_params, strict=True)])
        )
        outputs, image_token = [], self.engine.config.image_token_id
        for prompt, params in zip(prompts, sampling_params, strict=True):
            images = list(prompt.get("multi_modal_data", {}).get("image", []))
            ids: list[int] = []
            left = iter(images)
            for token in prompt["prompt_token_ids"]:
                ids += [token] * (self.engine.image_tokens(next(left)) if token == image_token else 1)
            answers = self.engine.generate(ids, images, vars(params))
            parts = [
                SimpleNamespace(
                    token_ids=tokens,
                    logprobs=[
                        {token: SimpleNamespace(rank=1, logprob=logprob)}
                        for token, logprob in zip(tokens, logprobs, strict=True)
                    ],
                )
                for tokens, logprobs in answers
            ]
            outputs.append(SimpleNamespace(prompt_token_ids=ids, outputs=parts))
        return outputs


def pretend_vllm(patch: Callable[..., None] = setattr) -> None:
    """Let TRL take vLLM for installed, with the parts above in its place.

    Args:
        patch: `setattr`, or pytest's with `raising=False`.
    """
    for module in (import_utils, vllm_client, vllm_generation):
        patch(module, "is_vllm_available", lambda min_version=None: True)
    patch(vllm_client, "_HAS_WEIGHT_UPDATE_LIFECYCLE", True)
    patch(vllm_client, "NCCLWeightTransferEngine", _Transfer)
    patch(vllm_client, "NCCLTrainerSendWeightsArgs", SimpleNamespace)
    patch(vllm_client, "Retry", lambda **given: Retry(**{**given, "backoff_factor": 0}))
    patch(vllm_client.VLLMClient, "init_communicator", _init_communicator)
    patch(vllm_generation, "LLM", TinyLLM)
    patch(vllm_generation, "SamplingParams", SimpleNamespace)
