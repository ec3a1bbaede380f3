"""`trl-llava generate`, `chat` and `eval`: what a user sees, and the numbers behind it."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import tiny_models
import tiny_trainers
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from transformers import AutoProcessor

from trl_llava import cli
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.load import load_rows
from trl_llava.models.adapters import lora_config
from trl_llava.models.load import load_sequence_classifier
from trl_llava.prompts import JudgingPrompt
from trl_llava.publish.model_card import CardFacts, write_model_card
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.evaluate import statistics
from trl_llava.tools.evaluate.files import labels, numbers, table
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated
from trl_llava.tools.evaluate.objects import Vocabulary
from trl_llava.tools.evaluate.own_data import OwnTask, kind_of, read_answer
from trl_llava.tools.evaluate.results import Measure, Outcome, Question, TaskResult

GREEDY = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as a run leaves it: with its processor."""
    folder = tiny_trainers.make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("run"))
    AutoProcessor.from_pretrained(tiny_llava_dir).save_pretrained(folder)
    return folder


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    for name in ("red", "blue"):
        tiny_models.image(name).save(folder / f"{name}.png")
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = (
    {"image": "red.png", "question": "What is in the picture?", "objects": ["red square"]},
    {"image": "blue.png", "question": "Is there a red square?", "answer": "no"},
    {"question": "Is a picture a picture?", "answer": "yes"},
    {
        "image": "blue.png",
        "question": "Describe it.",
        "captions": ["a blue circle"],
        "objects": ["blue circle", "dog"],
    },
)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_sums() -> None:
    statistic = statistics.ratio([1, 0, 3], [1, 2, 3])
    assert statistic(np.arange(3)) == pytest.approx(4 / 6)
    assert statistic(np.array([2, 2])) == 1.0
    assert np.isnan(statistics.ratio([0], [0])(np.arange(1)))


def test_an_interval_of_a_share_is_near_the_binomial_one() -> None:
    # 40 of 100: the normal interval is 0.4 +- 1.96 * sqrt(0.4 * 0.6 / 100) = 0.304 to 0.496.
    found = statistics.estimate(statistics.ratio([1] * 40 + [0] * 60, [1] * 100), 100)
    assert found.value == 0.4
    assert (found.low, found.high) == (pytest.approx(0.304, abs=0.015), pytest.approx(0.496, abs=0.015))


def test_a_difference_is_paired() -> None:
    first, second = [0, 1] * 50, [0.5, 1.5] * 50  # the questions differ, the models differ by one half everywhere
    found = statistics.difference(statistics.ratio(first, [1] * 100), statistics.ratio(second, [1] * 100), 100)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    alone = statistics.estimate(statistics.ratio(first, [1] * 100), 100)
    assert alone.high - alone.low > 0.15


def test_resamples_without_a_value_do_not_count() -> None:
    found = statistics.estimate(statistics.ratio([1, 0, 0], [2, 0, 0]), 3)
    assert found == (0.5, 0.5, 0.5)
    assert np.isnan(statistics.estimate(statistics.ratio([0], [0]), 1).low)


def test_objects_in_a_text(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"dog": ["puppy", "puppies"], "person": ["man"]}))
    vocabulary = Vocabulary.of([["dog house", "bus"], ["dog"]], str(tmp_path / "words.json"))
    text = "Two puppies, a Man with a dog house, buses and a dogma."
    assert [mention.name for mention in vocabulary.mentions(text)] == ["dog", "person", "dog house", "bus"]
    invented = vocabulary.invented(text, ["puppy", "bus"])
    assert [text[mention.start : mention.end] for mention in invented] == ["Man", "dog house"]


@pytest.mark.parametrize(
    ("right", "text", "read"),
    [
        (["Yes"], "Yes, there is.", "yes"),
        (["no"], " 'No.' I said", "no"),
        (["no"], "Nothing there", None),
        (["no"], "There is no dog, yes", None),
        (["B"], "(B) a cat", "B"),
        (["A"], "A cat sits there.", None),
        (["C"], "I think the answer is C, since U.S. B.", "C"),
        (["C"], "C", "C"),
        (["two", "2"], "The two.", "two"),
    ],
)
def test_what_a_completion_answers(right: list[str], text: str, read: str | None) -> None:
    assert read_answer(text, kind_of(right)) == read


