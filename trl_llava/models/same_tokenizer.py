"""Whether a value model has the policy's token ids for the same tokens."""

from transformers import ProcessorMixin

from trl_llava.errors import InputError


def check_same_tokenizer(policy_processor: ProcessorMixin, other_processor: ProcessorMixin, other: str) -> None:
    """Refuse a model that gets the policy's token ids and has other tokens for them; names the first difference."""
    ours, theirs = policy_processor.tokenizer, other_processor.tokenizer
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(ours, token) != getattr(theirs, token):
            raise InputError(_mismatch(other, token, getattr(ours, token), getattr(theirs, token)))
    ids = (getattr(policy_processor, "image_token_id", None), getattr(other_processor, "image_token_id", None))
    if ids[0] != ids[1]:
        raise InputError(_mismatch(other, "image_token_id", *ids))
    our_vocab, their_vocab = ours.get_vocab(), theirs.get_vocab()
    if our_vocab != their_vocab:
        token = min(
            token for token in our_vocab.keys() | their_vocab.keys() if our_vocab.get(token) != their_vocab.get(token)
        )
        raise InputError(_mismatch(other, f"the ID of token {token!r}", our_vocab.get(token), their_vocab.get(token)))


def _mismatch(other: str, what: str, ours: int | None, theirs: int | None) -> str:
    """The message of `check_same_tokenizer`."""
    return (
        f"policy and {other} do not fit together: {what} is {ours} for the policy and {theirs} for the {other}. Use a "
        f"{other} of the policy's family, or keep the reward in a FactualReward, which tokenises text on its own"
    )
