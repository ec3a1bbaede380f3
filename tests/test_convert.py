"""The paper's checkpoints, converted: they compute what they computed, and nothing half is left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import golden_data
import pytest
import torch
from golden_data import MODEL, expanded, read
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from trl_llava import cli
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.adapters import load_adapter
from trl_llava.models.chunked_head import Sampling
from trl_llava.models.load import load_policy, load_sequence_classifier
from trl_llava.models.model_inputs import ModelInputs
from trl_llava.ppo.passes import response_logprobs, response_values
from trl_llava.ppo.ppo_math import response_mask
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.convert import adapter as convert_adapter
from trl_llava.tools.convert import layouts as checkpoint_layouts
from trl_llava.tools.convert import model as convert_model
from trl_llava.tools.convert import paper_tokenizer
from trl_llava.tools.convert.convert_checkpoint import VALUE_FOLDER, convert

OUT = golden_data.tensors("4_outputs.safetensors")
LAYOUTS = {"rl_init": "rl_init", "rm": "rm/checkpoint-*", "ppo": "ppo/checkpoint-*"}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All four layouts, converted. Read only."""
    folder = tmp_path_factory.mktemp("converted")
    base = golden_data.convert_base(folder)
    found = {name: next(MODEL.glob(pattern)) for name, pattern in LAYOUTS.items()}
    for name, source in found.items():
        convert(str(source), folder / name, base=str(base))
    return SimpleNamespace(base=base, sources=found, **{name: folder / name for name in found})


@pytest.fixture(scope="module")
def base(made: SimpleNamespace) -> PreTrainedModel:
    return load_policy(LlavaModelConfig(model_name_or_path=str(made.base))).eval()


def policy(made: SimpleNamespace, name: str) -> PreTrainedModel:
    model = load_policy(LlavaModelConfig(model_name_or_path=str(made.base)))
    return load_adapter(model, str(getattr(made, name)), is_trainable=False).eval()


def classifier(made: SimpleNamespace, adapter: Path) -> PreTrainedModel:
    model = load_sequence_classifier(str(made.base), LlavaModelConfig())
    return load_adapter(model, str(adapter), is_trainable=False).eval()


def batch(model: PreTrainedModel, ids: str, mask: str) -> dict[str, torch.Tensor]:
    """A batch of the set for one of our models."""
    slots = (OUT[ids], OUT[mask], model.config.image_token_id, model.config.image_seq_length)
    input_ids, attention_mask = expanded(*slots)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": OUT["pixel_values"]}


def rollout(model: PreTrainedModel) -> tuple[ModelInputs, torch.Tensor, torch.Tensor]:
    """The set's queries and responses, and which tokens of these are real."""
    inputs = batch(model, "ppo_fwd.queries", "ppo_fwd.query_attn_masks")
    prompts = ModelInputs(
        inputs["input_ids"],
        inputs["attention_mask"],
        {"pixel_values": list(OUT["pixel_values"].split(1))},
    )
    responses = OUT["ppo_fwd.responses"]
    return prompts, responses, response_mask(responses, model.config.get_text_config().eos_token_id)


# --- the same numbers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_model_on_a_left_padded_batch(base: PreTrainedModel) -> None:
    inputs = batch(base, "lm.input_ids", "lm.attention_mask")
    assert torch.equal(inputs["attention_mask"], OUT["lm.expanded_attention_mask"])
    assert (inputs["attention_mask"][:, 0] == 0).any()
    outputs = base(**inputs, output_hidden_states=True)
    close(outputs.logits[:, -16:], OUT["lm.logits_last16"])
    close(outputs.hidden_states[-1][:, -1], OUT["lm.hidden_last"])
    every_layer = torch.stack([hidden[:, -1] for hidden in outputs.hidden_states], dim=1)
    close(every_layer, OUT["lm.hidden_all_layers_last"])
    real = inputs["attention_mask"].bool()
    close(outputs.logits.logsumexp(-1)[real], OUT["lm.logits_logsumexp"][real])


