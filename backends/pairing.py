"""Does this drafter belong to this target? Every check of a pair, from headers and configs, before weights are loaded.

A wrong pair loads without complaint and is never right, so each check names what was found and what is needed. Backends
translate what they read into `DrafterFacts` and `TargetFacts`; token texts are compared where the tokenizers are
(`llamacpp.model.tokens_agree`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspark_cli.backends.base import DsparkError, PairMismatch

if TYPE_CHECKING:
    from dspark_cli.backends.llamacpp.header import Header, TensorInfo

#: llama.cpp's own limit for rows that only pad a vocabulary
PADDING = 128
#: rows of a block beyond which no published drafter goes (16), with room
LARGEST_BLOCK = 64
#: bytes of one tensor whose values are looked at: all of a norm, evenly spread rows of a matrix
LOOKED_AT = 1 << 20
HINT = "--drafter lookup, or a drafter trained for this target"


@dataclass(frozen=True)
class TargetFacts:
    """last_layer: the deepest decoder layer (0-based) whose output the backend can hand out."""

    name: str
    n_vocab: int
    n_embd: int
    n_layer: int
    last_layer: int
    rope_theta: float | None = None
    has_template: bool = True


@dataclass(frozen=True)
class DrafterFacts:
    """What a drafter says about itself.

    n_embd:      width of the target's hidden states that it reads
    layers:      decoder layers whose outputs it reads (0-based; -1 = embeddings)
    made_for:    layers of the target it was made for; None if it does not say
    block_size:  drafts per round; rows: of a block pass, one more where the anchor's row does not draft
    borrows:     it has no output head of its own; reduced: it has logits for a part of the vocabulary
    quant:       format of most of its bytes; "" where nobody asks
    """

    name: str
    kind: str
    n_vocab: int
    n_embd: int
    layers: tuple[int, ...]
    block_size: int
    rows: int
    made_for: int | None = None
    mask: int | None = None
    rope_theta: float | None = None
    rope_width: int | None = None
    head_dim: int | None = None
    markov: bool = False
    confidence: bool = False
    borrows: bool = False
    reduced: bool = False
    format: str = ""
    quant: str = ""


@dataclass(frozen=True)
class Finding:
    """One check. problem: why it fails; None when it holds."""

    name: str
    found: str
    problem: str | None = None


def findings(drafter: DrafterFacts, target: TargetFacts, *, same_tokens: bool = True) -> Iterator[Finding]:
    """Every check of sizes and conventions, in the order in which they explain most.

    same_tokens: token texts are compared elsewhere, so vocabularies may differ by padding.
    """
    d, t = drafter, target
    wrong = f"it reads hidden states of {d.n_embd}, the target has {t.n_embd}" if d.n_embd != t.n_embd else None
    yield Finding("hidden size", str(d.n_embd), wrong)
    yield Finding("target layers", ", ".join(map(str, d.layers)), _layers(d, t))
    yield Finding("vocabulary", f"{d.n_vocab} (target {t.n_vocab})", _vocabulary(d, t, same_tokens))
    yield Finding("block", f"{d.block_size} drafts, {d.rows} rows", _block(d))
    if d.kind != "eagle3":
        outside = d.mask is not None and not 0 <= d.mask < d.n_vocab
        missing = "it names no mask token (tokenizer.ggml.mask_token_id)" if d.mask is None else None
        far = f"its mask token {d.mask} is outside its vocabulary of {d.n_vocab}" if outside else None
        yield Finding("mask token", str(d.mask), missing or far)
    yield Finding("rope", f"base {d.rope_theta}, target {t.rope_theta}", _rope(d))
    # whether a checkpoint has an output head of its own is seen when its weights are read
    own = ", own output" if d.format == "gguf" and not d.borrows else ""
    yield Finding("head", ("Markov" if d.markov else "no Markov head") + own, _head(d, t))
    yield Finding("confidence head", "present" if d.confidence else "absent: the schedule uses token probabilities")
    if d.quant:
        coarse = d.quant.startswith(("Q2", "Q3", "IQ1", "IQ2", "IQ3", "TQ"))
        yield Finding("quant", d.quant + (": below 4 bits a weight, expect fewer accepted tokens" if coarse else ""))


def _layers(d: DrafterFacts, t: TargetFacts) -> str | None:
    if not d.layers:
        return "it reads no layer of the target"
    beyond = [layer for layer in d.layers if not -1 <= layer <= t.last_layer]
    if beyond:
        return f"it reads the output of layer {beyond[0]}, the target has usable layers -1 to {t.last_layer}"
    if d.made_for is not None and d.made_for != t.n_layer:
        return f"it is for a target of {d.made_for} layers, this one has {t.n_layer}"
    if len(set(d.layers)) < len(d.layers):
        return f"it reads a layer twice: {list(d.layers)}"
    return None


def _vocabulary(d: DrafterFacts, t: TargetFacts, same_tokens: bool) -> str | None:
    apart = abs(d.n_vocab - t.n_vocab)
    if apart > (PADDING if same_tokens else 0):
        return f"vocabulary of {d.n_vocab} tokens, the target has {t.n_vocab}"
    return None


def _block(d: DrafterFacts) -> str | None:
    if d.block_size < 1:
        return f"a block of {d.rows} rows drafts nothing when the anchor's row is only context"
    if d.rows > LARGEST_BLOCK:
        return f"a block of {d.rows} rows, at most {LARGEST_BLOCK} make sense"
    return None


def _rope(d: DrafterFacts) -> str | None:
    if d.rope_theta is not None and not (math.isfinite(d.rope_theta) and d.rope_theta > 1):
        return f"a RoPE base of {d.rope_theta}"
    if d.rope_width is not None and d.head_dim is not None and (d.rope_width > d.head_dim or d.rope_width % 2):
        return f"RoPE over {d.rope_width} of {d.head_dim} dimensions"
    return None


def _head(d: DrafterFacts, t: TargetFacts) -> str | None:
    if d.reduced and d.borrows:
        return "it has a reduced vocabulary (d2t) but no output head of its own"
    if d.borrows and d.format == "gguf" and d.n_vocab != t.n_vocab:
        return (
            f"it borrows the output head of {t.name}, which has {t.n_vocab} tokens; "
            f"the drafter's vocabulary has {d.n_vocab}"
        )
    if d.confidence and not d.markov and d.format == "gguf":
        return "it has a confidence head without a Markov head, which libllama cannot run"
    return None


def check(drafter: DrafterFacts, target: TargetFacts, *, same_tokens: bool = True) -> None:
    """Raise PairMismatch with the first thing that does not fit."""
    for finding in findings(drafter, target, same_tokens=same_tokens):
        if finding.problem:
            raise refusal(drafter.name, target.name, finding.problem)


def refusal(drafter: str, target: str, reason: str) -> PairMismatch:
    return PairMismatch(f"{drafter} is not a drafter for {target}: {reason}", hint=HINT)


def check_published(drafter: DrafterFacts, block_size: int | None) -> None:
    """Compare with what the card says: a block that is off by one means that the anchor was counted on one side only."""
    if block_size is None or drafter.block_size == block_size:
        return
    anchor = ": one of them counts the anchor" if abs(drafter.block_size - block_size) == 1 else ""
    raise PairMismatch(
        f"{drafter.name} drafts {drafter.block_size} tokens a round, its card says {block_size}{anchor}",
        hint="`dspark pull` it again, or convert it again from its checkpoint",
    )


def cautions(
    target: TargetFacts,
    *,
    trained_thinking: str | None = None,
    thinking: bool | None = None,
    switch: bool = False,
    chat: bool = True,
) -> list[str]:
    """What may make a fitting drafter draft badly.

    trained_thinking: "on", "off" or "both", as the registry knows; thinking: what the chat asks for, None leaves it to the
    template, which may have the switch
    """
    found = []
    if trained_thinking in ("on", "off") and thinking is None and switch:
        found.append(
            f"the drafter was trained on answers with thinking {trained_thinking}, and this chat leaves it to the model's "
            f"template: {'--thinking' if trained_thinking == 'on' else '--no-thinking'} makes sure of it"
        )
    if trained_thinking in ("on", "off") and thinking is not None and thinking != (trained_thinking == "on"):
        asked, flag = ("with", "--no-thinking") if thinking else ("without", "--thinking")
        found.append(
            f"the drafter was trained on answers with thinking {trained_thinking}, and this chat asks for answers {asked} "
            f"thinking: expect fewer accepted tokens ({flag} matches it)"
        )
    if chat and not target.has_template:
        found.append(f"{target.name} has no chat template: drafter and target see text they were not trained on")
    return found


# -- GGUF --------------------------------------------------------------------------------------------------------------


def gguf_target(header: Header, name: str) -> TargetFacts:
    """Facts of a GGUF target. libllama hands out the *inputs* of layers, so the last layer's output is out of reach."""
    n_layer = int(header.of_model("block_count", 0))
    embedding = header.tensors.get("token_embd.weight")
    return TargetFacts(
        name=name,
        n_vocab=header.counts.get("tokenizer.ggml.tokens") or (embedding.shape[0] if embedding else 0),
        n_embd=int(header.of_model("embedding_length", 0)),
        n_layer=n_layer,
        last_layer=n_layer - 2,
        rope_theta=header.of_model("rope.freq_base"),
        has_template="tokenizer.chat_template" in header.metadata,
    )


