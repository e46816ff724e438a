"""The format of a family's secrets, and which tokens can stand where in it.

The format is public knowledge and comes from public examples: from the family's *twins*, which are
drawn like the planted records and were planted nowhere. No planted secret has a part in it.

Each character has a class: ASCII digit; letter a-f, g-z, A-F, G-Z; other letter; or itself. If all
examples are of one length, the format is *fixed*, and position i may hold the classes that examples
have there (" 824415023" gives a space and nine digits, whatever the digits are). Otherwise it is an
*alphabet*: all classes that occur, at any position. Where any letter beyond f occurs, a-f and g-z
count as one class, and so do A-F and G-Z: only hexadecimal strings are held to hexadecimal digits.

Knows texts and a tokenizer's vocabulary, no models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_OTHER_LETTER = "é"
_CLASSES = {
    **dict.fromkeys("0123456789", "0"),
    **dict.fromkeys("abcdef", "a"),
    **dict.fromkeys("ghijklmnopqrstuvwxyz", "z"),
    **dict.fromkeys("ABCDEF", "A"),
    **dict.fromkeys("GHIJKLMNOPQRSTUVWXYZ", "Z"),
    "\ufffd": _OTHER_LETTER,  # what is decoded of a part of a character
}


def shape_of(text: str) -> str:
    """One class a character, see the module's docstring."""
    return "".join(
        _CLASSES.get(c) or (_OTHER_LETTER if c.isalpha() and not c.isascii() else c) for c in text
    )


@dataclass(frozen=True)
class Format:
    """Where which classes of characters may stand.

    positions: the classes at each position of a fixed format; a single set of an alphabet
    fixed: which of the two it is
    """

    positions: tuple[frozenset[str], ...]
    fixed: bool

    @classmethod
    def of(cls, examples: Sequence[str]) -> Format:
        """The format of texts. Raises `ValueError` if there are none, or only empty ones."""
        shapes = [shape_of(example) for example in examples if example]
        if not shapes:
            raise ValueError("a format needs at least one example that is not empty")
        everything = set("".join(shapes))
        words = bool(everything & {"z", "Z"})

        def widened(classes: set[str]) -> frozenset[str]:
            for pair in ({"a", "z"}, {"A", "Z"}):
                if words and classes & pair:
                    classes = classes | pair
            return frozenset(classes)

        if len({len(shape) for shape in shapes}) == 1:
            return cls(tuple(widened(set(column)) for column in zip(*shapes, strict=True)), True)
        return cls((widened(everything),), False)

    def allows(self, shape: str, offset: int) -> bool:
        """Whether a text of this shape may stand `offset` characters after the beginning."""
        if not self.fixed:
            return set(shape) <= self.positions[0]
        fits = offset + len(shape) <= len(self.positions)
        return fits and all(c in self.positions[offset + i] for i, c in enumerate(shape))


class Vocabulary:
    """What each token of a vocabulary stands for, as text after other text.

    texts: of each id; empty for special tokens and for rows of the head without a token
    lengths: int64 `[vocabulary]`, characters of each
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        """`size` is the number of logits, which may exceed the tokenizer's tokens."""
        # Decoded after an anchor, because some tokenizers drop a space that opens a text.
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"]

        def decode(ids: list[list[int]]) -> list[str]:
            return tokenizer.batch_decode(
                ids, clean_up_tokenization_spaces=False, skip_special_tokens=False
            )

        (before,) = decode([anchor])
        known = min(size, len(tokenizer))
        special = set(tokenizer.all_special_ids)
        after = decode([[*anchor, i] for i in range(known)])
        self.texts = [
            "" if i in special else text[len(before) :] for i, text in enumerate(after)
        ] + [""] * (size - known)
        self.lengths = torch.tensor([len(text) for text in self.texts])
        self._by_shape: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(self.texts):
            if text:
                self._by_shape[shape_of(text)].append(i)

    def text(self, ids: Sequence[int]) -> str:
        """The text of several tokens; special tokens give none."""
        return "".join(self.texts[i] for i in ids)

    def allowed(self, form: Format, offset: int) -> Tensor:
        """bool `[vocabulary]`: the tokens that may come `offset` characters into a format."""
        mask = torch.zeros(len(self.texts), dtype=torch.bool)
        fitting = [ids for shape, ids in self._by_shape.items() if form.allows(shape, offset)]
        mask[[i for ids in fitting for i in ids]] = True
        return mask

    def masks(self, form: Format) -> Tensor:
        """bool `[positions, vocabulary]`: the allowed tokens at each offset of a format."""
        return torch.stack([self.allowed(form, offset) for offset in range(len(form.positions))])
