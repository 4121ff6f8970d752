"""Sequential (Markov) heads and the confidence head of DSpark.

A sequential head adds a bias to the base logits of position k that depends on the token drafted at k-1; the first
previous token is the anchor. r = rank, V = target vocabulary, W = draft vocabulary, d = hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_cli.backends.torch.config import BadCheckpoint, DrafterConfig


class MarkovHead(nn.Module):
    """Vanilla: bias = W2 W1[previous token]."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)

    def embed(self, previous: Tensor) -> Tensor:
        """W1 rows [..., r] of token ids [...]."""
        return self.markov_w1(previous)

    def initial_state(self, like: Tensor) -> Tensor:
        """State [N, r] before the first position of a block, for hidden states `like` [N, ...]."""
        return like.new_zeros(len(like), self.rank)

    def latent(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """What W2 multiplies, [..., r], from W1[previous] [..., r] and hidden states [..., d]."""
        del hidden
        return embedding

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position: W1[previous] [N, r], hidden [N, d], state [N, r] -> (what W2 multiplies [N, r], next state)."""
        return self.latent(embedding, hidden), state

    def block_bias(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Teacher forced: W1[previous] [N, B, r], hidden [N, B, d] -> bias [N, B, W]."""
        return self.markov_w2(self.latent(embedding, hidden))


class GatedHead(MarkovHead):
    """Gated: bias = W2 (sigmoid(G [hidden; e] + b) * e) with e = W1[previous token]."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)

    def latent(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedding], dim=-1))) * embedding


class RnnHead(MarkovHead):
    """Recurrent: one projection of [state; e; hidden] gives gate g, candidate c and output o.

    bias = W2 tanh(o); next state = g*state + (1-g)*tanh(c). The output is of the old state.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(config.hidden_size + 2 * self.rank, 3 * self.rank)

    def step(self, embedding: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._advance(embedding, hidden, state)

    def block_bias(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        state, latents = self.initial_state(hidden), []
        for k in range(hidden.shape[1]):
            latent, state = self._advance(embedding[:, k], hidden[:, k], state)
            latents.append(latent)
        return self.markov_w2(torch.stack(latents, dim=1))

    def _advance(self, embedding: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate, output = self.joint_proj(torch.cat([state, embedding, hidden], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """Logit of P(draft accepted | all earlier ones accepted), from [hidden] or [hidden; W1[previous token]]."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head_with_markov
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if self.with_markov else 0), 1)

    def forward(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        """hidden [..., d], embedding [..., r] (not used without Markov) -> logits [...]."""
        if self.with_markov and embedding is not None:
            hidden = torch.cat([hidden, embedding], dim=-1)
        return self.proj(hidden).squeeze(-1)


HEADS: dict[str, type[MarkovHead]] = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RnnHead}


def make_head(config: DrafterConfig) -> MarkovHead | None:
    """The sequential head that `config` names; None for rank 0."""
    if not config.markov_rank:
        return None
    if config.markov_head_type not in HEADS:
        raise BadCheckpoint(f"unknown head type {config.markov_head_type!r} (known: {', '.join(HEADS)})")
    return HEADS[config.markov_head_type](config)
