"""Let a model answer questions about pictures, a batch at a time."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    batch_size: int = 150,
    seed: int = 0,
) -> list[tuple[str, int]]:
    """Answer one question per picture.

    Args:
        model: An image-text-to-text model, with adapters or without.
        processor: Its processor, with a chat template.
        pictures: One per question.
        questions: The user's turns.
        temperature: 1 samples as PPO's rollouts do; 0 takes the likeliest token.
        max_new_tokens: Longest answer.
        batch_size: Questions at a time.
        seed: Seed of the sampling; torch's global generator is left as it was.

    Returns:
        For each question the answer, stripped, and its length in tokens with the end-of-turn token.
    """
    was_training = model.training
    model.eval()
    tokenizer = processor.tokenizer
    answers: list[tuple[str, int]] = []
    sampling: dict[str, float | bool] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}  # the whole distribution, as in rollouts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `generate` samples from the global generator only
        for start in range(0, len(questions), batch_size):
            end = start + batch_size
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                    add_generation_prompt=True,
                )
                for question in questions[start:end]
            ]
            inputs = processor(
                text=texts, images=list(pictures[start:end]), return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
            replies = output[:, inputs["input_ids"].shape[1] :]
            lengths = (replies != tokenizer.pad_token_id).sum(dim=1).tolist()
            texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
            answers += [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]
    model.train(was_training)
    return answers
