"""`benchmarks.easy_vqa`: its rows and measures on literal questions, and all of it on a stand-in for the package."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks import easy_vqa, easy_vqa_data
from benchmarks.easy_vqa_base import EasyLessons
from benchmarks.easy_vqa_data import COLOURS, SHAPES, Part, Question, Sizes

QUESTIONS = [
    Question("what is the red shape?", "circle", "train/images/0.png"),
    Question("is there a red shape?", "yes", "train/images/0.png"),
    Question("is no circle present?", "no", "train/images/0.png"),
    Question("is there not a blue shape?", "yes", "train/images/1.png"),
    Question("does the image contain a circle?", "no", "train/images/1.png"),
    Question("what color is the triangle?", "teal", "train/images/1.png"),
    Question("what shape is present?", "circle", "train/images/2.png"),
]
PACKAGE = """
import json
from pathlib import Path
DATA = Path(__file__).parent / "data"
def questions(part):
    return [list(column) for column in zip(*json.loads((DATA / part / "questions.json").read_text()))]
def paths(part):
    return {int(path.stem): str(path) for path in (DATA / part / "images").glob("*.png")}
def get_train_questions(): return questions("train")
def get_test_questions(): return questions("test")
def get_train_image_paths(): return paths("train")
def get_test_image_paths(): return paths("test")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `easy_vqa` in the published layout, with pictures and questions of its own."""
    rng, folder = random.Random(0), tmp_path / "site" / "easy_vqa"
    for part, count in (("train", 160), ("test", 40)):
        (folder / "data" / part / "images").mkdir(parents=True)
        rows = []
        for index in range(count):
            shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).regular_polygon((32, 32, 12), 3 + SHAPES.index(shape), fill=colour)
            image.save(folder / "data" / part / "images" / f"{index}.png")
            asked = [(f"what is the {colour} shape?", shape), ("what color is the shape?", colour)]
            asked += [(f"is there a {colour} shape?", "yes"), (f"is there not a {shape}?", "no")]
            for other in rng.sample([name for name in COLOURS if name != colour], 3):
                asked += [(f"is there a {other} shape?", "no"), (f"is no {other} shape present?", "yes")]
            rows += [[*pair, index] for pair in asked]
        (folder / "data" / part / "questions.json").write_text(json.dumps(rows))
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)


def test_a_question_is_of_a_kind_and_asks_for_what_is_there_or_not() -> None:
    assert [q.kind for q in QUESTIONS] == ["shape", "yes_no", "yes_no", "yes_no", "yes_no", "colour", "shape"]
    assert [q.present for q in QUESTIONS if q.kind == "yes_no"] == [True, True, False, False]
    assert QUESTIONS[4].claims("yes") and QUESTIONS[3].claims("no")


def test_a_caption_is_what_the_questions_leave() -> None:
    assert easy_vqa_data.captions_of(QUESTIONS) == {
        "train/images/0.png": "a red circle",
        "train/images/1.png": "a teal triangle",
    }
    ruled_out = [Question(f"is a {c} shape present?", "no", "x") for c in COLOURS if c != "gray"]
    ruled_out.append(Question("is there not a rectangle in the image?", "no", "x"))
    assert easy_vqa_data.captions_of(ruled_out) == {"x": "a gray rectangle"}


def test_measures_are_shares_of_answers() -> None:
    answers = ["circle", "yes", "yes", "no", "no", "red", "yes"]
    assert easy_vqa_data.measure(QUESTIONS, answers) == {
        "shape": 0.5,
        "colour": 0.0,
        "yes/no": 0.5,
        "said yes": 0.5,
        "right where yes": 0.5,
        "right where no": 0.5,
        "invented": 0.5,  # "no" to "is there not a blue shape?", of two that ask for what is not there
        "denied": 0.5,  # "yes" to "is no circle present?"
    }
    nothing = easy_vqa_data.measure(QUESTIONS, ["red red"] * 7)
    assert set(nothing.values()) == {0.0}


def test_sft_asks_for_what_is_there_and_pairs_differ_in_truth() -> None:
    def asked(count: int, text: str, answer: str) -> list[Question]:
        return [Question(text, answer, str(index)) for index in range(count)]

    questions = [
        *asked(25, "what shape is present?", "circle"),
        *asked(50, "is there a red shape?", "yes"),
        *asked(25, "is there a teal shape?", "no"),
    ]
    rng = random.Random(0)
    picked = easy_vqa_data.over_claiming(questions, rng, Sizes(sft=40, absent=0.1))
    assert [sum(q.text == text for q in picked) for text in dict.fromkeys(q.text for q in questions)] == [10, 27, 3]
    part = Part(Path(), QUESTIONS, {"train/images/0.png": "a red circle", "train/images/1.png": "a teal triangle"})
    pairs = [easy_vqa_data.preference_row(q, part, rng) for q in QUESTIONS[:2]]
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["circle", "yes"]
    assert pairs[0]["rejected"][0]["content"] in {"rectangle", "triangle"}
    assert pairs[1] == {
        "images": ["train/images/0.png"],
        "prompt": [{"role": "user", "content": "is there a red shape?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "captions": ["a red circle"],
    }


def test_the_base_has_a_word_for_all_it_reads(package: None) -> None:
    part = easy_vqa_data.load("train")
    lessons = EasyLessons(part, seed=0)
    assert (len(part.questions), len(part.known), len(lessons.scenes)) == (1600, 1600, 160)
    for kind in ("describe", "yes_no", "choice"):
        batch, _ = lessons.batch((kind,), 8, from_image=False)
        assert lessons.tokenizer.unk_token_id not in batch["input_ids"]
        first = lessons.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        assert first.startswith("USER: - a ") and " ASSISTANT: " in first
    judging = lessons.tokenizer("USER: Is it true? \n- a red circle\n ASSISTANT: True:")["input_ids"]
    assert lessons.tokenizer.unk_token_id not in judging


def test_table_has_the_base_and_the_spread_over_the_seeds() -> None:
    rows = {seed: {"SFT": {"shape": 0.25 + seed}, "PPO": {"shape": 0.5, "accuracy": 0.75}} for seed in (0, 1)}
    assert easy_vqa.table({"shape": 1.0}, rows).splitlines() == [
        "| | reward-model accuracy | shape |",
        "|---|---|---|",
        "| base | | 1.000 |",
        "| SFT |  | 0.750 ± 0.707 |",
        "| PPO | 0.750 ± 0.000 | 0.500 ± 0.000 |",
    ]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SystemExit, match="pip install easy-vqa"):
        easy_vqa.main(["--output_dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_quick_runs_to_its_table(package: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    words = ["--quick", "--seeds", "0", "--output_dir", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
    easy_vqa.main(words)
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["seeds"]["0"]) == ["SFT", "PPO, without captions", "PPO, with captions"]
    assert found["questions"] == 300 and found["base"].keys() < found["seeds"]["0"]["PPO, with captions"].keys()
    assert "| PPO, with captions | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        easy_vqa.main(words)  # the folder is not empty
