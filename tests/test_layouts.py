"""Preference data as it lies on the Hub, read without a conversion: rows in the layout of each data set."""

import base64
import json
import logging

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from trl_llava.data import image_places
from trl_llava.data.collators import PromptCollator
from trl_llava.data.contract import RowError, marked_parts
from trl_llava.data.lengths import drop_overlong
from trl_llava.data.load import load_rows, rows_from
from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, render

PICTURE = {"type": "image", "text": None}
PAIR = {"chosen": "A red square.", "rejected": "A dog."}
ASKED, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}


def message(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 3), "red").save(tmp_path / name)
    return tmp_path


def written(folder, *records):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "train.jsonl"


def check_pair(rows, prompt=(PICTURE, "What is it?")):
    """A row of the reward and DPO stages, its image found."""
    assert rows[0]["prompt"] == [message("user", *prompt)]
    assert rows[0]["chosen"] == [message("assistant", PAIR["chosen"])]
    assert rows[0]["rejected"] == [message("assistant", PAIR["rejected"])]
    assert len(rows[0]["images"]) == sum(part is PICTURE for part in prompt)


def check_other_stages(read):
    """PPO, GRPO and RLOO read the prompt of a pair, SFT the chosen completion too."""
    assert read("prompt")[0]["prompt"] == [message("user", PICTURE, "What is it?")]
    assert read("sft")[0]["completion"] == [message("assistant", PAIR["chosen"])]


def rated(completion, faithfulness, helpfulness="3"):
    ratings = {"Helpfulness": helpfulness, "Ethical Considerations": "5", "Visual Faithfulness": faithfulness}
    notes = {name: {"Rating": rating, "Rationale": "Because."} for name, rating in ratings.items()}
    return {"annotations": notes, "model": "qwen-vl-chat", "response": completion}


# --- the layouts -----------------------------------------------------------------------------------------------------


def test_rlaif_v(red_image):
    """openbmb/RLAIF-V-Dataset."""
    origin = {"origin_dataset": "TextVQA", "origin_split": "{}", "idx": "0", "image_path": "x/a.jpg"}
    record = {"ds_name": "RLAIF-V", "image": red_image, "question": "What is it?", **PAIR, **origin}
    text = dict.fromkeys(("ds_name", "question", "chosen", "rejected", *origin), Value("string"))
    dataset = Dataset.from_list([record], features=Features({**text, "image": ImageFeature()}))
    check_pair(rows_from(dataset, "preference"))
    check_other_stages(lambda stage: rows_from(dataset, stage))
    carried = rows_from(dataset, "prompt").column_names  # for reward functions: what the layout does not read
    assert "idx" in carried and "question" not in carried and "chosen" not in carried


def test_rlhf_v(red_image):
    """openbmb/RLHF-V-Dataset: one column holds the pair as JSON."""
    record = {"ds_name": "RLHF-V", "image": red_image, "text": json.dumps({"question": "What is it?", **PAIR})}
    record |= {"origin_dataset": "LCS-558K", "origin_split": "{}", "idx": 0, "image_path": "x/a.jpg"}
    dataset = Dataset.from_list([record])
    check_pair(rows_from(dataset, "preference"))
    check_other_stages(lambda stage: rows_from(dataset, stage))


@pytest.mark.parametrize("prompt", ["What is it?", "<image>\nWhat is it?"])
def test_mm_rlhf(folder, prompt):
    """yifanzhang114/MM-RLHF, dpo_pairs.jsonl: texts in TRL's columns."""
    path = written(folder, {"image": "a.png", "prompt": prompt, **PAIR, "chosen_reason": "", "rejected_reason": ""})
    check_pair(load_rows(path, "preference"))
    check_other_stages(lambda stage: load_rows(path, stage))


