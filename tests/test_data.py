"""Every published format becomes rows of one contract, and every row that cannot be used says why."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from trl import DatasetMixtureConfig

from trl_llava.data.contract import RowError, normalise_messages, place_images, stage_features
from trl_llava.data.load import load_rows, rows_from
from trl_llava.errors import NotFoundError

PICTURE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


def said(role, value):
    return {"role": role, "content": value}


def message(role, *parts):
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def preference(**changes):
    return {
        "image": "a.png",
        "conversations": turns("<image>\nWhat?", "placeholder"),
        "output_1": {"from": "gpt", "value": "A cat."},
        "output_2": {"from": "gpt", "value": "A dog."},
        "preference": 2,
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 3), colour).save(tmp_path / name)
    return tmp_path


def written(folder, records, name="train.json"):
    lines = name.endswith("l")
    content = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    (folder / name).write_text(content)
    return folder / name


# --- formats ---------------------------------------------------------------------------------------------------------


def test_llava_sft(folder):
    records = [
        {"id": 1, "image": "a.png", "conversations": turns("Look at <image> this.  Two  spaces. ", " Ho\n")},
        {"id": "x", "conversations": turns("Why?", "So.", "And </s>?", "Yes <image>.")},
        {"image": "a.png", "conversations": [{"from": "gpt", "value": "Hello."}, *turns("<image>", "Beach.")]},
    ]
    rows = load_rows(written(folder, records), "sft")
    assert rows.features == stage_features("sft")
    assert rows["row_name"][:] == ["train.json[0]", "train.json[1]", "train.json[2]"]
    assert rows[0]["images"] == [{"bytes": None, "path": str(folder / "a.png")}]
    assert rows[0]["prompt"] == [message("user", "Look at ", PICTURE, " this.  Two  spaces.")]
    assert rows[0]["completion"] == [message("assistant", " Ho\n")]
    assert rows[1]["images"] == []
    assert rows[1]["prompt"] == [message("user", "Why?"), message("assistant", "So."), message("user", "And </s>?")]
    assert rows[1]["completion"] == [message("assistant", "Yes <image>.")]
    assert rows[2]["prompt"] == [message("user", PICTURE)]


def test_llava_preferences(folder):
    longer = turns("What?\n<image>", "A bus.", "Where?", "x")
    path = written(folder, [preference(), preference(conversations=longer, preference=1)])
    rows = load_rows(path, "preference")
    assert rows.features == stage_features("preference")
    assert rows[0]["prompt"] == [message("user", PICTURE, "What?")]
    assert rows[0]["chosen"] == [message("assistant", "A dog.")]
    assert rows[0]["rejected"] == [message("assistant", "A cat.")]
    assert [turn["role"] for turn in rows[1]["prompt"]] == ["user", "assistant", "user"]
    assert rows[1]["chosen"] == [message("assistant", "A cat.")]


def test_llava_prompts_with_optional_keys_in_some_rows(folder):
    records = [
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "x")},
        {"image": "a.png", "conversations": turns("What?\n<image>", "x", "Where?", "y"), "caption_type": 2},
        {"conversations": turns("Cat?", "No"), "caption_type": 6, "length_bonus": -0.5, "id": 7},
        {"conversations": turns("Cat?"), "answer_type": "yes", "length_multiplier": 0, "id": "x", "n": 3},
    ]
    rows = load_rows(written(folder, records), "prompt")
    assert rows["answer_type"][:] == ["general", "A", "no", "yes"]
    assert rows["length_multiplier"][:] == [1.0, 1.0, -0.5, 0.0]
    assert rows[1]["prompt"] == [message("user", "What?", PICTURE)]
    assert rows["captions"][:] == [[], [], [], []]
    # carried for custom reward functions; a column of mixed types becomes text
    assert rows["id"][:] == [None, None, "7", "x"]
    assert rows["n"][:] == [None, None, None, 3]


@pytest.mark.parametrize("content", ["What?", [text("What?")], [{"type": "image"}, text("What?")]])
@pytest.mark.parametrize("column", ["image", "images"])
def test_trl_sft(content, column, red_image):
    """String content and parts; the images column holds one picture or a list."""
    value = red_image if column == "image" else [red_image]
    answer = [text("A square.")] if isinstance(content, list) else "A square."
    whole = {column: value, "messages": [said("user", content), said("assistant", answer)]}
    split = {column: value, "prompt": whole["messages"][:1], "completion": whole["messages"][1:]}
    for record in (whole, split):
        row = rows_from(Dataset.from_list([record]), "sft", name="mine")[0]
        assert row["row_name"] == "mine[0]"
        assert row["prompt"] == [message("user", PICTURE, "What?")]
        assert row["completion"] == [message("assistant", "A square.")]
        assert row["images"][0]["bytes"].startswith(b"\x89PNG")


def test_trl_multi_turn_completion_is_split_before_its_last_answer():
    record = {
        "prompt": [said("user", "Hi")],
        "completion": [said("assistant", "Ho"), said("user", "Hm?"), said("assistant", "Ha")],
    }
    row = rows_from(Dataset.from_list([record]), "sft")[0]
    assert row["prompt"] == [message("user", "Hi"), message("assistant", "Ho"), message("user", "Hm?")]
    assert row["completion"] == [message("assistant", "Ha")]


def test_trl_preferences_with_explicit_and_implicit_prompt(red_image):
    prompt, chosen, rejected = [said("user", "What?")], [said("assistant", "A")], [said("assistant", "B")]
    explicit = {"images": [red_image], "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 2}
    implicit = {"images": [red_image], "chosen": prompt + chosen, "rejected": prompt + rejected, "margin": 2}
    for record in (explicit, implicit):
        row = rows_from(Dataset.from_list([record]), "preference")[0]
        assert row["prompt"] == [message("user", PICTURE, "What?")]
        assert (row["chosen"], row["rejected"]) == ([message("assistant", "A")], [message("assistant", "B")])
        assert row["margin"] == 2.0


def test_trl_prompts_keep_their_other_columns():
    record = {"prompt": [said("user", "What?")], "captions": ["a cat"], "solution": "cat", "level": 3}
    rows = rows_from(Dataset.from_list([record]), "prompt")
    assert rows[0]["captions"] == ["a cat"] and rows[0]["solution"] == "cat" and rows[0]["level"] == 3
    with_answer = {"messages": [said("user", "What?"), said("assistant", "That.")]}
    assert rows_from(Dataset.from_list([with_answer]), "prompt")[0]["prompt"] == [message("user", "What?")]


def test_normalised_rows_stay_as_they_are(folder):
    rows = load_rows(written(folder, [preference()] * 3), "preference")
    assert rows_from(rows, "preference", name="other") is rows
    prompts = rows_from(rows, "prompt", name="other")  # for another stage they are made anew, names kept
    assert prompts["row_name"][:] == rows["row_name"][:] and prompts[0]["prompt"] == rows[0]["prompt"]


def test_nothing_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    rows = load_rows(written(folder, [preference()] * 3), "preference")
    assert rows[0]["images"] and rows[:2]["images"]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_system_column_becomes_the_system_message(folder):
    rows = load_rows(written(folder, [{**SFT, "system": "Be brief."}, {**SFT, "system": ""}]), "sft")
    assert rows[0]["prompt"] == [message("system", "Be brief."), message("user", "Hi")]
    assert rows[1]["prompt"] == [message("user", "Hi")]


def test_an_empty_rejected_completion_is_a_lesson():
    assert rows_from(Dataset.from_list([PAIR]), "preference")[0]["rejected"] == [message("assistant", "")]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_margin_is_in_every_row_or_in_none(folder, in_memory):
    def load(*margins, **options):
        records = [{**PAIR, "margin": margin} for margin in margins]
        if in_memory:
            return rows_from(Dataset.from_list(records), "preference", name="train.json", **options)
        return load_rows(written(folder, records), "preference", **options)

    assert load(0.5, 2)["margin"][:] == [0.5, 2.0]
    assert "margin" not in load(None, None).column_names
    with pytest.raises(RowError, match=r"train\.json\[1\]: it has no margin, but other rows have one"):
        load(0.5, None)
    assert load(0.5, None, on_bad_row="skip")["row_name"][:] == ["train.json[0]"]


def test_normalised_rows_with_a_gap_in_their_margins_are_refused():
    rows = rows_from(Dataset.from_list([{**PAIR, "margin": 1.0}] * 2), "preference")
    gap = rows.remove_columns("margin").add_column("margin", [1.0, None])
    with pytest.raises(RowError, match=r"dataset\[1\]: it has no margin"):
        rows_from(gap, "preference")


def test_json_lines_whatever_the_file_is_called(folder):
    records = [preference(), preference(preference=1)]
    for name in ("train.jsonl", "lines.json"):
        path = folder / name
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
        rows = load_rows(path, "preference")
        assert rows["row_name"][:] == [f"{name}[0]", f"{name}[1]"]


def test_parquet_with_embedded_images(folder, red_image):
    features = Features(
        {"images": List(ImageFeature()), "prompt": List({"role": Value("string"), "content": Value("string")})}
    )
    Dataset.from_list([{"images": [red_image], "prompt": [said("user", "What?")]}], features=features).to_parquet(
        folder / "a.parquet"
    )
    row = load_rows(folder / "a.parquet", "prompt")[0]
    assert row["row_name"] == "a.parquet[0]"
    assert row["images"][0]["bytes"].startswith(b"\x89PNG")


def test_folder_by_split(folder):
    written(folder, [preference()] * 3)
    written(folder, [preference()] * 2, "test.jsonl")
    assert len(load_rows(folder, "preference")) == 3
    assert load_rows(folder, "preference", split="test")["row_name"][:] == ["test.jsonl[0]", "test.jsonl[1]"]
    with pytest.raises(ValueError, match=r"expected one dev\.json"):
        load_rows(folder, "preference", split="dev")


def test_split_slices_keep_their_row_names(folder):
    path = written(folder, [preference()] * 5)
    assert load_rows(path, "preference", split="train[3:]")["row_name"][:] == ["train.json[3]", "train.json[4]"]
    with pytest.raises(
        ValueError, match=r"train\.json is a file, which has no configuration 'small': leave `dataset_c"
    ):
        load_rows(folder / "train.json", "sft", name="small")
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_rows(path, "preference", split="test")


def test_image_folder_with_metadata(folder):
    metadata = [{"file_name": "a.png", "prompt": [said("user", "What?")]}]
    metadata += [{"file_names": ["a.png", "b.png"], "prompt": [said("user", "Same?")]}]
    written(folder, metadata, "metadata.jsonl")
    rows = load_rows(folder, "prompt")
    assert [len(row["images"]) for row in rows] == [1, 2]
    assert rows[1]["images"][1]["path"] == str(folder / "b.png")


def test_saved_datasets(folder):
    rows = load_rows(written(folder, [preference()] * 3), "preference")
    rows.save_to_disk(folder / "one")
    DatasetDict(train=rows, test=rows.select([2])).save_to_disk(folder / "two")
    saved = load_rows(folder / "one", "preference")
    assert saved.remove_columns("images")[:] == rows.remove_columns("images")[:]
    assert saved[0]["images"][0]["bytes"] == (folder / "a.png").read_bytes()
    assert load_rows(folder / "two", "preference", split="test")["row_name"][:] == ["train.json[2]"]
    with pytest.raises(ValueError, match=r"no split 'dev', only \['test', 'train'\]"):
        load_rows(folder / "two", "preference", split="dev")


def test_an_entry_of_a_mixture(folder):
    path = written(folder, [preference(odd=1), preference()])
    columns = [name for name in preference() if name != "image"]
    entry = DatasetMixtureConfig(datasets=[{"path": str(path), "split": "train[:1]", "columns": columns}]).datasets[0]
    with pytest.raises(RowError, match="have 1 <image>, but it has 0 images"):
        load_rows(entry, "preference")
    entry.columns = None
    assert len(load_rows(entry, "preference")) == 1


def test_missing_sources(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        load_rows(folder / "nowhere.json", "sft")
    (folder / "a.csv").touch()
    with pytest.raises(ValueError, match=r"expected \.json, \.jsonl or \.parquet"):
        load_rows(folder / "a.csv", "sft")
    (folder / "bad.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        load_rows(folder / "bad.json", "sft")


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_joined_by_image_name(folder):
    captions = {"a.png": ["a cat"], "b.png": ["a dog"], "aok_a.png": ["A is right", "because"], "x/c.png": ["c"]}
    file = written(folder, captions, "captions.json")
    (folder / "x").mkdir()
    for name in ("b.png", "c.png"):
        Image.new("RGB", (2, 2)).save(folder / "x" / name)
    asked = turns("<image>\nWhat?")
    records = [
        {"image": "a.png", "conversations": asked},
        {"image": "a.png", "conversations": asked, "caption_type": 2},
        {"image": "x/b.png", "conversations": asked},
        {"image": "x/c.png", "conversations": asked},
        {"conversations": turns("What?")},
    ]
    rows = load_rows(written(folder, records), "prompt", captions_file=file)
    assert rows["captions"][:] == [["a cat"], ["A is right", "because"], ["a dog"], ["c"], []]
    with pytest.raises(RowError, match=r"train.json\[4\]: it has no captions"):
        load_rows(folder / "train.json", "prompt", captions_file=file, require_captions=True)


@pytest.mark.parametrize(
    ("captions", "problem"),
    [({}, r"no entry for 'a.png'"), ({"a.png": []}, "an empty list for 'a.png'")],
)
def test_missing_captions_name_the_row(folder, captions, problem):
    file = written(folder, captions, "captions.json")
    with pytest.raises(RowError, match=rf"train.json\[0\]: .*captions.json has {problem}"):
        load_rows(written(folder, [preference()]), "preference", captions_file=file)


def test_a_captions_file_that_is_not_there_is_named(folder):
    with pytest.raises(NotFoundError, match=r"captions_file: cannot read .*none\.json \(No such file or directory\)"):
        load_rows(written(folder, [preference()]), "preference", captions_file=str(folder / "none.json"))


@pytest.mark.parametrize("content", [["a"], {"a.png": "a cat"}, {"a.png": [1]}])
def test_a_captions_file_of_another_shape_is_an_error(folder, content):
    file = written(folder, content, "captions.json")
    with pytest.raises(ValueError, match=r"captions_file .*captions\.json.* [Ee]xpected"):
        load_rows(written(folder, [preference()]), "preference", captions_file=file)


def test_required_captions_of_a_column(folder):
    path = written(folder, [preference(captions=["a cat"]), preference(captions=[])])
    assert load_rows(path, "preference")["captions"][:] == [["a cat"], []]
    with pytest.raises(RowError, match=r"train.json\[1\]: it has no captions"):
        load_rows(path, "preference", require_captions=True)


# --- rows that cannot be used ----------------------------------------------------------------------------------------

SFT = {"conversations": turns("Hi", "Ho")}
PROMPT = {"conversations": turns("Hi")}
ASKED = [said("user", "Hi")]
SAID = [said("assistant", "Ho")]
PAIR = {"prompt": ASKED, "chosen": SAID, "rejected": [said("assistant", "")]}


@pytest.mark.parametrize(
    ("stage", "record", "problem"),
    [
        ("preference", preference(preference=3), "preference is 3, expected 1 or 2"),
        ("preference", preference(preference=0), "preference is 0, expected 1 or 2"),
        ("preference", preference(preference="1"), "preference is '1', expected 1 or 2"),
        ("preference", preference(preference=None), "it has no preference; found the columns"),
        ("preference", preference(output_2=preference()["output_1"]), "chosen and rejected are the same: 'A cat.'"),
        ("preference", preference(image="no.png"), r"the image file .*no\.png does not exist"),
        ("preference", preference(image="corrupt.png"), r"corrupt\.png cannot be read"),
        ("preference", preference(image="empty.png"), r"empty\.png cannot be read"),
        ("preference", preference(image="../a.png"), r"the image file name is '\.\./a\.png'"),
        ("preference", preference(image="/etc/a.png"), r"the image file name is '/etc/a\.png'"),
        ("preference", preference(image=["a.png", None]), "its images have a gap"),
        ("preference", preference(images=["b.png"]), "it has images and image"),
        ("preference", preference(image=7), "an image is 7, expected a file name"),
        ("preference", preference(image=None), "have 1 <image>, but it has 0 images"),
        ("preference", preference(image=["a.png", "b.png"]), "have 1 <image>, but it has 2 images"),
        ("preference", preference(captions=7), "captions is 7, expected a text or a list of texts"),
        ("preference", preference(captions=[" "]), "captions is .* expected a text or a list of texts"),
        ("preference", {"prompt": ASKED, "chosen": ASKED, "rejected": ASKED}, "chosen is a user turn"),
        ("preference", {"chosen": ASKED, "rejected": ASKED}, "it has no prompt, and chosen and rejected differ"),
        ("preference", {"prompt": ASKED}, "it has no chosen and no rejected; found the columns"),
        (
            "preference",
            {"prompt": ASKED, "chosen": 7, "rejected": "b"},
            "chosen is 7, expected a list of messages",
        ),
        ("preference", preference(margin="big"), "margin is 'big', expected a finite number"),
        ("preference", {**PAIR, "chosen": [said("assistant", " ")]}, "its chosen is empty"),
        (
            "preference",
            {**PAIR, "rejected_images": ["b.png"]},
            "its column rejected_images has images of one completion",
        ),
        ("sft", {**SFT, "video": "a.mp4"}, "its column video has a video, which is not supported"),
        ("sft", {**SFT, "tools": "[{}]"}, "its column tools has tools, which are not supported"),
        ("prompt", {**PROMPT, "audios": ["a.wav"]}, "its column audios has audio, which is not supported"),
        ("sft", {**SFT, "system": 7}, "system is 7, expected a text"),
        (
            "sft",
            {"system": "s", "messages": [said("system", "t"), *ASKED, *SAID]},
            "a system column and a system message",
        ),
        ("sft", {"conversations": turns("Hi", "", "So?", "Ho")}, r"completion is empty \(conversations\[1\]\)"),
        (
            "sft",
            {"conversations": [{"from": "gpt", "value": "Hello"}, *turns("Hi", "", "So?", "Ho")]},
            r"completion is empty \(conversations\[2\]\)",
        ),
        ("sft", {"conversations": turns("Hi", "Ho", " ", "Ho")}, r"neither text nor an image \(conversations\[2\]\)"),
        ("sft", {"messages": [*ASKED, *ASKED, *SAID]}, r"messages\[1\] has the role user after user, expected ass"),
        ("sft", {"prompt": ASKED, "completion": [*SAID, *SAID]}, "its prompt ends with assistant"),
        (
            "sft",
            {"prompt": ASKED, "completion": [*SAID, *SAID, *ASKED, *SAID]},
            r"completion\[1\] has the role assistant after assistant, expected user",
        ),
        (
            "sft",
            {"messages": [*ASKED, *SAID, said("system", "s"), *ASKED, *SAID]},
            r"messages\[2\] has the role system after assistant",
        ),
        ("prompt", {"prompt": [*SAID, *ASKED]}, r"prompt\[0\] has the role assistant at the beginning, expected user"),
        ("sft", {"conversations": turns("Hi")}, "its prompt ends with nothing"),
        ("sft", {"conversations": turns("Hi", "Ho", "Hm")}, "its prompt ends with assistant"),
        ("sft", {"conversations": turns("Hi", " ")}, "its completion is empty"),
        ("sft", {"conversations": turns(" ", "Ho")}, "its question has neither text nor an image"),
        ("sft", {"conversations": "Hi"}, "conversations is 'Hi', expected a list of turns"),
        ("sft", {"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\] is .* expected `from`"),
        ("sft", {"conversations": [{"from": "human"}]}, r"conversations\[0\] is .* expected `from`"),
        ("sft", {"prompt": ASKED}, "it has no completion; found the columns"),
        ("sft", {"messages": [said("tool", "x")]}, r"messages\[0\] has the role 'tool'"),
        ("sft", {"messages": [said("user", None)]}, r"messages\[0\] has the content None"),
        ("sft", {"messages": [said("user", [{"type": "video"}])]}, "expected a text or an empty image part"),
        ("sft", {"messages": [said("user", [{"type": "image", "url": "x"}])]}, "into the `images` column"),
        ("sft", {"messages": ["Hi"]}, r"messages\[0\] is 'Hi', expected a dict"),
        ("sft", {"messages": [{**ASKED[0], "tool_calls": [1]}]}, r"messages\[0\] has tool_calls, which is not read"),
        ("sft", {"messages": [{**ASKED[0], "images": ["a.png"]}, *SAID]}, r"messages\[0\] has images, which is not"),
        ("sft", {"messages": [*ASKED, {**SAID[0], "thinking": "Hm"}]}, r"messages\[1\] has thinking, which is not"),
        (
            "sft",
            {"messages": [*ASKED, {**SAID[0], "weight": 0}, *ASKED, {**SAID[0], "weight": 1}]},
            r"messages\[1\] is not to be learned \(weight: 0\)",
        ),
        (
            "sft",
            {"conversations": [*turns("Hi"), {"from": "gpt", "value": "Ho", "loss": False}]},
            r"conversations\[1\] is not to be learned \(loss: False\)",
        ),
        (
            "sft",
            {
                "images": ["a.png", "b.png"],
                "messages": [said("user", [{**PICTURE, "index": 1}, {**PICTURE, "index": 0}]), *SAID],
            },
            r"messages\[0\] shows image 1 where image 0 stands",
        ),
        ("sft", {**SFT, "messages": [*ASKED, *SAID]}, "it has conversations and messages"),
        ("sft", {"images": "a.png", "messages": [message("user", "<image>Hi"), *SAID]}, "a user's text has <image>"),
        (
            "prompt",
            {"images": "a.png", "prompt": "<|vision_start|><|image_pad|><|vision_end|>Hi"},
            r"a user's text has <\|image_pad\|>, which is no image there",
        ),
        ("prompt", {"images": "a.png", "prompt": "<image 1> Hi"}, "a user's text has <image 1>, which is no image"),
        ("sft", {"prompt": "Hi", "completion": [said("assistant", "\u200b"), *ASKED, *SAID]}, r"\(completion\[0\]\)"),
        ("sft", {"prompt": "Hi", "completion": "\u200b"}, "its completion is empty"),
        ("preference", {"prompt": "Hi", "chosen": "Ho", "rejected": "Ho\n"}, "chosen and rejected are the same"),
        ("sft", {"conversations": turns("<video>\nHi", "Ho")}, r"conversations\[0\] shows <video>"),
        ("prompt", {"prompt": [said("user", "Hi <audio>")]}, r"prompt\[0\] shows <audio>, which is not supported"),
        ("prompt", {**PROMPT, "photo": "A.JPG"}, "it has no image, but its column photo holds 'A.JPG'"),
        ("prompt", {**PROMPT, "picture": ["a.png"]}, "its column picture holds"),
        ("prompt", {**PROMPT, "picture": "https://a.b/c.jpg?size=1"}, "its column picture holds"),
        ("prompt", {**PROMPT, "extra": {"file": "a.heic"}}, "its column extra holds"),
        ("prompt", {**PROMPT, "image_url": "https://a.b/c"}, "its column image_url holds"),
        ("preference", {**PAIR, "chosen_image": "b.png"}, "its column chosen_image has images of one completion"),
        ("sft", {"messages": [*ASKED, {**SAID[0], "masked": True}]}, "is not to be learned"),
        ("prompt", {**PROMPT, "history": [["Hi", "Ho"]]}, "its column history has earlier turns"),
        ("sft", {"messages": [said("user", [{**PICTURE, "text": "Hi"}]), *SAID], "image": "a.png"}, "holds the part"),
        ("prompt", {"prompt": [message("user", PICTURE, "Hi")]}, "messages show 1 image, but it has 0"),
        ("prompt", {"prompt": [said("system", "Hi")], "image": "a.png"}, "it has images but no user turn"),
        ("prompt", {"prompt": []}, "its prompt ends with nothing"),
        ("prompt", {**PROMPT, "caption_type": 8}, r"caption_type is 8, expected one of \{1: 'general'"),
        ("prompt", {**PROMPT, "answer_type": "E"}, "answer_type is 'E', expected one of general, A, B, C, D, no, yes"),
        ("prompt", {**PROMPT, "length_bonus": "x"}, "length_multiplier is 'x', expected a finite number"),
        ("prompt", {**PROMPT, "length_multiplier": float("nan")}, "length_multiplier is nan"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(folder, stage, record, problem, caplog):
    (folder / "corrupt.png").write_bytes((folder / "a.png").read_bytes()[:10])
    (folder / "empty.png").touch()
    good = {"sft": SFT, "preference": preference(), "prompt": PROMPT}[stage]
    path = written(folder, [good, record])
    with pytest.raises(RowError, match=rf"^train\.json\[1\]: .*{problem}.*on_bad_row `skip` leaves such rows out"):
        load_rows(path, stage)
    with caplog.at_level(logging.WARNING, logger="trl_llava.data.load"):
        assert load_rows(path, stage, on_bad_row="skip")["row_name"][:] == ["train.json[0]"]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("Skipped 1 of 2 rows of train.json: 1 ")


def test_content_that_is_empty_is_none(folder):
    empty = {"tools": "[]", "videos": [None], "audio": "", "history": "{}", "image_url": None}
    path = written(folder, [{**PROMPT, **empty}, {**PROMPT, "messages": None}])
    assert len(load_rows(path, "prompt")) == 2
    rows = [{"messages": [*ASKED, {**SAID[0], "masked": False, "train": True}]}]
    assert len(load_rows(written(folder, rows), "sft")) == 1


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        ("sft", {**SFT, "image": "A" * 9000, "conversations": turns("<image>", "Ho")}),
        ("sft", {"messages": [said("A" * 9000, "Hi")]}),
        ("sft", {**SFT, "row_name": "A" * 9000, "conversations": "Hi"}),
        ("sft", {"prompt": "Hi", **{f"column {i}": i for i in range(900)}}),
        ("preference", preference(preference="A" * 9000)),
        ("prompt", {**PROMPT, "answer_type": "A" * 9000}),
    ],
)
def test_an_error_is_short_whatever_the_row_holds(folder, stage, record):
    with pytest.raises(RowError) as caught:
        load_rows(written(folder, [record]), stage)
    assert len(str(caught.value)) < 1200


def test_skipped_rows_are_counted_by_reason_in_one_line(folder, caplog):
    Image.effect_noise((64, 64), 90).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    bad = [preference(image="x.png"), preference(preference=3), preference(image="y.png"), preference(image="cut.png")]
    path = written(folder, [preference(), *bad, "text"])
    with caplog.at_level(logging.WARNING, logger="trl_llava.data.load"):
        assert len(load_rows(path, "preference", on_bad_row="skip")) == 1
    assert caplog.messages == [
        "Skipped 5 of 6 rows of train.json: 2 image missing (train.json[1]), 1 preference outside {1, 2} "
        "(train.json[2]), 1 damaged image (train.json[4]), 1 it is a JSON str, expected an object (train.json[5])."
    ]


def test_the_first_bad_row_is_named_and_the_others_counted(folder):
    path = written(folder, [preference(), preference(preference=3), preference(preference=4)])
    counted = r"train.json\[1\]: preference is 3.*\(2 of 3 rows cannot be used: 2 preference outside \{1, 2\}\)"
    with pytest.raises(RowError, match=counted):
        load_rows(path, "preference")


def test_skipping_every_row_is_an_error(folder):
    with pytest.raises(RowError, match="2 of 2 rows cannot be used"):
        load_rows(written(folder, [preference(preference=3)] * 2), "preference", on_bad_row="skip")


def test_a_line_that_is_not_json_names_itself(folder):
    (folder / "a.jsonl").write_text(json.dumps(SFT) + "\n{oops\n")
    with pytest.raises(RowError, match=r"a.jsonl\[1\]: it is not JSON"):
        load_rows(folder / "a.jsonl", "sft")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "\\ud83d"}', "it is not JSON .*surrogates not allowed"),
        ('{"prompt": [], "\\udc00": 1}', "it is not JSON .*surrogates not allowed"),
        ('{"prompt": [], "id": ' + "9" * 5000 + "}", "it is not JSON .*digits"),
        ('{"prompt": [], "a\\u0000b": 1}', "it is not JSON .*a key holds NUL"),
        ("[" * 100_000, "it is not JSON .*lists in lists"),
        ('{"prompt": [{"role": "user", "content": "Hi"}], "length_bonus": 1' + "0" * 400 + "}", "a finite number"),
        ('{"image": "' + "a" * 300 + '.png", "prompt": [{"role": "user", "content": "Hi"}]}', "does not exist"),
        ('{"image": "a\\u0000.png", "prompt": [{"role": "user", "content": "Hi"}]}', "does not exist"),
    ],
)
def test_what_json_can_write_and_no_row_can_hold(folder, line, problem):
    good = {**PROMPT, "id": 2**70, "smile": "\U0001f600"}
    (folder / "a.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(RowError, match=rf"^a\.jsonl\[1\]: .*{problem}"):
        load_rows(folder / "a.jsonl", "prompt")
    rows = load_rows(folder / "a.jsonl", "prompt", on_bad_row="skip")
    assert rows["id"][:] == [str(2**70)] and rows["smile"][:] == ["\U0001f600"]


@pytest.mark.parametrize(
    ("name", "encoding", "indent"),
    [
        ("bom.json", "utf-8-sig", None),
        ("bom.jsonl", "utf-8-sig", None),
        ("windows.jsonl", "utf-16", None),
        ("windows.json", "utf-16", 2),
        ("pretty.jsonl", "utf-8", 2),
        ("SHOUTED.JSON", "utf-8", 2),
    ],
)
def test_files_as_other_programs_write_them(folder, name, encoding, indent):
    records = [{"prompt": "Schön?\u2028 }{"}, {"prompt": "Ja?"}]
    texts = [json.dumps(record, ensure_ascii=False, indent=indent) for record in records]
    text = "\n".join(texts) if name.endswith("l") else f"[{','.join(texts)}]"
    (folder / name).write_text(text, encoding=encoding)
    asked = [row["prompt"][0]["content"][0]["text"] for row in load_rows(folder / name, "prompt")]
    assert asked == ["Schön?\u2028 }{", "Ja?"]
    if indent:
        (folder / name).write_text(texts[0], encoding=encoding)  # one object alone
        assert len(load_rows(folder / name, "prompt")) == 1


def test_a_file_in_another_encoding_is_an_error(folder):
    (folder / "a.jsonl").write_bytes(json.dumps(PROMPT).encode() + b'\n{"id": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 .*Save it in that encoding"):
        load_rows(folder / "a.jsonl", "prompt")


def test_metadata_of_an_image_folder_that_is_no_object(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": ASKED, "file_name": "a.png"}) + "\n[]")
    with pytest.raises(RowError, match=r"metadata\.jsonl\[1\]: it is a JSON list, expected an object"):
        load_rows(folder, "prompt")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_an_empty_data_set_is_an_error(folder, name):
    with pytest.raises(RowError, match=rf"{name}: it is empty"):
        load_rows(written(folder, [], name), "sft")
    with pytest.raises(RowError, match="dataset: it is empty"):
        rows_from(Dataset.from_list([]), "sft")


@pytest.mark.parametrize(("wrong", "right"), [("caption", "captions"), ("Prompt", "prompt"), ("choosen", "chosen")])
def test_a_misspelt_column_is_an_error(wrong, right):
    record = {"prompt": ASKED, "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")], wrong: "x"}
    with pytest.raises(RowError, match=rf"unknown column '{wrong}'; did you mean '{right}'\?"):
        rows_from(Dataset.from_list([record]), "preference")


@pytest.mark.parametrize("column", ["_reason", "completion_ids"])
def test_a_column_with_a_name_that_is_used_here_is_an_error(column):
    with pytest.raises(RowError, match=rf"it has a column '{column}', a name that is used here"):
        rows_from(Dataset.from_list([{"prompt": ASKED, column: "x"}]), "prompt")


def test_other_columns_are_left_behind_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_llava.data"):
        rows = load_rows(written(folder, [preference(hallucination=False, id=7)]), "preference")
    assert "hallucination" not in rows.column_names
    assert caplog.messages == ["train.json: the preference stage does not read the columns hallucination."]


def test_file_names_in_memory_are_paths_and_in_parquet_need_a_folder(folder):
    records = [{"image": str(folder / "a.png"), "prompt": ASKED}]
    assert rows_from(Dataset.from_list(records), "prompt")[0]["images"][0]["path"] == str(folder / "a.png")
    named = Dataset.from_list([{"image": "a.png", "prompt": ASKED}])
    assert rows_from(named, "prompt", image_folder=folder)[0]["images"][0]["path"] == str(folder / "a.png")
    named.to_parquet(folder / "named.parquet")
    with pytest.raises(RowError, match="Set image_folder"):
        load_rows(folder / "named.parquet", "prompt")
    assert len(load_rows(folder / "named.parquet", "prompt", image_folder=folder)) == 1


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"x is a DatasetDict, expected a datasets\.Dataset"):
        rows_from(DatasetDict(), "sft", name="x")
    with pytest.raises(ValueError, match="stage is 'ppo', expected one of sft, preference, prompt"):
        rows_from(Dataset.from_list([SFT]), "ppo")
    with pytest.raises(ValueError, match="on_bad_row is 'drop', expected `error` or `skip`"):
        rows_from(Dataset.from_list([SFT]), "sft", on_bad_row="drop")


def test_worker_processes_give_the_same_rows_and_errors(folder):
    path = written(folder, [preference(), preference(preference=1), preference(preference=3)])
    with pytest.raises(RowError, match=r"train.json\[2\]: preference is 3"):
        load_rows(path, "preference", num_proc=2)
    rows = load_rows(path, "preference", num_proc=2, on_bad_row="skip")
    assert rows[:] == load_rows(path, "preference", on_bad_row="skip")[:]


def test_message_normaliser():
    messages = normalise_messages([said("system", "s"), said("user", "u"), said("assistant", [text("a")])], "row")
    assert messages == [message("system", "s"), message("user", "u"), message("assistant", "a")]
    assert place_images(messages, 2, "row")[1] == message("user", PICTURE, PICTURE, "u")
    assert messages[1] == message("user", "u")


def test_a_parquet_file_cannot_name_any_picture(tmp_path):
    """A struct column looks as if `datasets` had placed the file, but it is the data set's word."""
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    roles = (("prompt", "user"), ("completion", "assistant"))
    said = {column: [{"role": role, "content": "x"}] for column, role in roles}
    for path in (str(tmp_path / "secret.png"), "../secret.png"):
        row = {**said, "images": [{"bytes": None, "path": path}]}
        Dataset.from_list([row]).to_parquet(tmp_path / "data" / "rows.parquet")
        with pytest.raises(RowError, match=r"rows.parquet\[0\]: .*image"):
            load_rows(tmp_path / "data" / "rows.parquet", "sft", image_folder=tmp_path / "data")
        with pytest.raises(RowError, match="Set image_folder"):
            load_rows(tmp_path / "data" / "rows.parquet", "sft")
