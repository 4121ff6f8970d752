"""Where training begins: weights that already do something, made from the target and from word pairs.

Recency: a fresh drafter must first find out that the newest context row is the one that matters. So most heads of the
first layer begin with a preference for it, and pass it on whole: one constant direction of queries and keys (on the
quickest rotary pairs, which tell neighbours apart) lights up for context rows and not for the block's own.
Pairs: the sequential head begins as the best low-rank approximation of which token follows which.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.training.corpus import Corpus

SHARPNESS = 2.0  # of the newest row's score: norm weights of queries and keys
NEWEST_SHARE = 2 / 3  # of the heads of the first layer
QUICK_PAIRS = 8  # rotary pairs that carry the preference
OTHER_LAYERS = 0.3  # weight of the earlier target layers in the fused row, next to the last
PAIRS_OF = 16384  # tokens whose pairs are counted, the most frequent ones: a matrix of all would be 10 GB of 49k tokens
SMOOTHING = 20.0  # a token's followers count against this many draws from the whole text


@torch.no_grad()
def begin(model: DSpark | Eagle3, corpus: Corpus, tables: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    """Set fresh weights. tables: the target's embedding [V, d], head rows of the draft vocabulary [W, d], final norm [d]."""
    torch.manual_seed(seed)
    embedding, head, norm = tables
    model.embed_tokens.weight.copy_(embedding)
    model.lm_head.weight.copy_(head)
    assert model.norm.weight is not None
    model.norm.weight.copy_(norm)
    features = _some_features(corpus)
    _begin_fusion(model, features)
    if isinstance(model, DSpark):
        assert model.hidden_norm.weight is not None
        model.hidden_norm.weight.copy_(norm / norm.square().mean().sqrt())
        _begin_recency(model, features)
        if model.markov_head is not None:
            _begin_pairs(model, corpus)


def _some_features(corpus: Corpus) -> Tensor:
    generator = np.random.default_rng(0)
    stretches = [corpus.stretches[int(i)] for i in generator.integers(len(corpus.stretches), size=16)]
    return torch.cat([corpus.example([s], 1, generator).features[0, s.answer_start :] for s in stretches]).cpu()


def _begin_fusion(model: DSpark | Eagle3, features: Tensor) -> None:
    """The last layer as it is, the earlier ones turned at random (so they can be told apart) and fainter; equal scales."""
    d = model.config.target_hidden_size
    blocks = features.split(d, dim=-1)
    weight = torch.empty_like(model.fc.weight)
    for i, block in enumerate(blocks):
        scale = block.square().mean().sqrt()
        last = i == len(blocks) - 1
        turn = (
            torch.eye(model.config.hidden_size, d) if last else torch.nn.init.orthogonal_(torch.empty(len(weight), d))
        )
        weight[:, i * d : (i + 1) * d] = turn / scale * (1.0 if last else OTHER_LAYERS)
    model.fc.weight.copy_(weight)


def _begin_recency(model: DSpark, features: Tensor) -> None:
    config = model.config
    attention = model.layers[0].self_attn
    if attention.v_proj is None or not config.qk_norm:
        return
    d, head_dim, group = config.hidden_size, config.head_dim, config.num_heads // config.num_kv_heads
    context = model.fuse(features)
    own = model.layers[0].input_layernorm(model.embed_tokens.weight[:: max(1, config.vocab_size // 4096)])
    lit = torch.nn.functional.normalize(context, dim=-1).mean(0) - torch.nn.functional.normalize(own, dim=-1).mean(0)
    asked = torch.nn.functional.normalize(own, dim=-1).mean(0)
    direction = torch.zeros(head_dim)
    direction[: min(QUICK_PAIRS, head_dim // 2)] = 1.0
    direction = direction / direction.norm()
    chosen = max(1, round(config.num_kv_heads * NEWEST_SHARE))
    for head in range(chosen):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        attention.k_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows] += torch.outer(direction, lit / lit.norm())
        for query in range(head * group, (head + 1) * group):
            rows = slice(query * head_dim, (query + 1) * head_dim)
            attention.q_proj.weight[rows] *= 0.1
            attention.q_proj.weight[rows] += torch.outer(direction, asked / asked.norm())
    attention.q_norm.weight.fill_(SHARPNESS)
    attention.k_norm.weight.fill_(SHARPNESS)
    if config.num_heads == config.num_kv_heads and config.num_heads * head_dim == d:
        attention.v_proj.weight.copy_(torch.eye(d))
        attention.o_proj.weight.copy_(torch.eye(d))


def _begin_pairs(model: DSpark, corpus: Corpus) -> None:
    """W2 W1[x] ~ log of how much likelier a token is after x than anywhere, with smoothing; tokens never seen get 0."""
    config = model.config
    head = model.markov_head
    assert head is not None
    if config.markov_head_type != "vanilla":
        return
    ids = torch.arange(config.vocab_size) if model.d2t is None else model.d2t
    rows = torch.arange(len(ids))
    if len(ids) > PAIRS_OF:
        seen = np.concatenate(list(corpus.answers())).astype(np.int64)
        often = torch.from_numpy(np.bincount(seen, minlength=config.vocab_size))[ids]
        rows = often.sort(descending=True, stable=True).indices[:PAIRS_OF]
        ids = ids[rows]
    t2d = torch.full((config.vocab_size,), -1, dtype=torch.int64)
    t2d[ids] = torch.arange(len(ids))
    counts = torch.zeros(len(ids), len(ids))
    for answer in corpus.answers():
        mapped = t2d[torch.from_numpy(answer.astype(np.int64))]
        before, after = mapped[:-1], mapped[1:]
        known = (before >= 0) & (after >= 0)
        counts.index_put_((before[known], after[known]), torch.ones(int(known.sum())), accumulate=True)
    share = (counts.sum(0) + 0.5) / (counts.sum() + 0.5 * len(ids))
    lift = ((counts + SMOOTHING * share) / (counts.sum(1, keepdim=True) + SMOOTHING) / share).log()
    left, scale, right = torch.svd_lowrank(lift, q=head.rank, niter=2)
    head.markov_w1.weight.zero_()
    head.markov_w1.weight[ids] = left * scale.sqrt()
    head.markov_w2.weight.zero_()
    head.markov_w2.weight[rows] = right * scale.sqrt()