def test_mm_rlhf_as_it_was_ranked(folder):
    """yifanzhang114/MM-RLHF, data.jsonl: rank 1 is the best; the three ratings say otherwise here."""
    texts = ["A square.", PAIR["rejected"], PAIR["chosen"]]
    ratings = {"faithfulness": [3, 5, 1], "helpfulness": [1, 2, 3], "ethical": [0, 0, 0]}
    record = {
        "id": 7,
        "question": "What is it?",
        "answer": "A red square.",
        "image": "a.png",
        "video": None,
        **ratings,
    }
    record |= {"models_output": texts, "final_ranking": [2, 3, 1], "score_reasons": ["", "", ""], "ranking_reason": ""}
    path = written(folder, record)
    check_pair(load_rows(path, "preference"))
    check_other_stages(lambda stage: load_rows(path, stage))
    assert load_rows(path, "preference", captions_column="answer")[0]["captions"] == ["A red square."]
    by_faith = load_rows(path, "preference", rating="faithfulness")[0]
    assert (by_faith["chosen"], by_faith["rejected"]) == (
        [message("assistant", PAIR["rejected"])],
        [message("assistant", PAIR["chosen"])],
    )
    with pytest.raises(RowError, match="equal ratings"):
        load_rows(path, "preference", rating="ethical")
    del record["final_ranking"]
    with pytest.raises(RowError, match=r"have the ratings .*'faithfulness'.* Name one of them with `rating`"):
        load_rows(written(folder, record), "preference")


@pytest.mark.parametrize("stored", ["lines", "arrow"])
def test_vl_feedback(folder, stored):
    """MMInstruction/VLFeedback: best against worst by one rating, completions without a number left aside."""
    worst, middle = rated("A dog.", "1", "5"), rated("A square.", "2", "4")
    completions = [worst, rated("Not rated.", "N/A", "N/A"), rated("A red square.", "5", "1"), middle]
    record = {"id": "svit-1", "prompt": "What is it?", "models": ["a", "b"], "img_path": "a.png"}
    if stored == "lines":  # vlfeedback_80k.jsonl
        path = written(folder, {**record, "completions": completions})
    else:  # as `datasets` stores it: a struct of lists
        lists = {name: [completion[name] for completion in completions] for name in completions[0]}
        path = folder / "a.parquet"
        Dataset.from_list([{**record, "completions": lists}]).to_parquet(path)
    check_pair(load_rows(path, "preference", image_folder=folder))
    check_other_stages(lambda stage: load_rows(path, stage, image_folder=folder))
    by_help = load_rows(path, "preference", image_folder=folder, rating="Helpfulness")
    assert (by_help[0]["chosen"], by_help[0]["rejected"]) == (
        [message("assistant", "A dog.")],
        [message("assistant", "A red square.")],
    )
    with pytest.raises(RowError, match=r"no rating 'Fun', only \['Ethical Considerations', 'Helpfulness', 'Visual"):
        load_rows(path, "preference", image_folder=folder, rating="Fun")


def test_ties_are_left_out_and_counted(folder, caplog):
    pairs = [[rated("A.", first), rated("B.", second)] for first, second in (("3", "3"), ("4", "3"), ("2", "2"))]
    records = [{"prompt": "What?", "img_path": "a.png", "completions": pair} for pair in pairs]
    with caplog.at_level(logging.WARNING, logger="trl_llava.data.load"):
        assert load_rows(written(folder, *records), "preference")["row_name"][:] == ["train.jsonl[1]"]
    assert caplog.messages == ["Skipped 2 of 3 rows of train.jsonl: 2 tie (train.jsonl[0])."]
    assert len(load_rows(folder / "train.jsonl", "prompt")) == len(load_rows(folder / "train.jsonl", "sft")) == 3
    with pytest.raises(RowError, match=r"train.jsonl\[0\]: its completions have equal ratings"):
        load_rows(written(folder, records[0]), "preference")


