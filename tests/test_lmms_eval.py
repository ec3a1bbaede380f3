"""Benchmarks that lmms-eval runs, on small copies in their published layouts. Run by `make test-eval`."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_mmhal
import tiny_models
import tiny_trainers
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from demo_benchmarks import truthful_judge, write_copies
from test_mmhal import JudgeServer
from transformers import AutoProcessor

pytest.importorskip("lmms_eval")

import trl_llava.demo
from trl_llava import cli
from trl_llava.demo.language import DESCRIBE
from trl_llava.demo.world import OBJECTS
from trl_llava.errors import NotFoundError
from trl_llava.tools.evaluate.benchmarks import LmmsTask
from trl_llava.tools.evaluate.lmms_model import Asked, row_of
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated

STRING = Value("string")
served = test_mmhal.served


def save(folder: Path, split: str, features: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    images = [{"image": tiny_models.image("red"), **row} for row in rows]
    table = Dataset.from_list(images, features=Features({"image": Image(), **features}))
    DatasetDict({split: table}).save_to_disk(folder)
    return folder


def pope(folder: Path) -> Path:
    """Nine questions, three of each split, every other one with yes."""
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": f"Is there a dog {i}?",
            "answer": ("yes", "no")[i % 2],
            "image_source": "COCO",
            "category": ("adversarial", "popular", "random")[i // 3],
        }
        for i in range(9)
    ]
    return save(folder / "pope", "test", dict.fromkeys(names, STRING), rows)


def chair(folder: Path) -> Path:
    rows = [{"question_id": str(i), "gt_object": ["dog", "person"] if i else ["cat"]} for i in range(2)]
    return save(folder / "chair", "test", {"question_id": STRING, "gt_object": List(STRING)}, rows)


def mmvp(folder: Path) -> Path:
    rows = [
        {
            "Index": i + 1,
            "Question": "Long or short?",
            "Options": "(a) long (b) short",
            "Correct Answer": f"({'ab'[i % 2]})",
        }
        for i in range(4)
    ]
    columns = {"Index": Value("int64"), **dict.fromkeys(("Question", "Options", "Correct Answer"), STRING)}
    return save(folder / "mmvp", "train", columns, rows)


def hallusion(folder: Path) -> Path:
    names = (
        "category",
        "subcategory",
        "set_id",
        "figure_id",
        "question_id",
        "question",
        "gt_answer",
        "gt_answer_details",
    )
    rows = [
        dict(
            zip(names, ("VD", "chart", "0", str(i // 2), str(i % 2), f"Is it {i}?", str(i % 2), "It is."), strict=True)
        )
        for i in range(4)
    ]
    return save(folder / "hallusion_bench", "image", dict.fromkeys(names, STRING), rows)


@pytest.fixture
def nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of NLTK's data as a sentence about a dog, a cat and a person needs."""
    import nltk

    root = tmp_path / "nltk_data"
    punkt = root / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    tagger = root / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    nouns = dict.fromkeys(("dog", "dogs", "cat", "person", "a", "and", ".", "there", "is"), "NN")
    for name, value in {"weights": {}, "tagdict": nouns, "classes": ["NN"]}.items():
        (tagger / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(value))
    wordnet = root / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    for kind, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        words = ("dog", "cat", "person") if kind == "noun" else ()
        (wordnet / f"index.{kind}").write_text("".join(f"{word} {letter} 1 0 1 0 00001740  \n" for word in words))
        for name in (f"data.{kind}", f"{kind}.exc"):
            (wordnet / name).write_text("")
    for name in ("index.sense", "cntlist.rev"):
        (wordnet / name).write_text("")
    (wordnet / "lexnames").write_text("00\tnoun.Tops\t1\n")
    monkeypatch.setattr(nltk.data, "path", [str(root)])


def said(*texts: str) -> list[Asked]:
    return [Asked(text, Generated(text, 2, True)) for text in texts]


def values(task: LmmsTask, answers: list[Asked]) -> dict[str, float]:
    result = task.judge(["m"], [answers])
    return {measure.name: result.estimates(measure)[0].value for measure in result.measures}


