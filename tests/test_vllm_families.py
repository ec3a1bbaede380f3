"""Rollouts in vLLM for families whose pictures take tokens by their size, and for several pictures a row."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset, Image, List
from safetensors import safe_open
from test_vllm_rollouts import greedy, on_server
from tiny_trainers import make_adapter, ppo_trainer, prompt_rows
from tiny_vllm import TinyLLM, TinyServer, pretend_vllm
from transformers import AutoConfig, AutoModelForImageTextToText

from trl_llava import train_ppo
from trl_llava.data.contract import RowError
from trl_llava.errors import InputError
from trl_llava.ppo.vllm_prompts import as_seen
from trl_llava.ppo_trainer import LlavaPPOTrainer
from trl_llava.tools.check_data import check_data

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
TILED = ("llava_next", "llava_onevision")
# (width, height) of the pictures of the rows, and their tokens: for LLaVA-1.5 always 16; else 16 of the whole picture,
# those of the tiles without what only fills them up, and one at the end of each line of tiles. Qwen2.5-VL: one for
# 8 x 8 pixels, after sides are rounded to eights and brought below 24 such squares.
ALONE, WIDE, HIGH = (40, 32), (50, 20), (30, 60)
TOKENS = {"llava": {ALONE: 16, WIDE: 16, HIGH: 16}, "llava_next": {ALONE: 70, WIDE: 52, HIGH: 56}}
TOKENS["llava_onevision"] = TOKENS["llava_next"]
TOKENS["qwen2_5_vl"] = {ALONE: 5 * 4, WIDE: 6 * 2, HIGH: 3 * 6}
# Where vLLM keeps the parts of LLaVA's families, and by which names it takes those of Qwen2.5-VL: those of the
# checkpoints on the Hub.
PARTS = dict.fromkeys(
    FAMILIES,
    ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector."),
)
PARTS["qwen2_5_vl"] = ("model.", "lm_head.", "visual.")


class Family:
    """A family's tiny base, an adapter for it, and trainers that vLLM answers.

    Args:
        name: One of `FAMILIES`.
        base: Its folder.
        folder: For the adapter.
    """

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.name, self.base = name, base
        self.adapter = make_adapter(base, folder)
        self.tokens = TOKENS[name]
        self.image_token = AutoConfig.from_pretrained(base).image_token_id

    def trainer(self, folder: Path, *shown: list[tuple[int, int]], **changes: Any) -> LlavaPPOTrainer:
        """A trainer whose rows show pictures of these sizes."""
        rows = {
            "prompt": [[{"role": "user", "content": f"What is in picture {i}?"}] for i in range(len(shown))],
            "images": [[tiny_models.image("red", size) for size in sizes] for sizes in shown],
        }
        dataset = Dataset.from_dict(rows).cast_column("images", List(Image()))
        return ppo_trainer(self.base, self.adapter, folder, train_dataset=dataset, **changes)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    base = request.getfixturevalue("family_folder")(request.param)
    return Family(request.param, base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_vllm(lambda *what: monkeypatch.setattr(*what, raising=False))


def batch_of(trainer: LlavaPPOTrainer) -> dict[str, Any]:
    return next(iter(trainer._batches_from(0)))


def prompts_of(batch: dict[str, Any]) -> list[list[int]]:
    """Token ids of each row."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("family", FAMILIES[1:], indirect=True)