def test_multimodal_reward_bench(folder):
    """facebookresearch/multimodal_rewardbench, data/all_data.json."""
    record = {"ID": "nocaps_1", "Image": "a.png", "Text": "What is it?", "Category": "vqa", "Better": "Output2"}
    path = written(folder, {**record, "Output1": PAIR["rejected"], "Output2": PAIR["chosen"]})
    check_pair(load_rows(path, "preference"))
    check_other_stages(lambda stage: load_rows(path, stage))


@pytest.mark.parametrize("ranking", [[1, 0], [0, 1]])
def test_vl_reward_bench(red_image, ranking):
    """MMInstruction/VL-RewardBench: rank 0 is the better one."""
    texts = [PAIR["rejected"], PAIR["chosen"]] if ranking == [1, 0] else [PAIR["chosen"], PAIR["rejected"]]
    record = {"id": "1", "query": "What is it?", "response": texts, "image": red_image, "human_ranking": ranking}
    record |= {"models": ["a", "b"], "judge": "", "rationale": "", "query_source": "RLAIF-V", "ground_truth": ""}
    text = dict.fromkeys(("id", "query", "judge", "rationale", "query_source", "ground_truth"), Value("string"))
    lists = {"response": List(Value("string")), "models": List(Value("string")), "human_ranking": List(Value("int64"))}
    dataset = Dataset.from_list([record], features=Features({**text, **lists, "image": ImageFeature()}))
    check_pair(rows_from(dataset, "preference"))
    check_other_stages(lambda stage: rows_from(dataset, stage))


def test_llama_factory(folder):
    """llamafactory/RLHF-V and Zhihui/VLFeedback: the pair beside the conversation."""
    asked = [{"from": "human", "value": "<image>What is it?"}]
    pair = {name: {"from": "gpt", "value": text} for name, text in PAIR.items()}
    path = written(folder, {"images": ["a.png"], "conversations": asked, **pair})
    check_pair(load_rows(path, "preference"))
    check_other_stages(lambda stage: load_rows(path, stage))
    longer = [*asked, {"from": "gpt", "value": "A square."}, {"from": "human", "value": "Which colour?"}]
    written(folder, {"images": ["a.png"], "conversations": longer, **pair})
    assert [len(load_rows(path, stage)[0]["prompt"]) for stage in ("preference", "sft", "prompt")] == [3, 3, 3]


@pytest.mark.parametrize("rejected", ["response", "messages"])
def test_ms_swift(folder, rejected):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": PAIR["chosen"]},
    ]
    turns = [*messages[:-1], {"role": "assistant", "content": PAIR["rejected"]}]
    given = {"rejected_response": PAIR["rejected"]} if rejected == "response" else {"rejected_messages": turns}
    path = written(folder, {"messages": messages, "images": ["a.png"], **given})
    row = load_rows(path, "preference")[0]
    assert row["prompt"] == [message("system", "Be brief."), message("user", PICTURE, "What is it?")]
    assert (row["chosen"], row["rejected"]) == tuple([message("assistant", text)] for text in PAIR.values())
    assert load_rows(path, "prompt")[0]["prompt"] == row["prompt"]
    assert load_rows(path, "sft")[0]["completion"] == row["chosen"]


def test_trl_lib_rlaif_v(red_image):
    """trl-lib/rlaif-v: TRL's messages."""
    pair = {name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for name, text in PAIR.items()}
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    dataset = Dataset.from_list([{"images": [red_image], "prompt": asked, **pair}])
    check_pair(rows_from(dataset, "preference"))
    check_other_stages(lambda stage: rows_from(dataset, stage))


@pytest.mark.parametrize("speaker", ["gpt", "llava", "", None])
def test_preferences_of_the_paper_whoever_speaks(folder, speaker):
    """zhiqings/LLaVA-Human-Preference-10K names a speaker in its outputs that is not always `gpt`."""
    asked = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": ""}]
    outputs = {f"output_{i}": {"from": speaker, "value": text} for i, text in enumerate(PAIR.values(), 1)}
    path = written(folder, {"image": "a.png", "conversations": asked, **outputs, "preference": 1})
    check_pair(load_rows(path, "preference"), prompt=("What is it?", PICTURE))
    row = load_rows(path, "sft")[0]  # as of every pair, the better completion
    assert (row["prompt"], row["completion"]) == (
        [message("user", "What is it?", PICTURE)],
        [message("assistant", PAIR["chosen"])],
    )


