"""Formats that the gguf package writes by itself. Imports nothing heavy: commands check what was typed against it."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_cli.backends.errors import BadInput

#: what a drafter's matrix may be stored as -> number in general.file_type
QUANTS = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2}
#: general.file_type -> its word, as far as we must know it before gguf is loaded
FILE_TYPES = {number: word for word, number in QUANTS.items()} | {
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
}


@dataclass(frozen=True)
class Formats:
    """How the matrices of a drafter's GGUF are stored; norms and the confidence head stay F32.

    layers:     decoder layers and the fusion of features
    vocabulary: rows of the draft vocabulary (output head, second Markov matrix); "" = as `layers`
    embedding:  the Markov embedding, a row for every token of the target; "" = as `vocabulary`

    Raises BadInput for a format that the gguf package does not write.
    """

    layers: str = "F16"
    vocabulary: str = ""
    embedding: str = ""

    def __post_init__(self) -> None:
        for word in filter(None, (self.layers, self.vocabulary, self.embedding)):
            if word not in QUANTS:
                raise BadInput(f"unknown format {word!r}: one of {', '.join(QUANTS)}")

    def of(self, name: str) -> str:
        """The format of the tensor `name`, as the file calls it."""
        vocabulary = self.vocabulary or self.layers
        if name == "markov_w1.weight":
            return self.embedding or vocabulary
        return vocabulary if name in ("markov_w2.weight", "output.weight") else self.layers


HALF = Formats()
