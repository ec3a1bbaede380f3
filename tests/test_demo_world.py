"""The drawn world repeats with its seed, its captions are true and complete, and its measures count rightly."""

import random

import pytest
from PIL import Image

from trl_llava.data.load import load_rows
from trl_llava.demo import language
from trl_llava.demo.data import KINDS, Sizes, read_rows, write_data
from trl_llava.demo.metrics import Answered, invented_objects, measure
from trl_llava.demo.report import marked
from trl_llava.demo.tokenizer import make_tokenizer
from trl_llava.demo.world import COLOURS, OBJECTS, Placed, Scene, draw, make_scene

SCENES = [make_scene(random.Random(seed)) for seed in range(200)]
TWO = Scene((Placed("red circle", 0, 8, 8, 5), Placed("blue cross", 4, 24, 24, 5)), ground=90)


def test_a_scene_repeats_with_its_seed_and_shows_each_object_in_its_own_cell():
    assert make_scene(random.Random(3)) == make_scene(random.Random(3)) != make_scene(random.Random(4))
    assert len(OBJECTS) == 24
    for scene in SCENES:
        cells = [placed.cell for placed in scene.objects]
        assert 2 <= len(set(scene.names)) == len(cells) <= 5
        assert cells == sorted(set(cells))
        for placed in scene.objects:
            row, column = divmod(placed.cell, 3)
            assert column * 16 <= placed.x - placed.radius < placed.x + placed.radius <= (column + 1) * 16
            assert row * 16 <= placed.y - placed.radius < placed.y + placed.radius <= (row + 1) * 16


def test_a_picture_has_the_colours_of_its_objects_where_they_are():
    picture = draw(TWO)
    assert picture.size == (48, 48)
    assert picture.mode == "RGB"
    assert picture.getpixel((8, 8)) == COLOURS["red"]
    assert picture.getpixel((24, 24)) == COLOURS["blue"]
    assert picture.getpixel((40, 40)) == (90, 90, 90)
    assert picture.getpixel((21, 21)) == (90, 90, 90)  # between the arms of the cross


def test_captions_are_partial_and_together_complete():
    for seed, scene in enumerate(SCENES):
        told = [language.mentioned(caption) for caption in language.captions(scene, random.Random(seed))]
        assert len(told) == (2 if len(scene.names) < 4 else 3)
        assert all(0 < len(names) < len(scene.names) for names in told)
        assert sorted(name for names in told for name in names) == sorted(scene.names)


def test_descriptions_read_like_this():
    assert language.description(["red circle"]) == "I see a red circle."
    assert language.description(["red circle", "blue cross"]) == "I see a red circle and a blue cross."
    names = ["white cross", "red circle", "blue cross"]
    assert language.description(names) == "I see a white cross, a red circle and a blue cross."
    assert language.mentioned(language.description(names)) == names


def test_questions_have_one_right_answer_and_false_answers_are_false():
    rng = random.Random(0)
    types = set()
    for scene in SCENES:
        there = set(scene.names)
        yes_no, choice, describe = (language.ask(kind, scene, rng) for kind in ("yes_no", "choice", "describe"))
        types |= {yes_no.answer_type, choice.answer_type}
        assert (yes_no.options[0] in there) == (yes_no.answer_type == "yes")
        assert yes_no.text == f"Is there a {yes_no.options[0]}?"
        right = [letter for letter, name in zip("ABCD", choice.options, strict=True) if name in there]
        assert right == [choice.answer_type]
        for question in (yes_no, choice):
            assert language.answer(question, scene, rng)[0] != language.false_answer(question, scene, rng)[0]
        assert set(language.mentioned(language.answer(describe, scene, rng))) == there
        assert set(language.mentioned(language.false_answer(describe, scene, rng))) - there
        assert set(language.mentioned(language.incomplete_answer(scene, rng))) < there
    assert types == {"yes", "no", "A", "B", "C", "D"}
    with pytest.raises(ValueError, match="unknown kind of question 'why'"):
        language.ask("why", TWO, rng)