@torch.no_grad()
def test_image_features(base: PreTrainedModel) -> None:
    features = base.get_image_features(OUT["pixel_values"])
    close(torch.stack(list(features.pooler_output)), OUT["vision.projected"])
    close(features.hidden_states[-2][:, 1:], OUT["vision.selected_patch_features"])


def test_linear_projector_is_exact(base: PreTrainedModel) -> None:
    source = torch.load(MODEL / "sft_model" / "pytorch_model.bin", weights_only=True)
    patches = OUT["vision.selected_patch_features"]
    wanted = torch.nn.functional.linear(
        patches, source["model.mm_projector.weight"], source["model.mm_projector.bias"]
    )
    assert torch.equal(base.model.multi_modal_projector(patches), wanted)


@torch.no_grad()
def test_supervised_loss(base: PreTrainedModel) -> None:
    slots = (base.config.image_token_id, base.config.image_seq_length)
    ids, mask = expanded(OUT["sft.input_ids"], OUT["sft.attention_mask"], *slots)
    labels = ids.masked_fill(ids == slots[0], -100)
    # The labels of the set, an image's one slot widened.
    _, learned = expanded(OUT["sft.input_ids"], (OUT["sft.labels"] != -100).long(), *slots)
    loss = base(
        input_ids=ids,
        attention_mask=mask,
        labels=labels.masked_fill(learned == 0, -100),
        pixel_values=OUT["pixel_values"],
    ).loss
    close(loss, OUT["sft.loss"])