def row(**values: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    return {"row_name": "r", "images": [], "prompt": prompt, "captions": [], "answer_type": "general", **values}


def said(*texts: str) -> list[Generated]:
    return [Generated(text, len(text.split()) + 1, True) for text in texts]


def test_measures_of_own_data() -> None:
    rows = [
        row(objects=["dog", "cat"]),
        row(objects=["bus"]),
        row(answer="yes"),
        row(answer_type="no", objects=["dog"]),  # a right answer counts, not the list
        row(answer="B"),
        row(answer=["two", "2"]),
        row(answer=True),
    ]
    first = said("A dog, a dog and a bus.", "A bus.", "No.", "No dog.", "B. a dog", "It is 3", "yes")
    second = said("A cat.", "", "Yes.", "Yes.", "A. ", "2.", "maybe")
    result = OwnTask("own", rows, rows).judge(["one", "two"], [first, second])
    values = {
        measure.name: [float(statistic[measure.name].statistic(np.arange(7))) for statistic in result.statistics]
        for measure in result.measures
    }
    expected = {
        "invented_objects": [1 / 4, 0],  # dog, dog, bus, bus: the first bus
        "inventing_completions": [1 / 2, 0],
        "object_recall": [2 / 3, 1 / 3],
        "yes_no_accuracy": [2 / 3, 1 / 3],
        "accuracy_yes": [1 / 2, 1 / 2],
        "accuracy_no": [1, 0],
        "says_yes": [1 / 3, 2 / 3],
        "choice_accuracy": [1, 0],
        "exact_match": [0, 1],
        "tokens": [(8 + 3 + 2 + 3 + 4 + 4 + 2) / 7, (3 + 1 + 2 + 2 + 2 + 2 + 2) / 7],
        "empty": [0, 1 / 7],
        "unfinished": [0, 0],
    }
    assert values == {name: pytest.approx(pair) for name, pair in expected.items()}
    assert result.outcomes[0][0].marks == [(19, 22)]
    assert result.outcomes[0][0].note == "left out: cat"
    assert result.outcomes[1][6].note == "wrong (no yes or no found)"


def test_models_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "sft", tmp_path / "a" / "ppo" / "checkpoint-40", tmp_path / "b" / "ppo"]
    for run in runs:
        run.mkdir(parents=True)
    assert labels([*map(str, runs), "org/base"]) == ["sft", "ppo/checkpoint-40", "ppo", "org/base"]
    (tmp_path / "b" / "sft").mkdir()
    assert labels([str(runs[0]), str(tmp_path / "b" / "sft")]) == ["a/sft", "b/sft"]


# --- completions -----------------------------------------------------------------------------------------------------


def complete(model: EvaluationModel, rows: Any, **changes: Any) -> list[str]:
    return [generated.text for generated in model.complete(rows, Decoding(**{"max_new_tokens": 12, **changes}))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_completes_as_each_row_alone(temperature: float, adapter: Path, tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path, *ROWS), "prompt")
    model = EvaluationModel.load(str(adapter), dtype="float32")
    together = complete(model, rows, temperature=temperature, batch_size=4)
    assert together == complete(model, rows, temperature=temperature, batch_size=1)
    assert len(set(together)) > 1
    other_draws = complete(model, rows, temperature=temperature, seed=1)
    assert (other_draws == together) is (temperature == 0)


