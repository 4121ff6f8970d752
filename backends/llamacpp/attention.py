"""Which attention libllama computes. The memory plan and the contexts decide alike, so both ask here. Loads nothing."""

from __future__ import annotations

from dspark_cli.kernels import cpu_kernels

#: words of float weights; passes of several tokens differ from passes of one in the last bits at most
FLOAT_WEIGHTS = ("F32", "F16", "BF16")
#: words of quantized weights whose products kernels/cpu_kernels.c computes with the same bits at any width
STEADY_WEIGHTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
#: KV types that attention without flash can read (libllama refuses a quantized V there)
FLOAT_KV = ("f32", "f16", "bf16")
#: with more sequences in one cache, scores of each with the tokens of all others cost more than flash (docs/measurements.md)
FEW_SEQUENCES = 8
UBATCH = 512
#: rows of a ubatch where scores are written out: half the memory, and prompts run faster than at 512 (docs/measurements.md)
UBATCH_SCORES = 256


def few_sequences(file_format: str) -> int:
    """Up to how many sequences of a target of this format attention on a CPU does without flash; `flash_word` says why."""
    if file_format in FLOAT_WEIGHTS:
        return FEW_SEQUENCES
    return 1 if file_format in STEADY_WEIGHTS and cpu_kernels.complete() else 0


def flash_word(word: str, kv_type: str, on_cpu: bool, n_seq: int, *, few: int) -> str:
    """`auto` decided where it could be measured (docs/measurements.md); a GPU's attention is left to libllama.

    On a CPU libllama's flash attention costs a token of a verify pass nearly as much as a pass of its own from a few
    hundred tokens of context on, and from 256 tokens on other bits than in a pass of one. Without flash attention is two
    matrix products, and kernels/cpu_kernels.c computes those, like the weights', with the same bits at any width: a target
    says exactly what it says when it decodes alone. But those bits depend on where in the cache a token lies, so with
    several sequences on the neighbours; quantizing activations makes some tenths of a logit of that, float weights do not
    mind. Flash takes a sequence's tokens one after the other, wherever they lie.

    few: `few_sequences` of a target's format. A drafter's answers may differ: FEW_SEQUENCES.
    """
    if word == "auto" and on_cpu:
        return "off" if n_seq <= few and kv_type in FLOAT_KV else "on"
    return word


def ubatch_rows(flash: str) -> int:
    """Rows that libllama computes at once, for a word of `flash_word`."""
    return UBATCH_SCORES if flash == "off" else UBATCH


def score_bytes(n_head: int, cached: int, rows: int) -> int:
    """What attention without flash writes of one layer: [n_head, rows, cached tokens of all sequences] float32 scores and
    their float16 copy (it multiplies the values), and a float32 mask [rows, cached].
    """
    return rows * cached * (n_head * (4 + 2) + 4)