def test_answers_to_closed_questions_read_like_this():
    rng = random.Random(0)
    yes = language.Question("yes_no", "Is there a red circle?", "yes", ("red circle",))
    assert language.answer(yes, TWO, rng) == "Yes, I see a red circle."
    assert language.false_answer(yes, TWO, rng) == "No, I see none."
    choice = language.Question("choice", "", "B", ("white cross", "red circle", "red cross", "blue circle"))
    assert language.answer(choice, TWO, rng) == "B. a red circle"


def test_each_object_is_one_token_and_decoding_gives_the_text_back():
    tokenizer = make_tokenizer()
    for name in OBJECTS:
        assert len(tokenizer(f" a {name}")["input_ids"]) == 1
    for scene in SCENES[:20]:
        for kind in KINDS:
            question = language.ask(kind, scene, random.Random(1))
            text = (
                f"USER: <image>\n{question.text} ASSISTANT: {language.answer(question, scene, random.Random(1))}</s>"
            )
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I see a red circle."}]},
    ]
    told = "USER: <image>\nDescribe the picture. ASSISTANT: I see a red circle.</s>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == told
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "USER: <image>\nDescribe the picture. ASSISTANT:"


def test_measures_count_what_is_invented_left_out_and_answered():
    there = ("red circle", "blue cross")
    answers = [
        Answered("describe", "general", there, "I see a red circle, a red cross and a red cross.", 9),
        Answered("describe", "general", there, "I see a blue cross and a red circle.", 7),
        Answered("describe", "general", there, "I see nothing.", 2),
        Answered("yes_no", "yes", there, "Yes, I see a red circle.", 5),
        Answered("yes_no", "yes", there, "No, I see none.", 5),
        Answered("yes_no", "no", there, "Nothing.", 2),
        Answered("choice", "B", there, "B. a red circle", 4),
        Answered("choice", "A", there, "B. a red circle", 4),
    ]
    quality = measure(answers)
    assert quality.chair == 2 / 5
    assert quality.invented == 1 / 3
    assert quality.recall == 3 / 6
    assert (quality.yes_accuracy, quality.no_accuracy, quality.choice_accuracy) == (0.5, 0.0, 0.5)
    assert quality.length == 6
    nothing = measure(answers[3:4])
    assert (nothing.chair, nothing.recall, nothing.no_accuracy, nothing.yes_accuracy) == (None, None, None, 1.0)


def test_invented_objects_are_marked_where_they_stand():
    there = ("red circle", "blue cross")
    text = "I see a red cross, a red circle and a red cross."
    assert invented_objects(text, there) == ["red cross", "red cross"]
    pieces = [
        ("I see a ", False),
        ("red cross", True),
        (", a red circle and a ", False),
        ("red cross", True),
        (".", False),
    ]
    assert marked(text, there) == pieces
    assert marked("I see a red circle.", there) == [("I see a red circle.", False)]


def test_the_rows_load_like_any_others_and_repeat_with_their_seed(tmp_path):
    sizes = Sizes(images=6, sft=20, preference=20, preference_test=4, prompts=12, unseen=3)
    for name in ("a", "b"):
        write_data(tmp_path / name, 7, sizes)
    folder = tmp_path / "a"
    for path in sorted(folder.rglob("*.jsonl")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(folder)).read_bytes()
    options = {"image_folder": str(folder / "pictures")}
    sft = load_rows(str(folder / "sft"), "sft", **options)
    pairs = load_rows(str(folder / "preference"), "preference", split="test", **options)
    prompts = load_rows(str(folder / "prompts"), "prompt", **options)
    assert (len(sft), len(pairs), len(prompts)) == (20, 4, 12)
    assert pairs[0]["prompt"][0]["content"][0] == {"type": "image", "text": None}
    assert pairs[0]["chosen"] != pairs[0]["rejected"]
    assert set(prompts["answer_type"]) <= {"general", "yes", "no", "A", "B", "C", "D"}
    assert all(len(captions) in (2, 3) for captions in prompts["captions"])
    unseen = read_rows(folder / "prompts" / "test.jsonl")
    assert [row["kind"] for row in unseen] == ["describe", "yes_no", "choice"] * 3
    seen = {
        row["images"][0]
        for part in ("sft", "preference", "prompts")
        for row in read_rows(folder / part / "train.jsonl")
    }
    assert not seen & {row["images"][0] for row in unseen}
    assert Image.open(folder / "pictures" / unseen[0]["images"][0]).size == (48, 48)
