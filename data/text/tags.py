"""Captions that are lists of tags: shuffled and dropped anew whenever training takes a picture."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tags:
    """What becomes of a caption's tags in training. Validation takes captions as they are.

    Hardly any caption is then the same twice, so that a cache of encoded captions on disk only grows.

    Args:
        shuffle: puts them in a random order.
        keep: the first so many are neither moved nor dropped, such as a trigger word.
        dropout: the probability with which each of the others is left out.
        separator: of the tags. They are joined again with it and a space.

    Raises:
        ValueError: an argument is out of its range, or nothing would change.

    Example:
        >>> Tags(keep=1, dropout=0.5)("cat, black,asleep, indoors", np.random.default_rng(0))
        'cat, indoors, asleep'
    """

    shuffle: bool = True
    keep: int = 1
    dropout: float = 0.0
    separator: str = ","

    def __post_init__(self) -> None:
        if self.keep < 0 or not 0 <= self.dropout <= 1 or not self.separator:
            raise ValueError("data.tags needs keep of at least 0, dropout from 0 to 1 and a separator, got "
                             f"{self.keep}, {self.dropout} and {self.separator!r}")  # fmt: skip
        if not self.shuffle and not self.dropout:
            raise ValueError("data.tags neither shuffles nor drops: leave it out")

    def __call__(self, caption: str, draw: np.random.Generator) -> str:
        """A caption's tags as training takes them this time; the empty caption if all are left out."""
        tags = [tag.strip() for tag in caption.split(self.separator) if tag.strip()]
        first, rest = tags[: self.keep], tags[self.keep :]
        places, chances = draw.random((2, len(rest)))
        order = np.argsort(places, kind="stable") if self.shuffle else np.arange(len(rest))
        return f"{self.separator.strip()} ".join([*first, *(rest[i] for i in order if chances[i] >= self.dropout)])