def test_pope_is_scored_as_lmms_eval_does_and_by_the_first_word(tmp_path: Path) -> None:
    task = LmmsTask("pope", pope(tmp_path))
    assert task.questions[0].text == "Is there a dog 0?\nAnswer the question using a single word or phrase."
    # Right: yes no yes no yes no yes no yes. The fifth and sixth are right, but more than one word.
    found = values(task, said("Yes", "no", "no", "yes", "Yes, it is.", "No.", "yes", "no", "maybe"))
    assert found == pytest.approx(
        {
            "pope_accuracy": 4 / 9,
            "pope_precision": 2 / 3,
            "pope_recall": 2 / 3,
            "pope_f1_score": 2 / 3,
            "yes_no_accuracy": 6 / 9,
            "yes_no_f1": 6 / 9,  # 3 of 4 said yes rightly, 3 of 5 that are yes
            "says_yes": 4 / 9,
            "yes_no_f1_adversarial": 2 / 3,
            "yes_no_f1_popular": 2 / 3,
            "yes_no_f1_random": 2 / 3,
        }
    )
    assert LmmsTask("pope", tmp_path / "pope", limit=2, plain=True).questions[1].text == "Is there a dog 1?"


def test_chair_marks_what_is_not_there(tmp_path: Path, nltk_data: None) -> None:
    task = LmmsTask("chair", chair(tmp_path))
    answers = said("There is a dog and a cat.", "Dogs and a person.")
    result = task.judge(["m"], [answers])
    found = {measure.name: result.estimates(measure)[0].value for measure in result.measures}
    # Mentioned are dog, cat; dog, person: the first dog is not there.
    assert found == pytest.approx({"coco_cap_chair_i": 25.0, "coco_cap_chair_s": 50.0, "coco_cap_recall": 100.0})
    assert result.outcomes[0][0].note == "invented: dog"
    plain = LmmsTask("chair", tmp_path / "chair", plain=True)  # nothing stands around its question
    assert plain.questions[0].text == task.questions[0].text == "Please describe this image in detail."
    silent = task.judge(["m"], [said("", "")])
    assert str(silent.estimates(silent.measures[0])[0].value) == "nan"  # nothing was mentioned


