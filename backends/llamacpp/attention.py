"""Which attention libllama computes. The memory plan and the contexts decide alike, so both ask here. Loads nothing."""

from __future__ import annotations

from dspark_cli.backends.llamacpp.quants import QUANTS

#: general.file_type of float weights -> the word for it
FLOAT_WEIGHTS = {QUANTS[word]: word for word in ("F32", "F16", "BF16")}
#: KV types that attention without flash can read (libllama refuses a quantized V there)
FLOAT_KV = ("f32", "f16", "bf16")
#: with more sequences in one cache, scores of each with the tokens of all others cost more than flash (docs/bench.md)
FEW_SEQUENCES = 8
UBATCH = 512
#: rows of a ubatch where scores are written out: half the memory, and prompts run faster than at 512 (docs/bench.md)
UBATCH_SCORES = 256


def flash_word(word: str, kv_type: str, on_cpu: bool, n_seq: int, *, quantized: bool) -> str:
    """`auto` decided where it could be measured (docs/bench.md); a GPU's attention is left to libllama.

    On a CPU libllama's flash attention costs a token of a verify pass nearly as much as a pass of its own from a few
    hundred tokens of context on. But on one thread, or up to 256 tokens of context, it gives the same bits whatever the
    width of the pass, and so do matrix products of most quantized weights: there a target says exactly what it says when
    it decodes alone. Without flash it never does: last bits differ, quantizing the activations makes that 0.2 logits, and
    3 % of the tokens are near-ties. Float weights differ in the last bits anyway, and by as little without flash.

    quantized: the weights are, and the answer must not depend on it: a target. A drafter's answers may.
    """
    if word == "auto" and on_cpu:
        return "on" if quantized or kv_type not in FLOAT_KV or n_seq > FEW_SEQUENCES else "off"
    return word


def ubatch_rows(flash: str) -> int:
    """Rows that libllama computes at once, for a word of `flash_word`."""
    return UBATCH_SCORES if flash == "off" else UBATCH


def score_bytes(n_head: int, cached: int, rows: int) -> int:
    """What attention without flash writes of one layer: [n_head, rows, cached tokens of all sequences] float32 scores and
    their float16 copy (it multiplies the values), and a float32 mask [rows, cached].
    """
    return rows * cached * (n_head * (4 + 2) + 4)