@torch.no_grad()
def test_reward_model(made: SimpleNamespace) -> None:
    model = classifier(made, made.rm)
    found = model(**batch(model, "rm.input_ids", "rm.attention_mask"), output_hidden_states=True)
    close(found.logits.squeeze(-1), OUT["rm.rewards"])
    close(found.hidden_states[-1][:, -1], OUT["rm.hidden_last"])
    close(model(**batch(model, "lm.input_ids", "lm.attention_mask")).logits.squeeze(-1), OUT["rm.rewards_on_lm_batch"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_initial_policy_and_reference(made: SimpleNamespace, temperature: float) -> None:
    model = policy(made, "rl_init")
    prompts, responses, mask = rollout(model)
    logprobs, entropies = response_logprobs(model, prompts, responses, mask, Sampling(temperature), entropies=True)
    close(logprobs, OUT[f"ppo_fwd.t{temperature}.logprobs"] * mask)
    close(entropies[mask], OUT[f"ppo_fwd.t{temperature}.entropies"][mask])
    if temperature == 1.0:
        close(logprobs, OUT["ppo_fwd.ref_logprobs"] * mask)


@torch.no_grad()
def test_trained_policy(made: SimpleNamespace) -> None:
    model = policy(made, "ppo")
    prompts, responses, mask = rollout(model)
    close(
        response_logprobs(model, prompts, responses, mask, Sampling())[0], OUT["ppo_fwd.after_update.logprobs"] * mask
    )
    inputs = batch(model, "ppo_fwd.queries", "ppo_fwd.query_attn_masks")
    for cache in (True, False):
        wanted = OUT[f"generate.greedy_cache_{cache}"]
        found = model.generate(**inputs, max_new_tokens=wanted.shape[1], do_sample=False, use_cache=cache)
        assert torch.equal(found[:, inputs["input_ids"].shape[1] :], wanted)


@torch.no_grad()
def test_value_model(made: SimpleNamespace) -> None:
    model = classifier(made, made.ppo / VALUE_FOLDER)
    found = response_values(model, *rollout(model))
    mask = rollout(model)[2]
    close(found[mask], OUT["ppo_fwd.after_update.values"][mask])
    head = model.get_base_model().score
    close(head.weight, OUT["ppo_fwd.value_head_weight"])
    close(head.bias, OUT["ppo_fwd.value_head_bias"])


def test_plain_from_pretrained_finds_everything(made: SimpleNamespace) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(made.base, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(made.base)
    assert processor.image_token_id == model.config.image_token_id
    assert len(processor.tokenizer) == model.config.text_config.vocab_size  # no row was added
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    for name in LAYOUTS:
        assert PeftConfig.from_pretrained(getattr(made, name)).base_model_name_or_path == str(made.base)
        assert not list(Path(getattr(made, name)).rglob("*.bin"))


# --- variants of the source -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the set's model whose files a test may change."""
    return Path(shutil.copytree(MODEL / "sft_model", tmp_path / "source", copy_function=shutil.copyfile))


def weights(source: Path) -> dict[str, torch.Tensor]:
    return torch.load(source / "pytorch_model.bin", weights_only=True)


@torch.no_grad()
def test_two_layer_projector(source: Path, tmp_path: Path) -> None:
    golden = golden_data.tensors("4b_mlp2x_gelu.safetensors")
    tensors = {name: value for name, value in weights(source).items() if ".mm_projector." not in name}
    tensors |= {name.removeprefix("weight:"): value for name, value in golden.items() if name.startswith("weight:")}
    torch.save(tensors, source / "pytorch_model.bin")
    edit_config(source, mm_projector_type="mlp2x_gelu")
    convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())
    model = load_policy(LlavaModelConfig(model_name_or_path=str(tmp_path / "new")))
    outputs = model(**batch(model, "lm.input_ids", "lm.attention_mask"), output_hidden_states=True)
    close(outputs.logits[:, -16:], golden["logits_last16"])
    close(outputs.hidden_states[-1][:, -1], golden["hidden_last"])
    close(torch.stack(list(model.get_image_features(OUT["pixel_values"]).pooler_output)), golden["projected"])


def edit_config(source: Path, **changes: object) -> None:
    config = read("4_model/sft_model/config.json") | changes
    (source / "config.json").write_text(json.dumps(config))


def test_vision_weights_from_the_clip_id(source: Path, tmp_path: Path, made: SimpleNamespace) -> None:
    tensors = {name: value for name, value in weights(source).items() if "vision_tower" not in name}
    torch.save(tensors, source / "pytorch_model.bin")
    kind, notes = convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())
    assert kind == "model"
    named = read("4_model/sft_model/config.json")["mm_vision_tower"]
    assert any("stores no vision weights" in note and named in note for note in notes)
    stored = load_file(made.base / "model.safetensors")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_a_large_model_is_written_in_shards(
    source: Path, tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(source)
    names = list(tensors)
    parts = [names[i::3] for i in range(3)]
    (source / "pytorch_model.bin").unlink()
    for i, part in enumerate(parts):
        torch.save({name: tensors[name].clone() for name in part}, source / f"pytorch_model-{i}.bin")
    index = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    largest = max(value.numel() * 4 for value in tensors.values())
    monkeypatch.setattr(convert_model, "SHARD_BYTES", largest + 1000)
    convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())
    written = [load_file(file) for file in (tmp_path / "new").glob("model-*.safetensors")]
    assert len(written) > 2
    assert max(sum(value.numel() * 4 for value in part.values()) for part in written) <= largest + 1000
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    wanted = AutoModelForImageTextToText.from_pretrained(made.base).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


# --- refusals, and nothing half -------------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    """What lies in a folder beside the sources."""
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


class Payload:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must never run",))


def test_a_pickle_is_never_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**weights(source), "extra": Payload()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as tensors alone"):
        convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())
    assert "never run" not in capsys.readouterr().out
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        assert left_behind(tmp_path)  # the unfinished folder
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(error):
        convert(str(MODEL / "sft_model"), tmp_path / "new", vision_tower=golden_data.clip())
    assert left_behind(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty\. Choose another DST"):
        convert(str(MODEL / "sft_model"), tmp_path / "new", vision_tower=golden_data.clip())
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu', expected one of"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"hidden_size": 32}, r"but its config.json makes it"),
        ({"num_hidden_layers": 7}, r"lacks \d+ weights of its model, first language_model"),
    ],
)
def test_other_models_are_refused(source: Path, tmp_path: Path, change: dict, message: str) -> None:
    edit_config(source, **change)
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())
    assert left_behind(tmp_path) == []


def test_a_missing_tower_is_named(source: Path, tmp_path: Path) -> None:
    edit_config(source, mm_vision_tower="no-such/clip")
    with pytest.raises(ValueError, match=r"vision tower 'no-such/clip'.* Give its folder with --vision_tower"):
        convert(str(source), tmp_path / "new")


