"""Every recipe runs two steps with its own settings, on models of its architecture at toy size.

Only sizes, paths and what a CPU cannot do are overridden; a recipe is run after those it needs.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_models
import toy_models
import yaml
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
QUIET = ["--disable_tqdm", "--report_to", "none"]
CPU = ["--use_cpu", "--bf16", "false", "--dtype", "float32"]
# Left out of the default run, where each folder keeps one recipe that needs the others.
SLOW = pytest.mark.slow


class Workshop:
    """One folder with the published files, hundreds of bytes each, and every recipe's models and results.

    On the device "cuda" the recipes keep their dtype and their 4 bits.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device, self.ran = folder, device, {}
        (folder / "coco").mkdir()
        names = [f"{color}.jpg" for color in ("red", "blue", "green", "white")]
        for name in names:
            tiny_models.image(name[:-4]).save(folder / "coco" / name)
        captions = {
            f"{prefix}{name}": [f"A {name[:-4]} square.", "A picture."] for name in names for prefix in ("", "aok_")
        }
        self.write("image_to_caption", captions)
        question = {"from": "human", "value": "<image>\nWhat is it?"}
        rows = [{"image": name, "conversations": [question]} for name in names * 3]
        said = {"from": "gpt", "value": "A square."}
        self.write(
            "sft",
            [{**row, "conversations": [question, said, {"from": "human", "value": "Sure?"}, said]} for row in rows],
        )
        wrong = {"from": "gpt", "value": "A large dog."}
        pair = {"output_1": wrong, "output_2": said, "preference": 2}
        self.write("reward", [{**row, **pair, "conversations": [question, wrong]} for row in rows])
        kinds = [{}, {"caption_type": 2}, {"caption_type": 6, "length_bonus": -1.0}]
        self.write("ppo", [{**row, **kinds[i % 3]} for i, row in enumerate(rows)])

    def write(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    def model(self, name: str) -> Path:
        """The toy of a recipe's base."""
        folder = self.folder / "models" / Path(name).name
        family = {"Qwen2.5-VL-3B-Instruct": "qwen2_5_vl", "SmolVLM-500M-Instruct": "smolvlm"}.get(folder.name)
        if not folder.exists() and family is not None:
            tiny_families.FAMILIES[family](folder)
        elif not folder.exists() and "onevision" in name:
            toy_models.onevision(folder)
        elif not folder.exists():
            size, pixels = ("13b" if "13b" in name else "7b"), (224 if "224" in name else 336)
            template = toy_models.NO_STOP if name.startswith("llava-hf/") else toy_models.VICUNA_V1_CHAT_TEMPLATE
            toy_models.llava_1_5(folder, size, pixels, chat_template=template)
        return folder

    def run(self, path: Path) -> Any:
        """Runs a recipe, after what it needs; a second call returns the same trainer."""
        if path in self.ran:
            return self.ran[path]
        recipe, stage = yaml.safe_load(path.read_text()), path.stem.split("_")[0]
        rows = {"dpo": "reward", "grpo": "ppo", "rloo": "ppo"}.get(stage, stage)
        words = [*QUIET, *(CPU if self.device == "cpu" else [])]
        words += ["--dataset_name", f"{self.folder}/{rows}.json", "--image_folder", f"{self.folder}/coco"]
        words += ["--output_dir", f"{self.folder}/{path.parent.name}/{path.stem}", *self.sizes(stage)]
        if "captions_file" in recipe:
            words += ["--captions_file", f"{self.folder}/image_to_caption.json"]
        if "model_name_or_path" in recipe:
            words += ["--model_name_or_path", str(self.model(recipe["model_name_or_path"]))]
        for field in ("sft_model_path", "reward_model_path", "adapter_name_or_path"):
            if field in recipe:
                needed = Path(recipe[field].removeprefix("runs/").removesuffix("/checkpoint-200"))
                self.run(RECIPES / needed.with_suffix(".yaml"))
                words += [f"--{field}", str(self.folder / needed)]
        if recipe.get("load_in_4bit") and stage != "sft" and self.device == "cpu":
            words += ["--load_in_4bit", "false"]  # slow on a CPU; SFT does it
        words += ["--dataloader_num_workers", "0"] if recipe.get("dataloader_num_workers") else []
        if recipe.get("test_split_size"):
            words += ["--test_split_size", "2"]
        entry = importlib.import_module(f"trl_llava.train_{stage}")
        AcceleratorState._reset_state(True)  # recipes need not have one precision
        self.ran[path] = entry.main(["--config", str(path), *words])
        return self.ran[path]

    def sizes(self, stage: str) -> list[str]:
        """Batches of a row or two, answers of four tokens, two steps; the limits in tokens stay."""
        sizes = ["--per_device_train_batch_size", "1" if stage in ("sft", "reward", "dpo") else "2"]
        if stage == "ppo":
            short = ["--total_episodes", "8", "--response_length", "4", "--local_rollout_forward_batch_size", "4"]
            return [*sizes, "--gradient_accumulation_steps", "2", *short, "--num_sample_generations", "0"]
        sizes += ["--gradient_accumulation_steps", "1", "--max_steps", "2"]
        return (
            [*sizes, "--num_generations", "2", "--max_completion_length", "4"] if stage in ("grpo", "rloo") else sizes
        )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def from_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths inside recipes are relative to the checkout."""
    monkeypatch.chdir(ROOT)
    yield


def recipes() -> list[Any]:
    found = sorted(path for path in RECIPES.rglob("*.yaml"))
    quick = {"llava-rlhf-7b-v1.5-224/ppo.yaml", "llava-1.5-7b-hf/sft.yaml", "llava-onevision-0.5b/sft.yaml"}
    quick |= {"llava-rlhf-13b-v1.5-336/reward.yaml", "qwen2.5-vl-3b/reward.yaml", "smolvlm-500m/sft.yaml"}
    names = [str(path.relative_to(RECIPES)) for path in found]
    assert quick <= set(names)
    return [pytest.param(name, id=name, marks=[] if name in quick else SLOW) for name in names]


@pytest.mark.usefixtures("from_root")
@pytest.mark.parametrize("name", recipes())
def test_recipe_runs_two_steps(workshop: Workshop, name: str) -> None:
    run_two_steps(workshop, name)


def run_two_steps(workshop: Workshop, name: str) -> None:
    """Run a recipe, and see that it trained what it should."""
    trainer = workshop.run(RECIPES / name)
    assert trainer.state.global_step == 2
    folder = Path(trainer.args.output_dir)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (64, 16, 0.0)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    linears = {name.split(".lora_")[0].split(".")[-1] for name in trained if "lora_" in name}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("vision" in name or "projector" in name for name in trained)


@pytest.mark.usefixtures("from_root")
def test_a_7b_policy_at_224_with_a_13b_reward_model_at_336(workshop: Workshop) -> None:
    trainer = workshop.run(RECIPES / "llava-rlhf-7b-v1.5-224/ppo.yaml")
    policy, value = trainer.policy_model.config, trainer.value_model.config
    (reward,) = trainer.scorer.reward_funcs
    for config, layers, patches in ((policy, 4, 16), (value, 5, 24), (reward.model.config, 5, 24)):
        assert config.text_config.num_hidden_layers == layers
        assert config.vision_config.image_size // config.vision_config.patch_size == patches


@pytest.mark.parametrize(
    ("ablation", "of", "changed"),
    [
        ("llava-rlhf-7b-v1.5-224/ppo_no_captions", "ppo", "reward_model_path"),
        ("llava-rlhf-7b-v1.5-224/ppo_no_correctness", "ppo", "correctness_coef"),
        ("llava-rlhf-7b-v1.5-224/ppo_no_length", "ppo", "length_coef"),
        ("llava-rlhf-13b-v1.5-336/reward_no_captions", "reward", "with_captions"),
        ("llava-1.5-7b-hf/reward_no_captions", "reward", "with_captions"),
        ("llava-onevision-0.5b/reward_no_captions", "reward", "with_captions"),
        ("qwen2.5-vl-3b/reward_no_captions", "reward", "with_captions"),
        ("smolvlm-500m/reward_no_captions", "reward", "with_captions"),
    ],
)
def test_an_ablation_differs_in_one_line(ablation: str, of: str, changed: str) -> None:
    path = RECIPES / f"{ablation}.yaml"
    texts = [file.read_text() for file in (path, path.with_stem(of))]
    lines = [[line for line in text.splitlines() if not line.startswith("#")] for text in texts]
    differing = [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]
    assert len(differing) == 1
    assert {line.split(":")[0] for line in differing[0]} == {changed}