def test_texts_for_sft_and_as_prompts(folder):
    path = written(folder, {"images": ["a.png", "b.png"], "prompt": "Which is red?", "completion": "Both."})
    assert load_rows(path, "sft")[0]["prompt"] == [message("user", PICTURE, PICTURE, "Which is red?")]
    assert load_rows(path, "sft")[0]["completion"] == [message("assistant", "Both.")]
    assert load_rows(path, "prompt")[0]["prompt"] == [message("user", PICTURE, PICTURE, "Which is red?")]


def test_a_column_of_another_layout_is_carried_along(red_image):
    """`question`, `text` and `response` beside TRL's `prompt` are for reward functions."""
    asked = [{"role": "user", "content": "What is it?"}]
    record = {"image": red_image, "prompt": asked, "question": "Q", "text": "T", "response": "R", "query": "S"}
    row = rows_from(Dataset.from_list([record]), "prompt")[0]
    assert row["prompt"] == [message("user", PICTURE, "What is it?")]
    assert [row[name] for name in ("question", "text", "response", "query")] == ["Q", "T", "R", "S"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"image": "a.png", "text": "A dog on a beach."}, "text is 'A dog on a beach.', expected JSON with question"),
        ({"image": "a.png", "text": '{"question": "What?"}'}, "expected JSON with question, chosen and rejected"),
        ({"prompt": "What?", "completions": ["A", "B"]}, "completions is .'A', 'B'., expected texts"),
        ({"prompt": "What?", "completions": [rated("A", "N/A"), rated("B", "1")]}, "1 of its 2 completions have a nu"),
        ({"Image": "a.png", "Text": "?", "Output1": "A", "Output2": "B", "Better": "A"}, "Better is 'A', expected"),
        ({"query": "?", "response": ["A", "B"], "human_ranking": [0]}, "expected a rank for each text"),
        ({"messages": [], "rejected_response": "A"}, "messages is .*, expected a list that ends"),
        (
            {"messages": [ASKED, SAID], "rejected_messages": [{**ASKED, "content": "Why?"}, SAID]},
            "messages and rejected_messages differ before their last turn",
        ),
        (
            {"messages": [ASKED, SAID], "rejected_messages": [ASKED, SAID], "rejected_response": "No"},
            "it has rejected_response and rejected_messages",
        ),
        ({"messages": [ASKED, SAID], "rejected_messages": "No"}, "rejected_messages is 'No', expected a list"),
        (
            {"question": "?", "models_output": ["A"], "final_ranking": [1, 2]},
            r"final_ranking is \[1, 2\] and models_out",
        ),
        ({"question": "?", "models_output": "A", "final_ranking": [1]}, "models_output is 'A', expected texts with"),
        ({"question": "?", "models_output": ["A", "B"]}, "its completions have no ratings"),
        ({"messages": [{"role": "user", "content": "?"}], "rejected_response": "A"}, "its prompt ends with nothing"),
        ({"image": "a.png", "prompt": "<image> <image>?", **PAIR}, "its messages show 2 images, but it has 1"),
        ({"prompt": "<image>?", **PAIR}, "its messages show 1 image, but it has 0"),
    ],
)
def test_a_row_that_no_reader_can_use_says_why(folder, record, problem):
    with pytest.raises(RowError, match=rf"train.jsonl\[0\]: .*{problem}"):
        load_rows(written(folder, record), "preference")