def gguf_drafter(header: Header, path: Path, target: TargetFacts) -> DrafterFacts:
    """Facts of a `dflash` GGUF. Raises PairMismatch for another architecture and for tensors that are missing or misshapen."""
    if header.architecture != "dflash":
        raise refusal(path.name, target.name, f"its architecture is {header.architecture!r}, not 'dflash'")
    markov = "markov_w1.weight" in header.tensors
    # Unless the file says otherwise, DSpark predicts at the anchor's slot and DFlash (z-lab) does not.
    anchored = bool(header.of_model("sample_from_anchor", markov))
    rows = int(header.of_model("block_size", 16))
    head_dim = header.of_model("attention.key_length")
    return DrafterFacts(
        name=path.name,
        kind="dspark" if markov else "dflash",
        n_vocab=header.counts.get("tokenizer.ggml.tokens", 0),
        n_embd=int(header.of_model("embedding_length", 0)),
        layers=tuple(int(layer) - 1 for layer in header.of_model("target_layers", [])),
        block_size=rows - (not anchored),
        rows=rows,
        mask=header.metadata.get("tokenizer.ggml.mask_token_id"),
        rope_theta=header.of_model("rope.freq_base"),
        rope_width=header.of_model("rope.dimension_count"),
        head_dim=int(head_dim) if head_dim else None,
        markov=markov,
        confidence="conf_proj.weight" in header.tensors,
        borrows="output.weight" not in header.tensors,
        reduced="d2t" in header.tensors,
        format="gguf",
        quant=main_quant(header),
    )


