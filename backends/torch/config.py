"""Everything a torch drafter is built from, in one vocabulary; dialects.py converts what checkpoints say into it."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_cli.backends.base import DsparkError

HEAD_TYPES = ("vanilla", "gated", "rnn")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "proportional")
LAYER_TYPES = ("full_attention", "sliding_attention")


class BadCheckpoint(DsparkError):
    """A drafter checkpoint that cannot be used as it is."""


@dataclass(frozen=True)
class DrafterConfig:
    """Everything a drafter module is built from.

    kind:               dspark, dflash or eagle3
    family:             "qwen3" or "gemma4": how a block is wired (norms, attention scale, shared keys and values)
    hidden_size:        width of the drafter; target_hidden_size is the target's, which the features have
    vocab_size:         the target's vocabulary; draft_vocab_size rows of it have a logit (equal when not reduced)
    block_size:         tokens drafted per round, the anchor not among them (eagle3: steps)
    sample_from_anchor: the anchor's own row drafts the first token; otherwise that row is only context
    target_layer_ids:   0-based decoder layers whose outputs are the features; -1 = the embeddings
    num_target_layers:  layers of the target that the drafter was made for; None if the checkpoint does not say
    sliding_window:     keys a sliding layer sees; causal_sliding: it does not see later rows of its own block
    markov_rank:        0 = no sequential head
    softcap:            logits = softcap * tanh(logits / softcap) before the head's bias; None = off
    qk_norm:            RMSNorm on queries and keys, per head
    norm_before_residual: eagle3 of speculators: the residual is the normed hidden state
    """

    kind: str
    family: str
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int = 0
    sample_from_anchor: bool = True
    num_target_layers: int | None = None
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 4096
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    causal_sliding: bool = False
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    confidence_head: bool = False
    confidence_head_with_markov: bool = False
    embed_scale: float = 1.0
    softcap: float | None = None
    shared_key_value: bool = False
    qk_norm: bool = True
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        for complaint in _complaints(self):
            raise BadCheckpoint(f"drafter config: {complaint}")

    @property
    def gemma(self) -> bool:
        """Gemma4 wiring: sandwich norms, layer_scalar, attention scale 1, RMSNorm without weight on values."""
        return self.family == "gemma4"

    @property
    def reduced(self) -> bool:
        """Whether the drafter has logits for a part of the vocabulary only (then it has a d2t map)."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def block_rows(self) -> int:
        """Rows of one block forward: the drafts, plus the anchor's row when that one does not draft."""
        return self.block_size if self.sample_from_anchor else self.block_size + 1

    @property
    def feature_width(self) -> int:
        """m*d of the features."""
        return len(self.target_layer_ids) * self.target_hidden_size

    def window(self, layer: int) -> int | None:
        """Sliding window of draft layer `layer`; None when it attends to everything."""
        sliding = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


def _complaints(config: DrafterConfig) -> list[str]:
    """What makes `config` unusable, as sentences."""
    found = []
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "block_size")
    found += [f"{name} is {getattr(config, name)}, needs at least 1" for name in sizes if getattr(config, name) < 1]
    if config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads:
        found.append(f"{config.num_heads} query heads do not divide over {config.num_kv_heads} KV heads")
    if config.markov_head_type not in HEAD_TYPES:
        found.append(f"unknown head type {config.markov_head_type!r} (known: {', '.join(HEAD_TYPES)})")
    if config.activation not in ACTIVATIONS:
        found.append(f"unknown activation {config.activation!r} (known: {', '.join(ACTIVATIONS)})")
    if config.rope_type not in ROPE_TYPES:
        found.append(f"unknown rope type {config.rope_type!r} (known: {', '.join(ROPE_TYPES)})")
    if unknown := set(config.layer_types) - set(LAYER_TYPES):
        found.append(f"unknown layer types {sorted(unknown)} (known: {', '.join(LAYER_TYPES)})")
    if config.layer_types and len(config.layer_types) != config.num_layers:
        found.append(f"{len(config.layer_types)} layer_types for {config.num_layers} layers")
    if "sliding_attention" in config.layer_types and (config.gemma or not config.sliding_window):
        found.append("sliding layers need a sliding_window, and a Qwen3-style block")
    if config.confidence_head_with_markov and not config.markov_rank:
        found.append("confidence_head_with_markov needs markov_rank > 0")
    if config.draft_vocab_size > config.vocab_size:
        found.append(f"draft vocabulary {config.draft_vocab_size} is larger than the vocabulary {config.vocab_size}")
    if not 0 <= config.mask_token_id < config.vocab_size:
        found.append(f"mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size}")
    return found + _layer_complaints(config.target_layer_ids, config.num_target_layers)


def _layer_complaints(layers: tuple[int, ...], n_layer: int | None) -> list[str]:
    if not layers:
        return ["target_layer_ids is empty"]
    beyond = [i for i in layers if i < -1 or (n_layer is not None and i >= n_layer)]
    if not beyond:
        return []
    return [f"target_layer_ids {beyond} do not exist (-1 .. {'last' if n_layer is None else n_layer - 1})"]