def test_a_reward_model_without_its_head_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.sources["rm"], tmp_path / "source", copy_function=shutil.copyfile))
    (copy / "reward_head").unlink()
    with pytest.raises(ValueError, match="it has no reward_head, so its scores would be random"):
        convert(str(copy), tmp_path / "new", base=str(made.base))


def test_a_ppo_checkpoint_without_its_head_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.sources["ppo"], tmp_path / "source", copy_function=shutil.copyfile))
    (copy / "value_head.pt").unlink()
    with pytest.raises(ValueError, match=r"PPO checkpoint without the value head \(value_head.pt\)"):
        convert(str(copy), tmp_path / "new", base=str(made.base))


def test_an_adapter_needs_its_base(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Name the base with --base"):
        convert(str(made.sources["rl_init"]), tmp_path / "new")


def test_an_adapter_of_another_base_is_refused(made: SimpleNamespace, tmp_path: Path, tiny_llava_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the base .*tiny_llava.*: base_model.model.model.language_model"
    ):
        convert(str(made.sources["rl_init"]), tmp_path / "new", base=str(tiny_llava_dir))
    assert left_behind(tmp_path) == []


def test_weights_beside_an_adapter_are_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.sources["rl_init"], tmp_path / "source", copy_function=shutil.copyfile))
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, copy / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"holds 1 weights that were trained beside the adapter"):
        convert(str(copy), tmp_path / "new", base=str(made.base))


@pytest.mark.parametrize(("name", "value"), [("bias", "all"), ("use_dora", True), ("peft_type", "IA3")])
def test_only_plain_lora(made: SimpleNamespace, tmp_path: Path, name: str, value: object) -> None:
    copy = Path(shutil.copytree(made.sources["rl_init"], tmp_path / "source", copy_function=shutil.copyfile))
    config = copy / "lora_default" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"has {name}={value!r}; only plain LoRA adapters"):
        convert(str(copy), tmp_path / "new", base=str(made.base))