# --- places of images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What?", ["What?"]),
        ("<image>\nWhat?", [PICTURE, "What?"]),
        ("What?\n<image>", ["What?", PICTURE]),
        ("Is <image> like <image>?", ["Is ", PICTURE, " like ", PICTURE, "?"]),
        ("<image>\n<image>", [PICTURE, PICTURE]),
        (" <image>\n\n<image> Same?\n", [PICTURE, PICTURE, "Same?"]),
    ],
)
def test_images_stand_where_the_text_says(text, parts):
    assert marked_parts(text) == message("user", *parts)["content"]


def test_vicuna_v1_moves_images_to_the_front_and_says_so_once(folder, tiny_processor, caplog):
    asked = [{"from": "human", "value": "Is <image> like <image>?"}]
    path = written(folder, *[{"image": ["a.png", "b.png"], "conversations": asked}] * 2)
    rows = load_rows(path, "prompt")

    tiny_processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '<image>' }}{% endfor %}{% endfor %}"
    )
    assert render(tiny_processor, rows[0]["prompt"]) == "Is <image> like <image>?"
    drop_overlong(rows, PromptCollator(tiny_processor, 4096), "error")
    assert not image_places.moves_images(tiny_processor) and not caplog.messages

    tiny_processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    assert "USER: <image>\n<image>\nIs  like ?" in render(tiny_processor, rows[0]["prompt"])
    image_places._warn_once.cache_clear()
    for _ in range(2):
        drop_overlong(rows, PromptCollator(tiny_processor, 4096), "error")
    assert caplog.messages == [f"{image_places.MOVED.capitalize()}."]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind(folder, red_image):
    content = (folder / "a.png").read_bytes()
    asked = {"prompt": "What?", "completion": "That."}
    for image in (red_image, str(folder / "a.png"), content, {"bytes": content, "path": None}, {"bytes": content}):
        for record in ({"image": image}, {"images": [image, image]}):
            rows = rows_from(Dataset.from_list([{**record, **asked}]), "sft", on_bad_row="skip")  # decodes it
            assert len(rows[0]["images"]) == len(record.get("images", "1"))


@pytest.mark.parametrize("image", ["https://host/a.png", "http://host/a.png", "data:image/png;base64,iVBOR", "base64"])
def test_links_and_base64_are_refused_in_a_short_line(folder, image):
    if image == "base64":
        Image.effect_noise((64, 64), 90).save(folder / "noise.png")
        image = base64.b64encode((folder / "noise.png").read_bytes()).decode()
    with pytest.raises(RowError, match=r"its image is (a URL|base64 text)") as error:
        load_rows(written(folder, {"image": image, "prompt": "What?", "completion": "That."}), "sft")
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_from_a_named_column(folder):
    records = [
        {"prompt": "What?", **PAIR, "gt_caption": facts} for facts in ("A cat.", ["A cat.", "OCR: 7"], "", None)
    ]
    path = written(folder, *records)
    rows = load_rows(path, "preference", captions_column="gt_caption")
    assert rows["captions"][:] == [["A cat."], ["A cat.", "OCR: 7"], [], []]
    with pytest.raises(RowError, match=r"train.jsonl\[2\]: it has no captions"):
        load_rows(path, "preference", captions_column="gt_caption", require_captions=True)
    with pytest.raises(RowError, match=r"train.jsonl: it has no column 'captoin', only .*'gt_caption'"):
        load_rows(path, "preference", captions_column="captoin")
    both = written(folder, {**records[0], "captions": ["A dog."]})
    with pytest.raises(RowError, match="it has captions, and captions_column is 'gt_caption'"):
        load_rows(both, "preference", captions_column="gt_caption")


def test_a_column_called_caption_asks_which_it_is(folder):
    path = written(folder, {"prompt": "What?", **PAIR, "caption": "A cat."})
    with pytest.raises(RowError, match=r"did you mean 'captions'.*set captions_column to 'caption'"):
        load_rows(path, "preference")
    assert load_rows(path, "preference", captions_column="caption")[0]["captions"] == ["A cat."]
