"""Which objects a text names, and which of them are not in the image (CHAIR, arXiv 1809.02156)."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from trl_llava.errors import InputError, NotFoundError


class Mention(NamedTuple):
    """A place in a text, and the object that it names."""

    start: int
    end: int
    name: str


class Vocabulary:
    """The objects that can be found in a text: others are neither right nor wrong.

    Args:
        names: What each word or phrase is a name of, itself included.

    Example:
        >>> vocabulary = Vocabulary({"dog": "dog", "puppy": "dog", "dog house": "dog house"})
        >>> [mention.name for mention in vocabulary.mentions("Two puppies? No: dogs, and a dog house.")]
        ['dog', 'dog house']
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = {phrase.lower(): name.lower() for phrase, name in names.items()}
        # The longest first: a dog house is no dog.
        phrases = sorted(self.names, key=lambda phrase: (-len(phrase), phrase))
        self.pattern = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})(?:s|es)?\b", re.IGNORECASE)

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]], file: str | None = None) -> "Vocabulary":
        """The names in some lists, and those of a file: a JSON list, or an object {name: [other words for it]}."""
        names = {name: name for objects in lists for name in objects}
        if file is not None:
            for name, others in _read(file).items():
                names |= dict.fromkeys((name, *others), name)
        return cls(names)

    def mentions(self, text: str) -> list[Mention]:
        """The names in a text in their order; a plural in s or es counts, another one needs an entry of its own."""
        found = self.pattern.finditer(text)
        return [Mention(*match.span(), self.names[match.group(1).lower()]) for match in found]

    def invented(self, text: str, present: Sequence[str]) -> list[Mention]:
        """Those mentions whose object is not among those present."""
        there = {self.names.get(name.lower(), name.lower()) for name in present}
        return [mention for mention in self.mentions(text) if mention.name not in there]


def _read(file: str) -> dict[str, list[str]]:
    expected = "expected a JSON list of names, or an object {name: [other words for it]}"
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"--vocabulary: cannot read {file} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"--vocabulary: {file} is not JSON ({error}); {expected}") from error
    if isinstance(found, list):
        found = {name: [] for name in found} if all(isinstance(name, str) for name in found) else None
    texts = isinstance(found, dict) and all(isinstance(others, list) for others in found.values())
    if not texts or not all(isinstance(word, str) and word for name in found for word in (name, *found[name])):
        raise InputError(f"--vocabulary: {file} holds something else; {expected}")
    return found