def test_folders_that_are_no_checkpoint(tmp_path: Path, made: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="holds checkpoints; give one of them as SRC: checkpoint-"):
        convert(str(made.sources["ppo"].parent), tmp_path / "new", base=str(made.base))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"in none of the layouts that can be converted: it holds \[\]"):
        convert(str(tmp_path / "empty"), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(str(tmp_path / "nowhere"), tmp_path / "new")


# --- the command ----------------------------------------------------------------------------------------------------


def test_convert_then_score(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["convert", str(MODEL / "sft_model"), str(tmp_path / "base")]) == 0  # finds CLIP beside it
    assert "model -> " in capsys.readouterr().out
    command = ["convert", str(made.sources["rm"]), str(tmp_path / "rm"), "--base", "org/base"]
    command += ["--base_folder", str(tmp_path / "base")]
    assert cli.main(command) == 0
    assert "judging prompt, with captions" in capsys.readouterr().out
    assert PeftConfig.from_pretrained(tmp_path / "rm").base_model_name_or_path == "org/base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "base").rename(tmp_path / "org" / "base")  # as if it were on the Hub
    image = next(iter(sorted((golden_data.GOLDEN / "images").iterdir())))
    asked = ["--image", str(image), "--question", "What is it?", "--answer", "A cat.", "--caption", "A cat sleeps."]
    assert cli.main(["score", "--reward_model", str(tmp_path / "rm"), *asked]) == 0
    printed = float(capsys.readouterr().out.strip().splitlines()[-1])
    reward = FactualReward.from_pretrained(str(made.rm))
    (score,) = reward(["What is it?"], ["A cat."], images=[[str(image)]], captions=[["A cat sleeps."]])
    assert printed == pytest.approx(score, abs=1e-4)
    assert cli.main(["convert", str(made.sources["rm"]), str(tmp_path / "again")]) == 1
    assert "Name the base with --base" in capsys.readouterr().err


def test_base_folder_is_only_where_it_is_now(made: SimpleNamespace, tmp_path: Path) -> None:
    convert(str(made.sources["ppo"]), tmp_path / "new", base="org/base", base_folder=str(made.base))
    for folder in (tmp_path / "new", tmp_path / "new" / VALUE_FOLDER):
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == "org/base"
    assert convert_adapter.HEAD in str(load_file(tmp_path / "new" / VALUE_FOLDER / "adapter_model.safetensors").keys())


MEMORY = """
import re, sys, threading, time
from pathlib import Path
from trl_llava.tools.convert import model as convert_model
from trl_llava.tools.convert.convert_checkpoint import convert
convert_model.SHARD_BYTES = 30_000_000
convert(sys.argv[1], sys.argv[2] + "-small", vision_tower=sys.argv[4])  # what is loaded once
def own():  # KiB; pages of mapped files, which the system takes back when it needs them, do not count
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def watch():
    while not done.wait(0.002):
        held.append(own())
before, held, done = own(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
convert(sys.argv[3], sys.argv[2], vision_tower=sys.argv[4])
done.set()
watcher.join()
print("grown", max(held) - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_shard(source: Path, tmp_path: Path) -> None:
    """Ten shards of 25 MB: the peak grows by what one shard and its copy take, not by 250 MB."""
    tensors = weights(source)
    hidden, shards = tensors["model.norm.weight"].numel(), 10
    wide = 25_000_000 // (4 * hidden) // 3
    index = dict.fromkeys(tensors, "pytorch_model-base.bin")
    for i in range(2, shards + 2):
        layer = {
            k.replace(".layers.0.", f".layers.{i}."): v
            for k, v in tensors.items()
            if ".layers.0." in k and "vision" not in k
        }
        layer = {
            k: torch.rand((wide, hidden) if "gate" in k or "up_" in k else (hidden, wide)) if ".mlp." in k else v
            for k, v in layer.items()
        }
        torch.save(layer, source / f"pytorch_model-{i}.bin")
        index |= dict.fromkeys(layer, f"pytorch_model-{i}.bin")
    for name in [name for name in tensors if ".mlp." in name and "vision" not in name]:
        tensors[name] = torch.rand((wide, hidden) if "down" not in name else (hidden, wide))
    torch.save(tensors, source / "pytorch_model-base.bin")
    (source / "pytorch_model.bin").unlink()
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    edit_config(source, num_hidden_layers=shards + 2, intermediate_size=wide)
    arguments = [str(MODEL / "sft_model"), str(tmp_path / "new"), str(source), golden_data.clip()]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "new" / "model.safetensors.index.json").is_file()
    assert int(done.stdout.split()[-1]) < 130_000  # kB


def test_a_vocabulary_that_lost_later_turns_is_noted(source: Path, tmp_path: Path, monkeypatch) -> None:
    assert not any(
        "later turns" in note for note in convert(str(source), tmp_path / "a", vision_tower=golden_data.clip())[1]
    )
    monkeypatch.setattr(convert_model, "reads_later_turns_as_unknown", lambda *args: True)
    notes = convert(str(source), tmp_path / "b", vision_tower=golden_data.clip())[1]
    assert any("USER of later turns" in note for note in notes)


def test_a_tokenizer_that_is_read_otherwise_is_refused(source: Path, tmp_path: Path, monkeypatch) -> None:
    merges = paper_tokenizer._merges
    monkeypatch.setattr(paper_tokenizer, "_merges", lambda *args: merges(*args)[::-1])
    with pytest.raises(ValueError, match=r"the fast tokenizer reads .*A chat .* otherwise than the checkpoint.s own"):
        convert(str(source), tmp_path / "new", vision_tower=golden_data.clip())


def test_a_folder_inside_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def downloaded(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(MODEL)

    monkeypatch.setattr(checkpoint_layouts, "snapshot_download", downloaded)
    assert checkpoint_layouts.find_source("org/name/sft_model", "v1") == MODEL / "sft_model"
    assert asked == {"repository": "org/name", "revision": "v1", "allow_patterns": "sft_model/*"}
    with pytest.raises(FileNotFoundError, match="the repository org/name has no folder 'other'"):
        checkpoint_layouts.find_source("org/name/other")
