"""`trl-llava eval-reward` and `score`: measures by hand, benchmarks in their published layouts, bad input."""

import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from transformers import AutoProcessor

from trl_llava import cli
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.models.load import load_sequence_classifier
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.evaluate import eval_reward, files, mmhal, objects, own_data, page, preferences, statistics
from trl_llava.tools.evaluate.eval_reward import category_of


@pytest.mark.parametrize("module", [eval_reward, files, mmhal, objects, own_data, page, preferences, statistics])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def save_reward(base: Path, folder: Path, prompt: JudgingPrompt | None) -> Path:
    model = load_sequence_classifier(str(base), LlavaModelConfig(dtype="float32"), seed=1)
    FactualReward(model, AutoProcessor.from_pretrained(base), prompt).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_captions(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward(tiny_llava_dir, tmp_path_factory.mktemp("models") / "facts", JudgingPrompt())


@pytest.fixture(scope="module")
def plain(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward(tiny_llava_dir, tmp_path_factory.mktemp("models") / "plain", JudgingPrompt(with_captions=False))


def pairs(folder: Path, count: int = 6, captions: bool = True) -> Path:
    tiny_models.image("red").save(folder / "red.png")
    rows = [
        {
            "image": "red.png",
            "prompt": f"What is in picture {number}?",
            "chosen": f"A red square {number}.",
            "rejected": "A dog, and a cat.",
            "category": "ab"[number % 2],
            **({"captions": ["a red square"]} if captions else {}),
        }
        for number in range(count)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures_of_scores() -> None:
    gaps = [2.0, -1.0, 0.0, 0.5, 3.0]
    found = preferences.statistics_of(gaps, [1, 1, -2, 0, 4], ["a", "a", "b", "b", "b"])
    values = {name: float(own.statistic(np.arange(5))) for name, own in found.items()}
    assert values.pop("length_correlation") == pytest.approx(
        (2 - 1 + 0 + 0 + 12) / math.sqrt((4 + 1 + 0 + 0.25 + 9) * (1 + 1 + 4 + 0 + 16))
    )
    expected = {
        "accuracy": 3 / 5,
        "ties": 1 / 5,
        "macro_average": (1 / 2 + 2 / 3) / 2,
        "accuracy_a": 1 / 2,
        "accuracy_b": 2 / 3,
        **{f"right_in_fifth_{fifth}": right for fifth, right in zip(range(1, 6), (0, 1, 0, 1, 1), strict=True)},
        # sigmoid of 0, 0.5, 1, 2 and 3
        **dict(
            zip(
                (f"expected_in_fifth_{fifth}" for fifth in range(1, 6)),
                (0.5, 0.6224593, 0.7310586, 0.8807971, 0.9525741),
                strict=True,
            )
        ),
    }
    assert values == {name: pytest.approx(value) for name, value in expected.items()}
    counted = {name: found[name].counted for name in ("accuracy", "accuracy_a", "accuracy_b", "right_in_fifth_1")}
    assert counted == {"accuracy": None, "accuracy_a": 2, "accuracy_b": 3, "right_in_fifth_1": 1}


@pytest.mark.parametrize(
    ("record", "category"),
    [
        ({"id": "mathverse_3", "query_source": "x"}, "reasoning"),
        ({"id": "mmmu_3", "query_source": "x"}, "reasoning"),
        ({"id": "RLHF-V-2", "query_source": "x"}, "hallucination"),
        ({"id": "hallucination_pair-2", "query_source": "x"}, "hallucination"),
        ({"id": "wildvision-battle-2", "query_source": "x"}, "general"),
        ({"id": "77", "query_source": "x"}, "general"),
        ({"ID": "math_1", "Category": "reasoning"}, "reasoning/math"),
        ({"ID": "x_1", "Category": "safety"}, "safety/toxicity"),
        ({"ID": "x_1", "Category": "Knowledge"}, "knowledge"),
        ({"id": "5"}, None),
    ],
)
def test_categories_are_those_of_the_benchmarks(record: dict[str, str], category: str | None) -> None:
    assert category_of(record) == category


# --- the command -----------------------------------------------------------------------------------------------------


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["eval-reward", *words, "--output_dir", str(tmp_path / "out")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    return found


def test_models_are_compared_with_each_other_and_with_length(
    with_captions: Path, plain: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "blind"
    model = load_sequence_classifier(str(tiny_llama_dir), LlavaModelConfig(dtype="float32"), seed=1)
    model.save_pretrained(blind)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(blind)
    models = [word for path in (with_captions, plain, blind) for word in ("--reward_model", str(path))]
    found = run(tmp_path, *models, "--benchmark", str(pairs(tmp_path)))["pairs.jsonl"]["measures"]
    names = ["facts", "facts, without captions", "plain", "blind", "the longer completion"]
    assert list(found["accuracy"]["values"]) == names
    assert found["accuracy"]["values"]["the longer completion"]["value"] == 0.0  # each chosen one is shorter
    assert set(found) >= {"macro_average", "accuracy_a", "accuracy_b", "ties", "length_correlation"}
    # What stands in the file of answers are the scores that the model gives.
    reward = FactualReward.from_pretrained(str(with_captions))
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers" / "pairs.jsonl").read_text().splitlines()]
    image = tiny_models.image("red")
    prompt = [{"role": "user", "content": "What is in picture 3?"}]
    completion = [{"role": "assistant", "content": "A red square 3."}]
    (score,) = reward([prompt], [completion], images=[[image]], captions=[["a red square"]])
    assert lines[3]["answers"]["facts"]["chosen"] == pytest.approx(score, abs=1e-5)
    reward.judging_prompt = JudgingPrompt(with_captions=False)
    (score,) = reward([prompt], [completion], images=[[image]])
    assert lines[3]["answers"]["facts, without captions"]["chosen"] == pytest.approx(score, abs=1e-5)


def test_published_layouts_have_their_categories(plain: Path, tmp_path: Path) -> None:
    image = {"image": tiny_models.image("red")}
    texts = ["A red square.", "A dog."]
    rows = [
        {
            "id": name,
            "query_source": "s",
            "query": "What?",
            "response": texts,
            "human_ranking": [i % 2, 1 - i % 2],
            **image,
        }
        for i, name in enumerate(("mathverse_1", "RLAIF-V-2", "wildvision_3", "9"))
    ]
    strings = dict.fromkeys(("id", "query_source", "query"), Value("string"))
    features = {**strings, "response": List(Value("string")), "human_ranking": List(Value("int64")), "image": Image()}
    table = Dataset.from_list(rows, features=Features(features))
    DatasetDict({"test": table}).save_to_disk(tmp_path / "data" / "vl-rewardbench")
    (tmp_path / "data" / "multimodal-rewardbench").mkdir()
    tiny_models.image("red").save(tmp_path / "data" / "multimodal-rewardbench" / "a.png")
    records = [
        {
            "ID": name,
            "Category": kind,
            "Text": "What?",
            "Image": "a.png",
            "Output1": "A.",
            "Output2": "B.",
            "Better": "Output2",
        }
        for name, kind in (("pairs_1", "safety"), ("hate_2", "safety"), ("math_3", "reasoning"), ("4", "vqa"))
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "data" / "multimodal-rewardbench" / "test.jsonl").write_text(text)
    words = ["--reward_model", str(plain), "--data", str(tmp_path / "data")]
    found = run(tmp_path, *words, "--benchmark", "vl-rewardbench,multimodal-rewardbench")
    kinds = {task: [m for m in own["measures"] if m.startswith("accuracy_")] for task, own in found.items()}
    assert kinds == {
        "vl-rewardbench": ["accuracy_general", "accuracy_hallucination", "accuracy_reasoning"],
        "multimodal-rewardbench": [
            "accuracy_reasoning/math",
            "accuracy_safety/bias",
            "accuracy_safety/toxicity",
            "accuracy_vqa",
        ],
    }
    line = json.loads((tmp_path / "out" / "answers" / "vl-rewardbench.jsonl").read_text().splitlines()[1])
    assert line["truth"] == "chosen: A dog.\nrejected: A red square."  # rank 0 is the better one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reward_model", "BASE", "--benchmark", "PAIRS"], "has no score head"),
        (["--reward_model", "EMPTY", "--benchmark", "PAIRS"], "--reward_model: "),
        (["--reward_model", "PLAIN", "--benchmark", "reward"], "there is no 'reward'; expected vl-rewardbench"),
        (["--reward_model", "PLAIN", "--benchmark", "nowhere.json"], "The data set nowhere.json does not exist"),
        (["--reward_model", "PLAIN", "--reward_model", "PLAIN", "--benchmark", "PAIRS"], "named twice"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tiny_llava_dir: Path, plain: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"BASE": tiny_llava_dir, "EMPTY": tmp_path / "empty", "PLAIN": plain, "PAIRS": pairs(tmp_path)}
    words = [str(places.get(word, word)) for word in words]
    assert cli.main(["eval-reward", *words, "--output_dir", str(tmp_path / "out")]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_of_many_rows_is_that_of_each(with_captions: Path, tmp_path: Path, capsys: Any) -> None:
    data = pairs(tmp_path, 3)
    words = ["score", "--reward_model", str(with_captions), "--data", str(data)]
    assert cli.main(words) == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [
        {
            "image": "red.png",
            "prompt": f"What is in picture {i}?",
            "completion": f"A red square {i}.",
            "captions": ["a red square"],
        }
        for i in range(3)
    ]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    output = tmp_path / "scores.jsonl"
    assert cli.main([*words[:4], str(tmp_path / "told.jsonl"), "--output", str(output)]) == 0
    one = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["score"] for row in one] == pytest.approx([row["score_chosen"] for row in both], abs=1e-5)
    words = ["score", "--reward_model", str(with_captions), "--image", str(tmp_path / "red.png"), "--question"]
    words += ["What is in picture 2?", "--answer", "A red square 2.", "--caption", "a red square"]
    assert cli.main(words) == 0
    assert float(capsys.readouterr().out) == pytest.approx(one[2]["score"], abs=1e-4)


def test_score_asks_for_the_captions_that_its_reward_model_reads(
    with_captions: Path, tmp_path: Path, capsys: Any
) -> None:
    pairs(tmp_path)
    words = ["score", "--reward_model", str(with_captions), "--image", str(tmp_path / "red.png")]
    assert cli.main([*words, "--question", "?", "--answer", "!"]) == 2
    assert 'reads captions: give at least one --caption "...".' in capsys.readouterr().err


def test_score_needs_one_completion_or_many(with_captions: Path, tmp_path: Path, capsys: Any) -> None:
    data = str(pairs(tmp_path, 2, captions=False))
    for words in ([], ["--data", data, "--question", "?"], ["--image", "a.png"]):
        assert cli.main(["score", "--reward_model", str(with_captions), *words]) == 2
        assert "for one completion, or --data for many" in capsys.readouterr().err
    assert cli.main(["score", "--reward_model", str(with_captions), "--data", data]) == 1
    assert "pairs.jsonl[0]: it has no captions, but the reward needs them" in capsys.readouterr().err