def main_quant(header: Header) -> str:
    """The format that most of a file's bytes are in, as ggml names it ("Q8_0")."""
    import gguf

    share: dict[int, int] = {}
    for info in header.tensors.values():
        share[info.kind] = share.get(info.kind, 0) + info.n_bytes
    return gguf.GGMLQuantizationType(max(share, key=lambda kind: share[kind])).name if share else ""


def gguf_findings(path: Path, target: TargetFacts) -> Iterator[Finding]:
    """Everything about a drafter GGUF that can be said without loading it, good or bad. For `doctor`."""
    from dspark_cli.backends.llamacpp.header import read_header

    header = read_header(path)
    facts = gguf_drafter(header, path, target)
    yield from findings(facts, target)
    problem = None
    try:
        _check_tensors(header, facts, path, target)
        _check_values(header, path)
    except DsparkError as error:
        problem = str(error)
    yield Finding("tensors", f"names, shapes, norms and values of {len(header.tensors)}", problem)


def check_gguf(path: Path, target: TargetFacts) -> DrafterFacts:
    """Everything about a drafter GGUF that can be said without loading it. Raises PairMismatch or DsparkError."""
    from dspark_cli.backends.gguf_file import check_file
    from dspark_cli.backends.llamacpp.header import read_header

    header = read_header(check_file(path))
    facts = gguf_drafter(header, path, target)
    check(facts, target)
    _check_tensors(header, facts, path, target)
    _check_values(header, path)
    return facts