def test_amber_counts_what_is_not_there(tmp_path: Path, nltk_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "files" / "metadata"
    metadata.mkdir(parents=True)
    (metadata / "relation.json").write_text(json.dumps({"dog": ["puppy"], "cat": [], "person": []}))
    (metadata / "annotations.json").write_text("[]")
    (metadata / "safe_words.txt").write_text("")
    counted = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    zeros = "".join(f"{name}_{what} = 0\n" for name in counted for what in ("score", "num"))
    (metadata / "metrics.txt").write_text(zeros)
    monkeypatch.setenv("AMBER_BASE_DIR", str(tmp_path / "files"))
    rows = [{"question_id": i, "truth": ["dog"], "hallu": ["person"]} for i in range(2)]
    columns = {"question_id": Value("int64"), "truth": List(STRING), "hallu": List(STRING)}
    task = LmmsTask("amber_g", save(tmp_path / "amber_g", "train", columns, rows))
    # In the place of a model of spaCy, which cannot be had here: no two words are alike.
    alike = SimpleNamespace(similarity=lambda other: 0.0)
    task.task.config.process_results.__globals__["_NLP"] = lambda word: alike
    result = task.judge(["m"], [said("There is a dog and a cat.", "There is a dog.")])
    found = {measure.name: result.estimates(measure)[0].value for measure in result.measures}
    assert [measure.better for measure in result.measures] == ["lower", "higher", "lower", "lower"]
    # Of dog, cat and dog the cat is not there, in one of two answers; each names the one thing that is there.
    expected = {"amber_chair": 100 / 3, "amber_cover": 100.0, "amber_hal": 50.0, "amber_cog": 0.0}
    assert found == pytest.approx(expected)
    assert [outcome.wrong for outcome in result.outcomes[0]] == [True, False]


def test_groups_of_questions_are_right_together(tmp_path: Path) -> None:
    found = values(LmmsTask("mmvp", mmvp(tmp_path)), said("A", "B", "A", "A"))
    assert found == pytest.approx({"mmvp_accuracy": 0.75, "mmvp_pair_accuracy": 0.5})
    found = values(LmmsTask("hallusion_bench", hallusion(tmp_path)), said("No", "Yes", "No", "No"))
    # Figures hold questions 0-1 and 2-3; each question is asked of both figures.
    assert found == pytest.approx({"aAcc": 0.75, "qAcc": 0.5, "fAcc": 0.5})


def test_answers_are_those_of_the_model_with_its_adapter(tmp_path: Path, tiny_llava_dir: Path) -> None:
    adapter = tiny_trainers.make_adapter(tiny_llava_dir, tmp_path / "adapter")
    AutoProcessor.from_pretrained(tiny_llava_dir).save_pretrained(adapter)
    model = EvaluationModel.load(str(adapter))
    task = LmmsTask("pope", pope(tmp_path))
    asked = task.ask(model, Decoding(batch_size=4))
    rows = [row_of(question.text, [tiny_models.image("red")], "r") for question in task.questions]
    expected = [generated.text for generated in model.complete(rows, Decoding(max_new_tokens=128))]
    assert [one.text for one in asked] == [text.partition("\n\n")[0] for text in expected]
    assert len({one.text for one in asked}) > 1


def test_an_error_ends_the_run(tmp_path: Path, tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EvaluationModel.load(str(tiny_llava_dir))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        LmmsTask("pope", pope(tmp_path)).ask(model, Decoding())


def test_eval_runs_benchmarks(tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    pope(tmp_path), mmvp(tmp_path)
    words = ["eval", "--model", str(tiny_llava_dir), "--tasks", "pope,mmvp", "--data", str(tmp_path), "--limit", "4"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]) == 0
    out = capsys.readouterr().out
    assert "pope_f1_score" in out and "mmvp_pair_accuracy" in out and "pope_yes_ratio" not in out
    assert (tmp_path / "out" / "evaluation.html").read_text().count("<img src=") == 8


@pytest.mark.parametrize("data", [True, False])
def test_data_that_is_not_there(data: bool, tmp_path: Path, tiny_llava_dir: Path, capsys: Any) -> None:
    words = ["eval", "--model", str(tiny_llava_dir), "--tasks", "pope", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, *(("--data", str(tmp_path)) if data else ())]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: pope: its data cannot be loaded ") and error.count("\n") == 1


def test_scoring_without_nltk_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> None:  # as NLTK does; it keeps what an earlier test has made it load
        raise LookupError("\n****\n  Resource punkt_tab not found.\n")

    monkeypatch.setattr("nltk.word_tokenize", fail)
    with pytest.raises(NotFoundError, match="chair: lmms-eval cannot score an answer, because data is not"):
        LmmsTask("chair", chair(tmp_path)).judge(["m"], [said("A dog.", "A cat.")])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo: the one that `TRL_LLAVA_DEMO` names, or one of its own, which takes some minutes."""
    folder = Path(os.environ.get("TRL_LLAVA_DEMO") or tmp_path_factory.mktemp("demo") / "run")
    if not folder.exists():
        assert cli.main(["demo", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_the_benchmarks_show_the_fall_that_the_demo_shows(
    demo: Path, served: JudgeServer, nltk_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    load = LmmsTask._load

    def of_the_drawn_world(task: LmmsTask) -> Any:
        """CHAIR knows the objects of COCO, and asks in words that the demo's model has never read."""
        found = load(task)
        if task.name == "chair":
            known = found.config.process_results.__globals__
            names = {name: name for name in OBJECTS}
            known |= {"MSCOCO_OBJECTS": OBJECTS, "DOUBLE_WORD_DICT": names, "INVERSE_SYNONYM_DICT": names}
            found.config.doc_to_text = lambda doc: DESCRIBE
        return found

    monkeypatch.setattr(LmmsTask, "_load", of_the_drawn_world)
    served.reply = truthful_judge
    copies = write_copies(demo / "data", tmp_path / "copies")
    words = ["eval", "--model", str(demo / "sft"), "--model", str(demo / "ppo"), "--tasks", "pope,chair,mmhal"]
    words += ["--base", str(Path(trl_llava.demo.__file__).parent / "base"), "--data", str(copies), "--plain_questions"]
    words += ["--judge_base_url", served.url, "--judge_model", "knows-the-world", "--max_new_tokens", "32"]
    assert cli.main([*words, "--batch_size", "64", "--output_dir", str(tmp_path / "out")]) == 0
    with capsys.disabled():
        print(capsys.readouterr().out)
    tasks = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    falls = {"chair": ("coco_cap_chair_i", "coco_cap_chair_s"), "mmhal": ("hallucination_rate",)}
    rises = {"pope": ("yes_no_accuracy", "yes_no_f1"), "mmhal": ("mmhal_score",)}
    for sign, expected in ((-1, falls), (1, rises)):
        for task, names in expected.items():
            for name in names:
                change = tasks[task]["measures"][name]["differences"]["ppo"]
                assert sign * change["low"] > 0 and sign * change["high"] > 0, (task, name, change)
