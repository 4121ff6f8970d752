"""DSpark and DFlash: one parallel pass drafts a block from the target's features.

The target's hidden states are fused once into one row a position; every layer turns that row into keys and values of
its own. A block is [anchor, mask, mask, ...]: its rows attend to all context rows and to each other, both ways. A
sequential head then adds, left to right, a bias that depends on the token before. DFlash is the same without that head.

Shapes: N = sequences, S = context rows, R = rows of a block, B = block_size, A = anchors of a document, m*d = width of
the features, d = hidden size, V / W = target / draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dspark_cli.backends.torch.anchors import (
    TrainingOutput,
    block_positions,
    previous_tokens,
    training_attends,
)
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.heads import ConfidenceHead, make_head
from dspark_cli.backends.torch.layers import (
    Attend,
    DecoderLayer,
    RMSNorm,
    Rope,
    Rotary,
    TokenEmbedding,
    softcapped,
)
from dspark_cli.kernels.markov_step import markov_step

#: position in the block, corrected logits [N, W] -> chosen tokens int64 [N], as target ids
Pick = Callable[[int, Tensor], Tensor]


class DSpark(nn.Module):
    """The drafter's weights, under the names of the published checkpoints, and its forward passes."""

    d2t: Tensor | None

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_tokens = TokenEmbedding(config)
        self.fc = nn.Linear(config.feature_width, d, bias=False)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.draft_vocab_size, bias=False)
        self.markov_head = make_head(config)
        self.confidence_head = ConfidenceHead(config) if config.confidence_head else None
        self.rotary = Rotary(config)
        self.register_buffer("d2t", torch.arange(config.draft_vocab_size) if config.reduced else None)

    def fuse(self, features: Tensor) -> Tensor:
        """One row [..., d] of the target's hidden states [..., m*d]."""
        return self.hidden_norm(self.fc(features))

    def context_keys_values(self, fused: Tensor, rope: Rope) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [N, S, K, D] of every layer; `fused` [N, S, d] skips the layers' input norm."""
        return (layer.self_attn.keys_values(fused, rope) for layer in self.layers)

    def block(self, ids: Tensor, rope: Rope, attends: Sequence[Attend]) -> Tensor:
        """Block rows ids [N, R] through the layers -> [N, R, d] after the final norm."""
        hidden = self.embed_tokens(ids)
        for layer, attend in zip(self.layers, attends, strict=True):
            hidden = layer(hidden, rope, attend)
        return self.norm(hidden)

    def drafting_rows(self, hidden: Tensor) -> Tensor:
        """The rows of a block that draft, from [..., R, d]: all, or all but the anchor's."""
        return hidden if self.config.sample_from_anchor else hidden[..., 1:, :]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., W] of hidden states [..., d] after the final norm, before any bias."""
        return softcapped(self.lm_head(hidden), self.config.softcap)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft-vocabulary ids as target ids."""
        return draft_ids if self.d2t is None else self.d2t[draft_ids]

    def chain(
        self, hidden: Tensor, anchors: Tensor, length: int, pick: Pick | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Choose `length` tokens left to right from hidden [N, B, d], starting after `anchors` [N].

        Returns tokens [N, length] as target ids and confidence logits [N, length]. `pick` None takes the best token.
        """
        # Whole again: of a strided view torch multiplies every block by itself, and reads the head for each.
        hidden = hidden[:, :length].contiguous()
        base = self.base_logits(hidden)
        state = self.markov_head.initial_state(hidden) if self.markov_head else None
        previous, tokens, embeddings = anchors, [], []
        for k in range(length):
            if self.markov_head is None or state is None:
                previous = self._choose(k, base[:, k], pick)
            else:
                embedding = self.markov_head.embed(previous)
                latent, state = self.markov_head.step(embedding, hidden[:, k], state)
                previous = self._choose_corrected(k, base[:, k], latent, self.markov_head.markov_w2, pick)
                embeddings.append(embedding)
            tokens.append(previous)
        return torch.stack(tokens, dim=1), self._confidence(hidden, torch.stack(embeddings, 1) if embeddings else None)

    def _choose(self, k: int, logits: Tensor, pick: Pick | None) -> Tensor:
        """Target ids [N] of logits [N, W] at position k."""
        return self.target_ids(logits.argmax(dim=-1)) if pick is None else pick(k, logits)

    def _choose_corrected(self, k: int, base: Tensor, latent: Tensor, w2: nn.Linear, pick: Pick | None) -> Tensor:
        """The same from base logits [N, W] and what W2 [W, r] multiplies [N, r]; the best token without a pass over logits."""
        if pick is not None:
            return pick(k, base + w2(latent))
        return self.target_ids(markov_step(base, latent, w2.weight)[0])

    def _confidence(self, hidden: Tensor, embedding: Tensor | None) -> Tensor | None:
        """Confidence logits [...] of hidden [..., d] and W1[previous] [..., r]."""
        return None if self.confidence_head is None else self.confidence_head(hidden, embedding)

    def training_forward(
        self,
        features: Tensor,
        input_ids: Tensor,
        anchor_positions: Tensor,
        keep: Tensor | None = None,
        *,
        rows: int | None = None,
    ) -> TrainingOutput:
        """Teacher-forced logits of A blocks a document; all blocks share the document's context keys.

        features [N, S, m*d], input_ids [N, S], anchor_positions [N, A]; keep: bool [N, A], False = dummy block.
        rows: shorter blocks than the configured ones, to train the first positions cheaply.
        A block sees context rows before its anchor and itself, nothing else. It may reach past the document's end.
        """
        rows = rows or self.config.block_rows
        keep = torch.ones_like(anchor_positions, dtype=torch.bool) if keep is None else keep
        positions = block_positions(anchor_positions, rows)
        attends = self._training_attends(features, positions, rows)
        ids = torch.full_like(positions, self.config.mask_token_id)
        ids[..., 0] = torch.where(keep, input_ids.gather(1, anchor_positions), self.config.mask_token_id)
        flat = positions.flatten(1)
        rope = self.rotary(flat, features.shape[1] + rows)
        hidden = self.block(ids.flatten(1), rope, attends).unflatten(1, (-1, rows))
        return self._training_heads(self.drafting_rows(hidden), input_ids, anchor_positions, keep)

    def _training_attends(self, features: Tensor, positions: Tensor, rows: int) -> list[Attend]:
        context_rope = self.rotary.span(0, features.shape[1])
        context = self.context_keys_values(self.fuse(features), context_rope)
        windows = [self.config.window(i) for i in range(self.config.num_layers)]
        scale = self.layers[0].self_attn.scale
        return training_attends(list(context), positions, scale, windows, causal=self.config.causal_sliding)

    def _training_heads(self, hidden: Tensor, input_ids: Tensor, anchors: Tensor, keep: Tensor) -> TrainingOutput:
        logits = self.base_logits(hidden)
        embedding = None
        if self.markov_head is not None:
            embedding = self.markov_head.embed(previous_tokens(input_ids, anchors, keep, hidden.shape[2]))
            bias = self.markov_head.block_bias(embedding.flatten(0, 1), hidden.flatten(0, 1))
            logits = logits + bias.view_as(logits)
        return TrainingOutput(logits, self._confidence(hidden, embedding), hidden)