def test_vllm_answers_as_the_policy_does_before_and_after_updates(family: Family, mode: str, tmp_path: Path) -> None:
    shown = [[ALONE], [], [HIGH], [WIDE]]
    if family.name == "qwen2_5_vl" or (family.name, mode) == ("llava_next", "server"):
        shown[2] = [HIGH, WIDE]
    with TinyServer(family.base) as server:
        where = on_server(server) if mode == "server" else {"use_vllm": True}
        trainer = family.trainer(tmp_path, *shown, learning_rate=0.1, **where)
        batch = batch_of(trainer)
        before, ours = greedy(trainer, batch)
        assert before == ours
        trainer.train()
        assert trainer.state.global_step == 2
        after, ours = greedy(trainer, batch)
        assert after == ours
        assert after != before
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert len(logged) == 2
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in logged)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_what_is_said_to_the_server(family: Family, tmp_path: Path) -> None:
    pair = [HIGH, WIDE] if family.name != "llava_onevision" else [HIGH]
    with TinyServer(family.base) as server:
        trainer = family.trainer(tmp_path, [ALONE], [], pair, [WIDE], **on_server(server))
        batch = batch_of(trainer)
        trainer.rollout(batch, 1)
    sizes = [[image.size for image in images] for images in batch["columns"]["images"]]
    assert sorted(sizes) == sorted([[ALONE], [], pair, [WIDE]])
    # Pictures go to the server's own processor as they are ...
    asked = server.bodies("/v1/chat/completions/render")
    assert sorted(len(body["messages"][0]["content"]) for body in asked) == sorted(len(s) for s in sizes if s)
    bodies = {tuple(body["token_ids"]): body for body in server.bodies("/inference/v1/generate")}
    assert len(bodies) == 4
    for ids, shown in zip(prompts_of(batch), sizes, strict=True):
        # ... and the prompt goes out expanded, with the place of each picture in it.
        features = bodies[tuple(ids)]["features"]
        assert ids.count(family.image_token) == sum(family.tokens[size] for size in shown)
        places = [] if features is None else features["mm_placeholders"]["image"]
        assert [place["length"] for place in places] == [family.tokens[size] for size in shown]
        assert [ids[place["offset"] - 1] != family.image_token for place in places] == [True] * len(shown)
    with safe_open(family.base / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    names = server.bodies("/update_weights")[0]["update_info"]["names"]
    assert len(names) == len(stored) and set(names) == stored
    assert [name for name in names if not name.startswith(PARTS[family.name])] == ["image_newline"] * (
        family.name in TILED
    )


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_what_is_said_to_a_colocated_engine(family: Family, tmp_path: Path) -> None:
    pair = [HIGH, WIDE] if family.name != "llava_onevision" else [HIGH]
    trainer = family.trainer(tmp_path, [ALONE], [], pair, [WIDE], use_vllm=True)
    batch = batch_of(trainer)
    trainer.rollout(batch, 1)
    (asked,) = [said for name, said in TinyLLM.made.calls if name == "generate"]
    for (prompt, _), ids, images in zip(asked, prompts_of(batch), batch["columns"]["images"], strict=True):
        assert prompt["prompt_token_ids"].count(family.image_token) == len(images)
        longer = sum(family.tokens[image.size] - 1 for image in images)
        assert len(prompt["prompt_token_ids"]) == len(ids) - longer
        given = prompt.get("multi_modal_data", {}).get("image", [])
        assert [(image.size, image.tobytes()) for image in given] == [(i.size, i.tobytes()) for i in images]


@pytest.mark.parametrize("family", ["llava_onevision"], indirect=True)
def test_rows_that_vllm_would_see_otherwise_stop_the_run_before_it_begins(family: Family, tmp_path: Path) -> None:
    """Two pictures of a row are 17 tokens each for the policy, and tiles for vLLM."""
    with pytest.raises(RowError, match=r"train_dataset\[1\]: it has 2 images, and vLLM would process each as if"):
        family.trainer(tmp_path, [ALONE], [HIGH, WIDE], [], [WIDE], use_vllm=True)
    trainer = family.trainer(tmp_path, [ALONE], [HIGH, WIDE], [], [WIDE])
    counts = sorted(ids.count(4) for ids in prompts_of(batch_of(trainer)))
    assert counts == [0, 34, 52, 70]


@pytest.mark.parametrize("where", ["run", "trainer", "check-data"])
def test_a_family_whose_rollouts_were_never_compared_is_refused_in_one_line(
    where: str,
    family_folder: Callable[[str], Path],
    tiny_llava_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = family_folder("qwen2_vl")
    prompt_rows().to_parquet(tmp_path / "rows.parquet")
    words = ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.parquet"), "--use_vllm", "true"]
    words += ["--reward_funcs", "tiny_trainers:even_tokens", "--value_init", "policy", "--use_peft", "true"]
    words += ["--output_dir", str(tmp_path / "run"), "--response_length", "8"]
    expected = (
        f"`use_vllm: true`: '{base}' is a Qwen2-VL, and rollouts in vLLM have been seen to be right for LLaVA-1.5, "
        "LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL only. Choose one of these, or leave `use_vllm` out, which generates "
        "in transformers"
    )
    if where == "check-data":
        assert check_data.main([*words, "--stage", "ppo"]) == 1
        assert f"a run would fail: {expected}" in capsys.readouterr().out
        return
    with pytest.raises(InputError, match=re.escape(expected)):
        if where == "run":
            train_ppo.main([*words, "--use_cpu", "--bf16", "false"])
        else:
            policy = AutoModelForImageTextToText.from_pretrained(base)
            ppo_trainer(tiny_llava_dir, tiny_llava_dir, tmp_path, model=policy, use_vllm=True)


@pytest.mark.parametrize("family", TILED, indirect=True)
def test_pictures_that_become_tiles_are_not_padded_to_a_square(family: Family, tmp_path: Path) -> None:
    trainer = family.trainer(tmp_path, [ALONE], [], [HIGH], [WIDE])
    image = tiny_models.image("red", WIDE)
    assert as_seen(image, trainer.processing_class) is image


@pytest.mark.parametrize("family", TILED, indirect=True)
def test_tied_embeddings_are_sent_once(family: Family, tmp_path: Path) -> None:
    """As in LLaVA-OneVision 0.5B: vLLM takes the head from the embedding."""
    from trl_llava.ppo.dense_weights import DenseWeights

    model = AutoModelForImageTextToText.from_pretrained(family.base, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tied = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    sent = [name for name, _ in DenseWeights(tied).tensors()]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(sent) == sorted(file.keys())
    assert "language_model.model.embed_tokens.weight" in sent and not any("lm_head" in name for name in sent)