def test_an_adapter_is_loaded_with_its_base_and_not_without(
    adapter: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    rows = load_rows(write_rows(tmp_path, *ROWS), "prompt")
    of_adapter = complete(EvaluationModel.load(str(adapter), dtype="float32"), rows)
    of_base = complete(EvaluationModel.load(str(tiny_llava_dir), dtype="float32"), rows)
    assert of_adapter != of_base
    merged = EvaluationModel.load(str(adapter), dtype="float32")
    merged.model = merged.model.merge_and_unload()
    assert complete(merged, rows) == of_adapter


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm", "internvl"])
def test_every_family_completes_a_batch_as_each_row_alone(family: str, tmp_path: Path) -> None:
    model = EvaluationModel.load(str(tiny_families.FAMILIES[family](tmp_path / family)), dtype="float32")
    rows = load_rows(write_rows(tmp_path, *ROWS), "prompt")
    together = complete(model, rows, batch_size=4)
    assert together == complete(model, rows, batch_size=1)
    assert len(set(together)) > 1


def test_an_end_of_turn_that_only_the_generation_config_names_ends_a_completion(
    tiny_llava_dir: Path, tmp_path: Path
) -> None:
    rows = load_rows(write_rows(tmp_path, *ROWS[:1]), "prompt")
    model = EvaluationModel.load(str(tiny_llava_dir), dtype="float32")
    whole = next(model.complete(rows, GREEDY))
    assert not whole.finished and whole.tokens == 12
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava_dir, folder)
    tokenizer = model.processor.tokenizer
    first = [token for token in tokenizer.get_vocab().values() if tokenizer.decode(token).strip() == whole.text[0]]
    config = json.loads((folder / "generation_config.json").read_text())
    # Sampling that the file asks for is left out.
    config |= {"eos_token_id": [2, *first], "do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    ended = next(EvaluationModel.load(str(folder), dtype="float32").complete(rows, GREEDY))
    assert ended == Generated(whole.text[0], 1, True)


def test_generate_writes_rows_that_are_read_again(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_rows(tmp_path, *ROWS)
    output = tmp_path / "completions.jsonl"
    words = ["generate", "--model", str(adapter), "--data", str(data), "--max_new_tokens", "12"]
    assert cli.main([*words, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    expected = complete(EvaluationModel.load(str(adapter)), load_rows(data, "prompt"))
    assert [line["completion"] for line in lines] == expected
    before = data.read_bytes()
    assert cli.main([*words, "--output", str(data)]) == 1
    assert f"{data} is there already" in capsys.readouterr().err and data.read_bytes() == before
    assert lines[0]["prompt"] == "What is in the picture?"
    assert [line["images"] for line in lines] == [["red.png"], ["blue.png"], [], ["blue.png"]]
    assert lines[3]["captions"] == ["a blue circle"]
    assert load_rows(output, "sft")[3]["completion"] == [
        {"role": "assistant", "content": [{"type": "text", "text": expected[3]}]}
    ]
    capsys.readouterr()
    assert cli.main([*words, "--limit", "2"]) == 0
    assert [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()] == expected[:2]


def test_chat_answers_lines_and_keeps_the_conversation(
    adapter: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    words = ["chat", "--model", str(adapter), "--image", str(tmp_path / "red.png"), "--max_new_tokens", "8"]

    def talk(*lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert cli.main(words) == 0
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    again, _ = talk("What is it?", "What is it?")
    anew, _ = talk("What is it?", "/new", "What is it?", "/quit", "never asked")
    assert again[0] == anew[0] == anew[1] != again[1]
    _, complaint = talk("/image nowhere.png", "/help")
    assert complaint.splitlines() == [
        "error: --image: the image file nowhere.png does not exist.",
        "commands: /image FILE, /new, /quit",
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def test_eval_compares_models_and_writes_a_page(
    adapter: Path, tiny_llava_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    data, output = write_rows(tmp_path, *ROWS), tmp_path / "evaluation"
    words = ["eval", "--model", str(tiny_llava_dir), "--model", str(adapter), "--tasks", str(data)]
    words += ["--output_dir", str(output), "--max_new_tokens", "12"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    first, second = labels([str(tiny_llava_dir), str(adapter)])
    assert f"{second} - {first}" in out and "invented_objects" in out
    found = json.loads((output / "evaluation.json").read_text())
    assert found["models"] == {first: str(tiny_llava_dir), second: str(adapter)}
    measures = found["tasks"]["own.jsonl"]["measures"]
    assert set(measures["unfinished"]["values"][first]) == {"value", "low", "high"}
    answers = [json.loads(line) for line in (output / "answers" / "own.jsonl").read_text().splitlines()]
    expected = complete(EvaluationModel.load(str(adapter)), load_rows(data, "prompt"))
    assert [line["answers"][second]["text"] for line in answers] == expected
    page = (output / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert cli.main(words) == 0  # an earlier evaluation gives way


def test_a_page_shows_text_as_text(tmp_path: Path) -> None:
    from trl_llava.tools.evaluate.files import numbers
    from trl_llava.tools.evaluate.page import write_page

    answer = Outcome("<script>alert(1)</script> a dog", True, "<b>", [(28, 31)], {"m": (1, 2)})
    question = Question("r", "<img src=x onerror=alert(2)>", [Image.new("RGB", (2, 2))], "<i>")
    result = TaskResult("own", ["a<b"], [question], [[answer]], [Measure("m", "x")])
    write_page(tmp_path / "p.html", [result], numbers([result]), {"models": "a<b"}, examples=1)
    page = (tmp_path / "p.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a <mark>dog</mark>" in page
    assert not any(tag in page for tag in ("<script", "<img src=x", "<i>", "a<b"))


def test_the_table_marks_a_difference_that_is_one() -> None:
    near = {"value": 0.1, "low": -0.1, "high": 0.3}
    far = {"value": -0.5, "low": -0.6, "high": -0.4}
    asked = {"by": "", "questions": 2, "reasons": {}}
    measures = {"m": {**asked, "values": {"a": near, "b": near}, "differences": {"b": far}}}
    text = table({"t": {"note": "2 questions", "measures": measures}})
    assert text.splitlines()[2].endswith("-0.500 [-0.600, -0.400] *")


def test_the_table_says_of_how_many_questions_a_number_is_and_why_there_is_none() -> None:
    rows = [row(objects=["dog"]), row(objects=["cat"]), row(answer="yes")]
    answers = [said("A dog.", "Nothing.", "Yes."), said("Nothing.", "Nothing.", "Yes.")]
    found = numbers([OwnTask("own", rows, rows).judge(["one", "two"], answers)])
    measures = found["own"]["measures"]
    asked = {"invented_objects": 2, "object_recall": 2, "yes_no_accuracy": 1, "accuracy_yes": 1, "tokens": 3}
    assert {name: measures[name]["questions"] for name in asked} == asked
    lines = table(found).splitlines()
    reason = "a share of nothing: none of its answers has what is counted"
    assert f"- two has no invented_objects: {reason}" in lines
    assert measures["object_recall"]["reasons"] == {}
    (line,) = [line.split() for line in lines if line.startswith("invented_objects")]
    assert line[1] == "2" and line[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--tasks", "pop"], "there is no task 'pop'"),
        (["--tasks", "pope"], "pope needs lmms-eval, which is not installed: `pip install -e "),
        (["--tasks", "nowhere.jsonl"], "The data set nowhere.jsonl does not exist"),
        (["--model", "MODEL"], "a model is named twice"),
        (["--model", "EMPTY"], "holds no model"),
        (["--output_dir", "DATA"], "holds something else than an evaluation"),
        (["--vocabulary", "nowhere.json"], "cannot read nowhere.json"),
        (["--reward_model", "MODEL"], "has no factual_reward.json"),
        (["--model", "SCORES"], "is a reward model's (it has a score head)"),
        (["--model", "SILENT"], "has no chat template"),
    ],
)
def test_eval_says_in_one_line_what_is_wrong(
    changes: list[str], said: str, tiny_llava_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    scores, silent = tmp_path / "scores", tmp_path / "silent"
    if "SCORES" in changes:
        args = LlavaModelConfig(use_peft=True, lora_r=2)
        model = load_sequence_classifier(str(tiny_llava_dir), args)
        get_peft_model(model, lora_config(args, model, task="SEQ_CLS")).save_pretrained(scores)
    shutil.copytree(tiny_llava_dir, silent, ignore=shutil.ignore_patterns("chat_template.jinja"))
    data = write_rows(tmp_path / "data", *ROWS)
    places = {"MODEL": str(tiny_llava_dir), "EMPTY": str(tmp_path / "empty"), "DATA": str(tmp_path / "data")}
    places |= {"SCORES": str(scores), "SILENT": str(silent)}
    words = ["eval", "--model", str(tiny_llava_dir), "--tasks", str(data), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, *(places.get(word, word) for word in changes)]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [({"objects": "dog"}, "objects is 'dog', expected a list of names"), ({"answer": " "}, "its answer is empty")],
)
def test_a_row_that_cannot_be_judged_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^r: {said}"):
        OwnTask("own", [row(**values)], [row(**values)])


def test_of_more_than_two_models_differences_stand_below() -> None:
    one = {"value": 0.1, "low": 0.1, "high": 0.1}
    asked = {"by": "judge", "questions": 2, "reasons": {}}
    measures = {"m": {**asked, "values": dict.fromkeys("abc", one), "differences": dict.fromkeys("bc", one)}}
    text = table({"t": {"note": "2 questions", "measures": measures}})
    assert [line.split()[0] for line in text.splitlines() if line] == ["t:", "of", "m", "b", "m"]
    assert text.count("m (judge)") == 2 and text.count("*") == 2


def test_answers_are_scored_by_the_reward_model(tiny_llava_dir: Path, tmp_path: Path, capsys: Any) -> None:
    reward = tmp_path / "reward"
    model = load_sequence_classifier(str(tiny_llava_dir), LlavaModelConfig(dtype="float32"), seed=1)
    FactualReward(model, AutoProcessor.from_pretrained(tiny_llava_dir), JudgingPrompt()).save_pretrained(reward)
    words = ["eval", "--model", str(tiny_llava_dir), "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "12"]
    words += ["--reward_model", str(reward), "--tasks"]
    assert cli.main([*words, str(write_rows(tmp_path, *ROWS))]) == 1
    assert "own.jsonl[0]: it has no captions, but the reward needs them" in capsys.readouterr().err
    assert cli.main([*words, str(write_rows(tmp_path, ROWS[3]))]) == 0
    assert "reward (reward)" in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "answers" / "own.jsonl").read_text().splitlines()
    (answer,) = json.loads(line)["answers"].values()
    (score,) = FactualReward.from_pretrained(str(reward))(
        [[{"role": "user", "content": "Describe it."}]],
        [[{"role": "assistant", "content": answer["text"]}]],
        images=[[tiny_models.image("blue")]],
        captions=[["a blue circle"]],
    )
    assert answer["score"] == pytest.approx(score, abs=1e-5)


def test_numbers_go_into_the_card_of_a_run(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run)
    CardFacts("ppo", "org/base", {}, [], 0).save(run)
    write_model_card(run, CardFacts.load(run), [], None)
    words = ["eval", "--model", str(run), "--tasks", str(write_rows(tmp_path, *ROWS)), "--max_new_tokens", "12"]
    words += ["--output_dir", str(tmp_path / "out"), "--update_card"]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["own.jsonl"]["measures"]
    card = ModelCard.load(run / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    tokens = found["tokens"]["values"]["run"]["value"]
    assert results["tokens"].metric_value == pytest.approx(tokens, abs=1e-4)
    assert results["tokens"].dataset_name == "own.jsonl" and card.data.model_name == "run"
    line = f"| own.jsonl | mean length in tokens | {tokens:.3f} |"
    assert line in card.text and card.text.index("## Evaluation") < card.text.index("## Limits")
    once = (run / "README.md").read_text()
    assert cli.main(words) == 0
    assert (run / "README.md").read_text() == once
    # What pushes the run later writes the same.
    write_model_card(run, CardFacts.load(run), [], "me/run")
    pushed = ModelCard.load(run / "README.md")
    assert line in pushed.text and len(pushed.data.eval_results) == len(results)
    capsys.readouterr()
    assert cli.main([*words, "--model", str(adapter)]) == 0  # no run, and so left alone
    assert cli.main([word if word != str(run) else str(adapter) for word in words]) == 1
    assert "is the folder of a run" in capsys.readouterr().err
