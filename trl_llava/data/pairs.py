"""Both answers of each preference row, encoded with the row's images once."""

from collections.abc import Sequence
from typing import Any

from trl_llava.data.encoding import Encoding, encode
from trl_llava.data.images import load_images
from trl_llava.data.lengths import MeasurableCollator, check_lengths


def encode_pairs(collator: MeasurableCollator, rows: Sequence[dict[str, Any]]) -> Encoding:
    """Encode pairs of answers, each row's images once.

    Args:
        collator: Knows the two conversations of a row, how they are rendered, and how long they may be.
        rows: B rows of the preference stage.

    Returns:
        2B conversations: all chosen ones, then all rejected ones.

    Raises:
        RowError: If an image cannot be read, captions are missing, or a conversation is too long.
    """
    pairs, names = [collator.conversations(row) for row in rows], [row["row_name"] for row in rows]
    encoding = encode(
        collator.processor,
        [pair[0] for pair in pairs] + [pair[1] for pair in pairs],
        load_images(rows),
        row_names=names,
        image_copies=2,
        **collator.rendering(),
    )
    check_lengths(encoding.input_ids, names * 2, collator)
    return encoding
