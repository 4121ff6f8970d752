"""Triton kernels of markov_step.py (CUDA and ROCm). Imported only when that path is taken."""

from __future__ import annotations

import triton
import triton.language as tl

#: vocabulary rows of the bias matrix that one program reads
BLOCK = 64


@triton.jit
def correct(
    base,  # [N, V]
    latent,  # [N, r]
    w2,  # [V, r]
    temperature,  # [N]
    corrected,  # [N, V] out
    peaks,  # [N, blocks] out: largest corrected logit of a block
    places,  # [N, blocks] out: where it is
    masses,  # [N, blocks] out: sum of exp((logit - peak) / temperature)
    n_rows,
    width,
    rank,
    blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
):
    """One block of the vocabulary, for all rows: its part of the matrix is read once."""
    block = tl.program_id(0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, RANK)
    inside = ids < width
    matrix = tl.load(
        w2 + ids.to(tl.int64)[:, None] * rank + ranks[None, :],
        mask=inside[:, None] & (ranks < rank)[None, :],
        other=0.0,
    ).to(tl.float32)
    for row in range(n_rows):
        factors = tl.load(latent + row * rank + ranks, mask=ranks < rank, other=0.0).to(tl.float32)
        start = row * width
        logits = tl.load(base + start + ids, mask=inside, other=float("-inf")).to(tl.float32)
        logits += tl.sum(matrix * factors[None, :], axis=1)
        tl.store(corrected + start + ids, logits, mask=inside)
        peak = tl.max(logits, axis=0)
        place = tl.argmax(logits, axis=0, tie_break_left=True)
        heat = tl.maximum(tl.load(temperature + row), GREEDY)
        shifted = tl.where(logits == float("-inf"), float("-inf"), (logits - peak) / heat)
        tl.store(peaks + row * blocks + block, peak)
        tl.store(places + row * blocks + block, (block * BLOCK + place).to(tl.int64))
        tl.store(masses + row * blocks + block, tl.sum(tl.exp(shifted), axis=0))


@triton.jit
def choose(
    corrected,  # [N, V]
    peaks,  # [N, blocks]
    places,
    masses,
    temperature,  # [N]
    uniform,  # [N]
    tokens,  # [N] out
    width,
    blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
):
    """One row: the best block's best token, or a draw over blocks and then inside one."""
    row = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    peak = float("-inf")
    token = tl.zeros((), dtype=tl.int64)
    for begin in range(0, blocks, CHUNK):
        at = begin + lanes
        some = tl.load(peaks + row * blocks + at, mask=at < blocks, other=float("-inf"))
        best = tl.max(some, axis=0)
        where = begin + tl.argmax(some, axis=0, tie_break_left=True)
        found = tl.load(places + row * blocks + where)
        token = tl.where(best > peak, found, token)
        peak = tl.maximum(best, peak)
    heat = tl.load(temperature + row)
    if heat >= GREEDY:
        total = 0.0
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            top = tl.load(peaks + row * blocks + at, mask=at < blocks, other=float("-inf"))
            mass = tl.load(masses + row * blocks + at, mask=at < blocks, other=0.0)
            total += tl.sum(tl.where(mass > 0, mass * tl.exp((top - peak) / heat), 0.0), axis=0)
        wanted = tl.load(uniform + row) * total
        passed = 0.0  # mass before the chosen block
        chosen = 0
        last = 0  # the last block with any mass, for a draw that rounding leads past the end
        before = 0.0
        before_last = 0.0
        done = 0
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            top = tl.load(peaks + row * blocks + at, mask=at < blocks, other=float("-inf"))
            mass = tl.load(masses + row * blocks + at, mask=at < blocks, other=0.0)
            mass = tl.where(mass > 0, mass * tl.exp((top - peak) / heat), 0.0)
            ends = passed + tl.cumsum(mass, axis=0)
            over = (ends > wanted) & (mass > 0)
            first = tl.argmax(over.to(tl.int32), axis=0, tie_break_left=True)
            hit = tl.max(over.to(tl.int32), axis=0)
            start = tl.sum(tl.where(lanes == first, ends - mass, 0.0), axis=0)
            chosen = tl.where((done == 0) & (hit == 1), begin + first, chosen)
            before = tl.where((done == 0) & (hit == 1), start, before)
            final = tl.max(tl.where(mass > 0, lanes, -1), axis=0)
            final_start = tl.sum(tl.where(lanes == final, ends - mass, 0.0), axis=0)
            last = tl.where(final >= 0, begin + final, last)
            before_last = tl.where(final >= 0, final_start, before_last)
            done = tl.maximum(done, hit)
            passed += tl.sum(mass, axis=0)
        chosen = tl.where(done == 1, chosen, last)
        before = tl.where(done == 1, before, before_last)
        inner = tl.arange(0, BLOCK)
        ids = chosen * BLOCK + inner
        logits = tl.load(corrected + row * width + ids, mask=ids < width, other=float("-inf"))
        weights = tl.where(logits == float("-inf"), 0.0, tl.exp((logits - peak) / heat))
        ends = before + tl.cumsum(weights, axis=0)
        over = (ends > wanted) & (weights > 0)
        first = tl.argmax(over.to(tl.int32), axis=0, tie_break_left=True)
        hit = tl.max(over.to(tl.int32), axis=0)
        final = tl.max(tl.where(weights > 0, inner, 0), axis=0)
        token = (chosen * BLOCK + tl.where(hit == 1, first, final)).to(tl.int64)
    tl.store(tokens + row, token)