def _check_tensors(header: Header, facts: DrafterFacts, path: Path, target: TargetFacts) -> None:
    """Presence and shape of what libllama would abort on, or misread."""
    d, n_layer = facts.n_embd, int(header.of_model("block_count", 0))
    if bool(header.of_model("has_confidence_head", facts.confidence)) != facts.confidence:
        raise refusal(path.name, target.name, "its header and its tensors disagree about a confidence head")
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, d * len(facts.layers)),
        "enc.output_norm.weight": (d,),
        "output_norm.weight": (d,),
    }
    for layer in range(n_layer):
        shapes |= {f"blk.{layer}.{name}.weight": (d,) for name in ("attn_norm", "ffn_norm")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{layer}.{name}.weight"] = ()
    logits = header.tensors["d2t"].shape[0] if facts.reduced else facts.n_vocab
    if facts.markov:
        rank = header.tensors["markov_w1.weight"].shape[-1]
        shapes |= {"markov_w1.weight": (facts.n_vocab, rank), "markov_w2.weight": (logits, rank)}
    if not facts.borrows:
        shapes["output.weight"] = (logits, d)
    if n_layer < 1:
        raise refusal(path.name, target.name, "it has no layers")
    for name, shape in shapes.items():
        if name not in header.tensors:
            raise refusal(path.name, target.name, f"the tensor {name} is missing")
        if shape and header.tensors[name].shape != shape:
            found = "x".join(map(str, header.tensors[name].shape))
            raise refusal(path.name, target.name, f"{name} is {found}, needs {'x'.join(map(str, shape))}")


def _check_values(header: Header, path: Path) -> None:
    """NaN or infinity anywhere that is looked at, and norms as they were before training."""
    ones = []
    for name, info in header.tensors.items():
        values = _sample(path, info)
        if values is None:
            continue
        if not np.isfinite(values).all():
            raise PairMismatch(f"{path.name}: NaN or infinite values in {name}", hint="download or convert it again")
        if len(info.shape) == 1 and name.endswith("norm.weight") and bool((values == 1).all()):
            ones.append(name)
    if ones:
        raise PairMismatch(
            f"{path.name}: norm weights are all ones, as before training: {', '.join(ones[:3])}"
            + (f" and {len(ones) - 3} more" if len(ones) > 3 else ""),
            hint="export it again from a trained checkpoint",
        )


def _sample(path: Path, info: TensorInfo) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    """Values of a small tensor, or of rows spread over a large one; None for integers."""
    import gguf

    from dspark_cli.backends.llamacpp.header import read_tensor

    kind = gguf.GGMLQuantizationType(info.kind)
    if kind.name.startswith("I") and not kind.name.startswith("IQ"):
        return None
    if info.n_bytes <= LOOKED_AT or len(info.shape) != 2:
        return np.asarray(read_tensor(path, info))
    row_bytes = info.n_bytes // info.shape[0]
    step = -(-info.n_bytes // LOOKED_AT)
    each = [info.offset + row * row_bytes for row in range(0, info.shape[0], step)]
    one = (1, info.shape[1])
    return np.concatenate([read_tensor(path, replace(info, shape=one, offset=offset)) for offset in each])
