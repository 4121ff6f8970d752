"""Eagle3: one decoder layer that drafts token by token from the target's fused features.

Pair i is (feature i, token i+1) at position i. Its hidden state proposes token i+2; while drafting, the layer's own
output takes the place of the feature. With one layer a pair's keys and values depend on nothing but the pair, so
extending the cache needs no attention.

Shapes: N = sequences, L = pairs, m*d = width of the features, d = hidden size, W = draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_cli.backends.torch.anchors import ChainAttend, TrainingOutput
from dspark_cli.backends.torch.config import BadCheckpoint, DrafterConfig
from dspark_cli.backends.torch.layers import (
    Attend,
    DecoderLayer,
    RMSNorm,
    Rope,
    Rotary,
    TokenEmbedding,
    softcapped,
)


class Eagle3Layer(DecoderLayer):
    """A decoder layer that attends from [normed embedding; normed hidden]; the residual is the hidden state."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config, in_features=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def keys_values(self, embedded: Tensor, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [N, L, K, D] of pairs embedded, hidden [N, L, d]."""
        return self.self_attn.keys_values(self._joined(embedded, hidden)[0], rope)

    def pairs(self, embedded: Tensor, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Pairs embedded, hidden [N, L, d] -> hidden states [N, L, d]."""
        joined, residual = self._joined(embedded, hidden)
        return self.after_attention(residual, self.self_attn(joined, rope, attend))

    def _joined(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(hidden)
        joined = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        return joined, normed if self.norm_before_residual else hidden


class Eagle3(nn.Module):
    """The drafter's weights, under the names of the published checkpoints, and its forward passes."""

    d2t: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise BadCheckpoint(f"an Eagle3 drafter has one layer, this one {config.num_layers}")
        self.config = config
        d = config.hidden_size
        self.embed_tokens = TokenEmbedding(config)
        self.fc = nn.Linear(config.feature_width, d, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.draft_vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size) if config.reduced else None)

    @property
    def layer(self) -> Eagle3Layer:
        return self.layers[0]  # type: ignore[return-value]

    def fuse(self, features: Tensor) -> Tensor:
        """One row [..., d] of the target's hidden states [..., m*d]."""
        return self.fc(features)

    def keys_values(self, ids: Tensor, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What the cache holds of pairs ids [N, L], hidden [N, L, d]."""
        return self.layer.keys_values(self.embed_tokens(ids), hidden, rope)

    def forward(self, ids: Tensor, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Pairs ids [N, L], hidden [N, L, d] -> hidden states [N, L, d] before the final norm."""
        return self.layer.pairs(self.embed_tokens(ids), hidden, rope, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., W] of hidden states [..., d] before the final norm."""
        return softcapped(self.lm_head(self.norm(hidden)), self.config.softcap)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft-vocabulary ids as target ids."""
        return draft_ids if self.d2t is None else self.d2t[draft_ids]

    def training_forward(
        self, features: Tensor, input_ids: Tensor, anchor_positions: Tensor, *, rows: int | None = None
    ) -> TrainingOutput:
        """Teacher-forced logits of chains that start at A anchors a document, each step from the step before.

        features [N, S, m*d], input_ids [N, S], anchor_positions [N, A] (at least 1); rows: steps, the configured ones by
        default. A chain sees the true pairs before its own first one, and itself.
        """
        steps = rows or self.config.block_size
        fused = self.fuse(features)
        following = input_ids.roll(-1, dims=1)  # the last pair of a document has no token yet, and no chain reads it
        keys, values = self.keys_values(following, fused, self.rotary.span(0, fused.shape[1]))
        first = anchor_positions - 1  # pair i holds token i + 1: the anchor's own pair
        attend = ChainAttend(keys, values, first, self.layer.self_attn.scale)
        batch = torch.arange(len(fused), device=fused.device).unsqueeze(1)
        hidden, states = fused[batch, first], []
        last = input_ids.shape[1] - 1
        for k in range(steps):
            ids = input_ids.gather(1, (anchor_positions + k).clamp(max=last))
            rope = self.rotary(first + k, input_ids.shape[1] + steps)
            hidden = self(ids, hidden, rope, attend)
            states.append(hidden)
        stacked = torch.stack(states, dim=2)
        return TrainingOutput(self.logits(stacked), None, stacked)
