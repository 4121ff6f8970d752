"""`dflash` GGUF files and torch drafters: the same weights both ways.

libllama runs such a file by itself; run by torch beside the same GGUF target it works on rows of the draft vocabulary
only, which on a CPU costs a fraction of the time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.llamacpp.export import DrafterSpec, gguf_names, write_drafter_gguf
from dspark_cli.backends.llamacpp.header import Header, read_header, read_tensor
from dspark_cli.backends.llamacpp.quants import HALF, Formats
from dspark_cli.backends.pairing import TargetFacts, check_gguf, gguf_target
from dspark_cli.backends.torch.checkpoint import TargetTables, assemble
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3


def target_tables(path: Path) -> TargetTables:
    """Embedding and output head of a GGUF target, dequantized to float32."""
    tensors = read_header(path).tensors
    if "token_embd.weight" not in tensors:
        raise DsparkError(f"{path.name} has no token_embd.weight: it is not the file of a target")
    tables = [
        torch.from_numpy(read_tensor(path, tensors[n])) for n in ("token_embd.weight", "output.weight") if n in tensors
    ]
    return TargetTables(*tables)


def target_norm(path: Path) -> Tensor:
    """float32 [d]: the weight of a GGUF target's final norm."""
    return torch.from_numpy(read_tensor(path, read_header(path).tensors["output_norm.weight"]))


def load_gguf_drafter(
    path: Path,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    facts: TargetFacts | None = None,
) -> DSpark | Eagle3:
    """The drafter of `path` for the target GGUF `target`, whose embedding (and head, if it brings none) it borrows.

    Raises PairMismatch for a drafter of another target or with broken weights.
    """
    check_gguf(path, facts or gguf_target(read_header(target), target.name))
    header = read_header(path)
    config = config_of(header, gguf_target(read_header(target), target.name).n_vocab)
    names = {theirs: ours for ours, theirs in gguf_names(spec_of(config)).items()}
    weights = {
        names[name]: torch.from_numpy(read_tensor(path, info)) for name, info in header.tensors.items() if name in names
    }
    return assemble(config, weights, path, tables=target_tables(target), dtype=dtype, device=device)


def config_of(header: Header, n_vocab: int) -> DrafterConfig:
    """What the metadata of a `dflash` GGUF says; the vocabulary is the target's."""
    tensors, value = header.tensors, header.of_model
    markov = "markov_w1.weight" in tensors
    anchored = bool(value("sample_from_anchor", markov))
    hidden, heads = int(value("embedding_length")), int(value("attention.head_count"))
    return DrafterConfig(
        kind="dspark" if markov else "dflash",
        family="qwen3",
        hidden_size=hidden,
        target_hidden_size=hidden,
        intermediate_size=int(value("feed_forward_length")),
        num_layers=int(value("block_count")),
        num_heads=heads,
        num_kv_heads=int(value("attention.head_count_kv", heads)),
        head_dim=int(value("attention.key_length", hidden // heads)),
        vocab_size=n_vocab,
        draft_vocab_size=tensors["d2t"].shape[0] if "d2t" in tensors else n_vocab,
        block_size=int(value("block_size")) - (not anchored),
        sample_from_anchor=anchored,
        target_layer_ids=tuple(int(layer) - 1 for layer in value("target_layers")),
        mask_token_id=int(header.metadata["tokenizer.ggml.mask_token_id"]),
        rms_norm_eps=float(value("attention.layer_norm_rms_epsilon", 1e-6)),
        rope_theta=float(value("rope.freq_base", 10000.0)),
        max_position_embeddings=int(value("context_length", 4096)),
        markov_rank=tensors["markov_w1.weight"].shape[-1] if markov else 0,
        confidence_head="conf_proj.weight" in tensors,
        confidence_head_with_markov="conf_proj.weight" in tensors,
    )


def spec_of(config: DrafterConfig, name: str = "drafter") -> DrafterSpec:
    """The same drafter in the words of the GGUF writer. Raises DsparkError for what libllama's graph cannot run."""
    for wrong, what in (
        (config.kind == "eagle3", "an Eagle3 drafter"),
        (config.gemma, "a Gemma4-style block"),
        (bool(config.markov_rank) and config.markov_head_type != "vanilla", f"a {config.markov_head_type} head"),
        (config.softcap is not None, "logit softcapping"),
        (config.attention_bias or not config.qk_norm, "attention with biases or without norms on queries and keys"),
        (config.sliding_window is not None, "sliding attention"),
    ):
        if wrong:
            raise DsparkError(f"{what} has no form as a GGUF drafter", hint="keep it as a safetensors folder")
    return DrafterSpec(
        block_size=config.block_size,
        target_layers=config.target_layer_ids,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_head_kv=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        mask_token_id=config.mask_token_id,
        rms_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        sample_from_anchor=config.sample_from_anchor,
        markov_rank=config.markov_rank,
        confidence=config.confidence_head,
        draft_vocab=config.draft_vocab_size if config.reduced else None,
        name=name,
    )


def save_gguf_drafter(model: DSpark | Eagle3, path: Path, target: Path, formats: Formats = HALF) -> Path:
    """Write `model` as a GGUF for `target`."""
    spec = spec_of(model.config, path.stem)
    tensors = {key: np.asarray(value.detach().cpu()) for key, value in model.float().state_dict().items()}
    return write_drafter_gguf(path, tensors, spec, target, formats=formats)
