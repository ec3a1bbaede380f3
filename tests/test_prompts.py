"""The paper's strings byte for byte, captions in one order that repeats, and rendering through any chat template."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from trl_llava.prompts import VICUNA_V1_CHAT_TEMPLATE, JudgingPrompt, judging_messages, render

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# What the paper's code renders for one pair, up to the judgement's last character.
JUDGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat is the man doing? ASSISTANT: The man rides a "
    "wave.</s> USER: Please evaluate the quality of your last response. There are several dimensions you should "
    "consider in your evaluation:\n\n1. Accurate: The AI should provide factual and accurate information from the "
    "image, and refrain from making statements that are not supported by the image or inconsistent with the image. "
    "Specifically, the AI's response should be fully supported by the combination of the following captions:\n"
    "  - Several boats are tied to the pier.\n  - A young girl holds a kite near the beach.\n  - A man rides a wave "
    "on a surfboard in the ocean.\n\n2. Helpful: The AI\u2019s response should precisely serve the user's needs and "
    "interests, while grounding the response in the image.\n3. Language Natural: The AI should employ language that "
    "flows smoothly and is free from repetitive or awkward constructs.\n4. Concise: The AI should efficiently address "
    "the task or answer the question, communicating the necessary information with brevity and clarity.\n\nA good "
    "response should be accurate, helpful, language natural, and concise. ASSISTANT: Following your definitions, the "
    "quality score of my last response is"
)
PLAIN_FIRST_POINT = "that are not supported by the image or inconsistent with the image.\n2. Helpful:"
CAPTIONS = [
    "Several boats are tied to the pier.",
    "A young girl holds a kite near the beach.",
    "A man rides a wave on a surfboard in the ocean.",
]
PICTURE = {"type": "image", "text": None}


def user(text, *, picture=False):
    return {"role": "user", "content": [PICTURE] * picture + [{"type": "text", "text": text}] * bool(text)}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture
def vicuna(tiny_processor):
    tiny_processor.chat_template = VICUNA_V1_CHAT_TEMPLATE
    return tiny_processor


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [user("What is shown in this picture?", picture=True), assistant("A brown dog.")],
            " USER: <image>\nWhat is shown in this picture? ASSISTANT: A brown dog.</s>",
        ),
        (
            [
                user("Is there a cat on the table?", picture=True),
                assistant("No, there is no cat on the table."),
                user("How many people are in the photo?"),
                assistant("There are 25 people in the photo."),
                user("Why?"),
                assistant("Because it is sunset."),
            ],
            " USER: <image>\nIs there a cat on the table? ASSISTANT: No, there is no cat on the table.</s>USER: How "
            "many people are in the photo? ASSISTANT: There are 25 people in the photo.</s>USER: Why? ASSISTANT: "
            "Because it is sunset.</s>",
        ),
        (
            [user("Describe the scene in detail."), assistant(" Leading space and trailing newline.\n")],
            " USER: Describe the scene in detail. ASSISTANT:  Leading space and trailing newline.\n</s>",
        ),
        ([user("", picture=True), assistant("Beach.")], " USER: <image> ASSISTANT: Beach.</s>"),
        (
            [user("Café 日本?", picture=True), assistant("Oui — c’est ça 😀.")],  # noqa: RUF001
            " USER: <image>\nCafé 日本? ASSISTANT: Oui — c’est ça 😀.</s>",  # noqa: RUF001
        ),
    ],
)
def test_vicuna_v1_conversations_are_those_of_the_paper(vicuna, messages, expected):
    assert render(vicuna, messages) == SYSTEM + expected


def test_vicuna_v1_query_ends_with_the_open_answer(vicuna):
    query = render(vicuna, [user("What is the man doing?", picture=True)], add_generation_prompt=True)
    assert query == SYSTEM + " USER: <image>\nWhat is the man doing? ASSISTANT:"


def test_vicuna_v1_takes_another_system_text_and_refuses_unknown_roles(vicuna):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert render(vicuna, [system, user("Hi")], add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    with pytest.raises(TemplateError, match="no place for the role system"):
        render(vicuna, [user("Hi"), system])


def test_two_images_take_a_line_each(vicuna):
    messages = [{"role": "user", "content": [PICTURE, PICTURE, {"type": "text", "text": "Same?"}]}]
    assert render(vicuna, messages) == SYSTEM + " USER: <image>\n<image>\nSame?"


def judged(processor, conversation, captions, prompt):
    messages = judging_messages(conversation, captions, prompt)
    return render(processor, messages, continue_final_message=True, judging_turn=True)


def test_judging_turn_is_the_papers_byte_for_byte(vicuna):
    conversation = [user("What is the man doing?", picture=True), assistant("The man rides a wave.")]
    seeds = (judged(vicuna, conversation, CAPTIONS, JudgingPrompt(seed=seed)) for seed in range(100))
    assert JUDGED in seeds  # some seed gives the order that the paper's run drew


def test_judging_turn_without_captions(vicuna):
    conversation = [user("What is the man doing?", picture=True), assistant("The man rides a wave.")]
    plain = judged(vicuna, conversation, CAPTIONS, JudgingPrompt(with_captions=False))
    start, end = JUDGED.index(" Specifically, the AI's"), JUDGED.index("\n2. Helpful")
    assert plain == JUDGED[:start] + JUDGED[end:]
    assert PLAIN_FIRST_POINT in plain
    assert judged(vicuna, conversation, None, JudgingPrompt(with_captions=False)) == plain


def test_only_the_judging_turn_has_a_space_before_user(vicuna):
    conversation = [
        user("What color is the bus?", picture=True),
        assistant("It is yellow."),
        user("Where is it parked?"),
        assistant("Beside the station."),
    ]
    text = judged(vicuna, conversation, ["A bus."], JudgingPrompt())
    assert text.startswith(
        SYSTEM + " USER: <image>\nWhat color is the bus? ASSISTANT: It is yellow.</s>USER: Where is it parked? "
        "ASSISTANT: Beside the station.</s> USER: Please evaluate"
    )


def test_captions_have_one_order_for_both_candidates_that_repeats(vicuna):
    question = user("What is the man doing?", picture=True)
    captions = [f"caption {i}" for i in range(8)]

    def order(answer, given, seed=0):
        text = judged(vicuna, [question, assistant(answer)], given, JudgingPrompt(seed=seed))
        return [line for line in text.split("\n") if line.startswith("  - ")]

    first = order("The man rides a wave.", captions)
    assert sorted(first) == [f"  - caption {i}" for i in range(8)]
    assert first == order("The man is cooking soup.", captions)
    assert first == order("The man rides a wave.", captions[::-1])
    assert first != order("The man rides a wave.", captions, seed=1)
    assert first == [f"  - caption {i}" for i in (4, 1, 7, 6, 3, 0, 2, 5)]  # the same in every process and version
    assert captions == [f"caption {i}" for i in range(8)]


def test_braces_in_captions_are_text(vicuna):
    captions = ["The bus has {braces} and {caption} and {factual_prompt} in its caption."]
    text = judged(vicuna, [user("What?"), assistant("That.")], captions, JudgingPrompt())
    assert f"captions:\n  - {captions[0]}\n\n2. Helpful" in text


@pytest.mark.parametrize("captions", [None, []])
def test_missing_captions_are_an_error(captions):
    with pytest.raises(ValueError, match="needs captions and there are none"):
        judging_messages([user("What?"), assistant("That.")], captions, JudgingPrompt())


def test_a_conversation_without_an_answer_is_not_judged():
    with pytest.raises(ValueError, match="does not end with an assistant message"):
        judging_messages([user("What?")], ["caption"], JudgingPrompt())


def test_judging_prompt_travels_as_a_dict():
    prompt = JudgingPrompt(instruction="Rate it. {factual_prompt}", answer_prefix="Score:", seed=3)
    assert JudgingPrompt.from_dict(prompt.to_dict()) == prompt
    assert JudgingPrompt.from_dict({"with_captions": False}) == JudgingPrompt(with_captions=False)
    with pytest.raises(ValueError, match=r"unknown fields \['captions_first'\]"):
        JudgingPrompt.from_dict({"captions_first": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "Rate it."}, "has no {factual_prompt}"),
        ({"caption_line": "- x"}, "has no {caption}"),
        ({"answer_prefix": " "}, "answer_prefix is empty"),
    ],
)
def test_judging_prompt_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        JudgingPrompt(**fields)


def test_rendering_without_chat_template_is_an_error(tiny_processor):
    tiny_processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        render(tiny_processor, [user("Hi")])


def test_a_tokenizer_gets_its_messages_as_strings(tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}"
    assert render(tokenizer, [user("hi"), assistant("ho")]) == "[HI][HO]"
