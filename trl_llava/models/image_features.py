"""What tower and projector make of pictures: once for each picture and each tower that sees it, kept on the CPU.

Features are found by content, so a picture of two prompts, of two epochs or of policy and reward model is encoded
once, where the same weights see it. They are made without autocast, in the dtype of the model, so that a reward model
scores inside and outside of PPO alike.
"""

import hashlib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn

from trl_llava.models.adapter_role import AdapterRole, computing
from trl_llava.models.blank_picture import takes_encoded_images
from trl_llava.models.model_inputs import COUNTS, ModelInputs
from trl_llava.models.vision_tower import PROJECTOR_NAMES, TOWER_NAMES

GIB = 2**30


class ImageFeatures:
    """Encodes pictures for the passes of any model, and keeps what fits.

    What is in use in the current step is never dropped; once that fills the bound, further pictures are encoded again
    in every pass. Nothing is kept for a model whose tower or projector is trained, and nothing changes for it.
    """

    def __init__(self, max_bytes: float) -> None:
        """Start empty.

        Args:
            max_bytes: bound of what is kept; 0 keeps nothing.
        """
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()  # the longest unused first
        self._sizes: dict[str, int] = {}
        self._in_use: set[str] = set()
        self._seers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._numbers = itertools.count()  # never given twice: a model may be gone, and its features still there

    def __len__(self) -> int:
        return len(self._kept)

    def begin_step(self) -> None:
        """Allow what the steps before have used to be dropped; their inputs must not be used any more."""
        self._in_use.clear()

    def attach(self, model: nn.Module, inputs: ModelInputs) -> ModelInputs:
        """Let a model's passes over these prompts take their pictures from here.

        Args:
            model: a LLaVA, with a language-modelling or a score head, a PEFT model around one, or a role; unwrapped.
            inputs: B prompts with I images.

        Returns:
            The inputs with an encoder; `inputs` as they are if there is no image, if tower or projector are trained,
            or if the model takes no encoded images.
        """
        with computing(model) as base:
            backbone = getattr(base, base.base_model_prefix)
        if "pixel_values" not in inputs.extras or not takes_encoded_images(backbone) or _sees_with_trained(model):
            return inputs
        taken = frozenset(inspect.signature(backbone.get_image_features).parameters) & set(inputs.extras)
        inputs.digests = inputs.digests or _digests(inputs, taken)
        return replace(inputs, encoded=taken, encoder=partial(self._features, model, self._seer(model)))

    def encode(self, model: nn.Module, inputs: ModelInputs, batch_size: int) -> ModelInputs:
        """Attach, and encode every picture ahead, as far as they can be kept.

        Args:
            model: as for `attach`.
            inputs: as for `attach`.
            batch_size: how many images run at once.

        Returns:
            As for `attach`; without pixels if all pictures could be kept.
        """
        attached = self.attach(model, inputs)
        if attached.encoder is None:
            return inputs
        seer = self._seer(model)
        for rows in _rows_by_images(self._missing(seer, attached), attached.images_per_row, batch_size):
            if not all(self._keep(key, feature) for key, feature in self._run(model, seer, attached, rows)):
                return attached
        extras = {key: value for key, value in attached.extras.items() if key not in attached.encoded}
        return replace(attached, extras=extras)

    def _seer(self, model: nn.Module) -> str:
        """What all models whose pictures run through the same weights have in common, and no others."""
        host = _host(model)
        if host not in self._seers:
            self._seers[host] = next(self._numbers)
        return f"{self._seers[host]} {_own_sight(model)} "

    def _features(self, model: nn.Module, seer: str, inputs: ModelInputs) -> list[torch.Tensor]:
        """(N, H) of each of the I images, on the model's device."""
        found: dict[str, torch.Tensor] = {}
        if rows := self._missing(seer, inputs):
            for key, feature in self._run(model, seer, inputs, rows):
                found[key] = feature
                self._keep(key, feature)
        keys = [seer + digest for digest in inputs.digests]
        for key in keys:
            if key not in found:
                found[key] = self._kept[key].to(inputs.input_ids.device, non_blocking=True)
        return [found[key] for key in keys]

    def _missing(self, seer: str, inputs: ModelInputs) -> list[int]:
        """Rows whose pictures must be encoded, so that each picture is there; what is kept is in use from now on."""
        rows, known, start = [], set(), 0
        for row, count in enumerate(inputs.images_per_row):
            keys = [seer + digest for digest in inputs.digests[start : start + count]]
            start += count
            for key in keys:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    self._in_use.add(key)
            if not all(key in self._kept or key in known for key in keys):
                rows.append(row)
                known.update(keys)
        return rows

    def _run(
        self, model: nn.Module, seer: str, inputs: ModelInputs, rows: list[int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tower and projector over the pictures of some rows: each picture's key with its (N, H) features."""
        part = inputs.images_of(rows)
        device = inputs.input_ids.device
        # Not inference tensors: what is kept is used in training passes.
        plain = torch.autocast(device.type, enabled=False)
        with computing(model) as base, torch.inference_mode(False), torch.no_grad(), plain:
            given = {
                key: value.to(device, base.dtype if value.is_floating_point() else value.dtype)
                for key, value in part.items()
                if key in inputs.encoded
            }
            backbone = getattr(base, base.base_model_prefix)
            output = backbone.get_image_features(**given, return_dict=True).pooler_output
        digests = inputs.select(rows).digests
        for digest, feature in zip(digests, output, strict=True):
            yield seer + digest, feature

    def _keep(self, key: str, feature: torch.Tensor) -> bool:
        """Keep features if there is room, or room can be made; returns whether they are kept."""
        if key in self._kept:
            return True
        pinned = feature.is_cuda
        size = bytes_kept(feature, pinned=pinned)
        while self.bytes + size > self.max_bytes:
            oldest = next(iter(self._kept), None)
            if oldest is None or oldest in self._in_use:
                return False
            self._kept.pop(oldest)
            self.bytes -= self._sizes.pop(oldest)
        with torch.inference_mode(False):
            kept = feature.to("cpu", copy=True)  # a copy: `feature` may be a view of a whole batch
            self._kept[key] = kept.pin_memory() if pinned else kept
        self.bytes += size
        self._sizes[key] = size
        self._in_use.add(key)
        return True


def bytes_kept(feature: torch.Tensor, *, pinned: bool) -> int:
    """What a picture's features take of the CPU's memory.

    Args:
        feature: (N, H).
        pinned: whether they are kept in pinned memory, of which torch takes powers of two.

    Returns:
        Bytes.
    """
    size = feature.nelement() * feature.element_size()
    return 1 << (size - 1).bit_length() if pinned else size


def _host(model: nn.Module) -> nn.Module:
    return model.host if isinstance(model, AdapterRole) else model


def _adapter(model: nn.Module) -> str | None:
    """The adapter that a model computes with."""
    if isinstance(model, AdapterRole):
        return model.adapter_name
    return str(model.active_adapter) if isinstance(model, PeftModel) else None


def _seeing_parameters(model: nn.Module) -> Iterator[tuple[set[str], nn.Parameter]]:
    """Tower's and projector's parameters that a model computes with, each with the parts of its name."""
    host = _host(model)
    others = set(host.peft_config) - {_adapter(model)} if isinstance(host, PeftModel) else set()
    for name, parameter in host.named_parameters():
        parts = set(name.split("."))
        if parts & {*TOWER_NAMES, *PROJECTOR_NAMES} and not parts & others:
            yield parts, parameter


def _sees_with_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for _, parameter in _seeing_parameters(model))


def _own_sight(model: nn.Module) -> str:
    """The adapter's name if tower or projector are its own, else nothing: then roles on one base see alike."""
    adapter = _adapter(model)
    return adapter if adapter and any(adapter in parts for parts, _ in _seeing_parameters(model)) else ""


def _digests(inputs: ModelInputs, taken: frozenset[str]) -> list[str]:
    """A hash of all that decides a picture's features, for each of the I images."""
    digests, image = [], 0
    for count in inputs.images_per_row:
        for _ in range(count):
            # OneVision cuts a picture into tiles only where it is its row's only one.
            digest = hashlib.blake2b(b"one" if count == 1 else b"of several", digest_size=16)
            for key in sorted(taken - {COUNTS}):
                value = inputs.extras[key][image].cpu()
                while key == "pixel_values" and value.dim() == 4 and len(value) > 1 and not value[-1].any():
                    value = value[:-1]  # tiles that only fill the batch up
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
            digests.append(digest.hexdigest())
            image += 1
    return digests


def _rows_by_images(rows: list[int], images_per_row: list[int], batch_size: int) -> Iterator[list[int]]:
    """Rows in groups of at most `batch_size` images (or one row that has more)."""
    group: list[int] = []
    for row in rows:
        if group and sum(images_per_row[i] for i in group) + images_per_row[row] > batch_size:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
