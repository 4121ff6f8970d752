"""What the formats of a drafter's file cost in acceptance: teacher-forced greedy tau on held-out documents.

    python tests/measure_formats.py DRAFTER.gguf DOCUMENTS.jsonl

DRAFTER: stored in F16, for the embedded model; DOCUMENTS: `documents.jsonl` of its training. Each row names layers, head,
Markov embedding, second Markov matrix: `dspark convert --format --vocab-format --embedding-format` writes such files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch

from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, target_tables
from dspark_cli.backends.torch.gguf_model import load_gguf_model
from dspark_cli.registry import resolve
from dspark_cli.training.corpus import Corpus, Example
from dspark_cli.training.documents import read_documents
from dspark_cli.training.pipeline import EVALUATED

DOCUMENTS, ANCHORS = 96, 48
ROWS = (
    ("F16", "F16", "F16", "F16"),
    ("Q5_0", "Q8_0", "Q8_0", "Q8_0"),
    ("Q5_0", "Q8_0", "Q5_1", "Q8_0"),
    ("Q8_0", "Q5_0", "Q5_0", "Q8_0"),
    ("Q8_0", "Q5_0", "Q5_0", "Q5_0"),
    ("Q4_0", "Q8_0", "Q4_0", "Q4_0"),
)


def place(name: str) -> int | None:
    """Which of the four formats the weight `name` is stored in; None for what stays F32."""
    if name.startswith(("layers.", "fc.")):
        return 0
    starts = ("lm_head.", "markov_head.markov_w1.", "markov_head.markov_w2.")
    return next((i for i, start in enumerate(starts, start=1) if name.startswith(start)), None)


def store(model: DSpark, formats: tuple[str, ...]) -> None:
    """Round the matrices as a file of these formats would."""
    for name, weight in model.named_parameters():
        at = place(name)
        if at is not None and weight.ndim == 2 and formats[at] != "F16":
            kind = gguf.GGMLQuantizationType[formats[at]]
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
            weight.data.copy_(torch.from_numpy(rounded).view_as(weight))


@torch.inference_mode()
def tau(model: DSpark, examples: list[Example], head: torch.Tensor) -> float:
    """1 + the summed running product of how often each position's best token is the target's, the ones before it given."""
    hits, counts = torch.zeros(model.config.block_size), torch.zeros(model.config.block_size)
    for example in examples:
        output = model.training_forward(example.features, example.ids, example.anchors)
        wanted = example.anchors[0].unsqueeze(-1) + torch.arange(len(hits))
        valid = wanted + 1 < example.lengths[0]
        best = (example.hidden[0] @ head.T).argmax(-1)[wanted.clamp(max=example.ids.shape[1] - 1)]
        hits += ((model.target_ids(output.logits[0].argmax(-1)) == best) & valid).sum(0)
        counts += valid.sum(0)
    return 1.0 + float((hits / counts).cumprod(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("documents", type=Path)
    options = parser.parse_args()
    target = resolve("smollm2-135m").path
    tables = target_tables(target)
    head = (tables.embed_tokens if tables.lm_head is None else tables.lm_head).float()
    held_out = [d for d in read_documents(options.documents) if d.held_out][EVALUATED : EVALUATED + DOCUMENTS]
    examples: list[Example] = []
    for formats in ROWS:
        model = load_gguf_drafter(options.drafter, target).float()
        assert isinstance(model, DSpark)
        if not examples:
            corpus = Corpus.live(
                held_out, load_gguf_model(target), model.config.target_layer_ids, held_out=True, together=1
            )
            examples = list(corpus.examples(corpus.stretches, ANCHORS, np.random.default_rng(0)))
        store(model, formats)
        print(*formats, f"tau {tau(model, examples, head):.3f}", flush=True)


if __name__ == "__main__":
    main()
