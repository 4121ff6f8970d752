"""Triton kernels of verify_draft.py (CUDA and ROCm). Imported only when that path is taken.

Four launches: every block of every row is summarized (peak, where it is, mass); one program a sequence judges its drafts;
the row that decides is turned into what is left of it, block by block; one program a sequence draws from that.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: vocabulary entries of one program
BLOCK = 2048


@triton.jit
def summarize(
    logits,  # [N, rows, V]
    temperature,  # [N]
    peaks,  # [N, rows, blocks] out
    places,  # [N, rows, blocks] out
    masses,  # [N, rows, blocks] out: sum of exp((logit - peak) / temperature)
    width,
    rows,
    blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
):
    block, row, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    line = seq * rows + row
    some = tl.load(logits + line.to(tl.int64) * width + ids, mask=ids < width, other=float("-inf")).to(tl.float32)
    heat = tl.maximum(tl.load(temperature + seq), GREEDY)
    peak = tl.max(some, axis=0)
    shifted = tl.where(some == float("-inf"), float("-inf"), (some - peak) / heat)
    tl.store(peaks + line * blocks + block, peak)
    tl.store(
        places + line * blocks + block, (block * BLOCK + tl.argmax(some, axis=0, tie_break_left=True)).to(tl.int64)
    )
    tl.store(masses + line * blocks + block, tl.sum(tl.exp(shifted), axis=0))


@triton.jit
def judge(
    logits,  # [N, rows, V]
    probs,  # [N, rows - 1, V]; not read for deterministic drafts
    tokens,  # [N, rows - 1]
    lengths,  # [N]
    temperature,  # [N]
    uniform,  # [N, rows]
    peaks,
    places,
    masses,
    peak_out,  # [N, rows] out: of the whole row
    mass_out,  # [N, rows] out
    accepted,  # [N] out
    bonus,  # [N] out: the best token of the deciding row, for greedy targets
    width,
    rows,
    blocks,
    CHUNK: tl.constexpr,  # noqa: N803
    SAMPLED: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
    TINY: tl.constexpr,  # noqa: N803
):
    seq = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    heat = tl.load(temperature + seq)
    length = tl.load(lengths + seq).to(tl.int32)
    kept = tl.full((), 0, tl.int32)
    going = tl.full((), 1, tl.int32)
    for row in range(rows):
        line = seq * rows + row
        peak = float("-inf")
        best = tl.zeros((), dtype=tl.int64)
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            some = tl.load(peaks + line * blocks + at, mask=at < blocks, other=float("-inf"))
            top = tl.max(some, axis=0)
            where = begin + tl.argmax(some, axis=0, tie_break_left=True)
            best = tl.where(top > peak, tl.load(places + line * blocks + where), best)
            peak = tl.maximum(peak, top)
        total = 0.0
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            some = tl.load(peaks + line * blocks + at, mask=at < blocks, other=float("-inf"))
            mass = tl.load(masses + line * blocks + at, mask=at < blocks, other=0.0)
            total += tl.sum(tl.where(mass > 0, mass * tl.exp((some - peak) / tl.maximum(heat, GREEDY)), 0.0), axis=0)
        tl.store(peak_out + line, peak)
        tl.store(mass_out + line, total)
        if going == 1:
            tl.store(bonus + seq, best)
        counts = (row < length) & (going == 1)
        token = tl.load(tokens + seq * (rows - 1) + row, mask=counts, other=0)
        logit = tl.load(logits + line.to(tl.int64) * width + token, mask=counts, other=0.0).to(tl.float32)
        mine = tl.exp((logit - peak) / tl.maximum(heat, GREEDY)) / total
        mine = tl.where(heat < GREEDY, (token == best).to(tl.float32), mine)
        theirs = 1.0
        if SAMPLED:
            drawn = (seq * (rows - 1) + row).to(tl.int64) * width + token
            theirs = tl.load(probs + drawn, mask=counts, other=1.0).to(tl.float32)
        chance = tl.minimum(mine / tl.maximum(theirs, TINY), 1.0)
        fits = counts & (tl.load(uniform + seq * rows + row) < chance)
        going = tl.where(fits, going, 0)
        kept += fits.to(tl.int32)
    tl.store(accepted + seq, kept.to(tl.int64))


@triton.jit
def _weights(
    logits,
    probs,
    tokens,
    lengths,
    temperature,
    peak_out,
    mass_out,
    accepted,
    seq,
    ids,
    width,
    rows,
    SAMPLED: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
):
    """Target probabilities of the deciding row at `ids`, and what the draft leaves of them."""
    row = tl.load(accepted + seq).to(tl.int32)
    line = seq * rows + row
    heat = tl.maximum(tl.load(temperature + seq), GREEDY)
    some = tl.load(logits + line.to(tl.int64) * width + ids, mask=ids < width, other=float("-inf")).to(tl.float32)
    mine = tl.exp((some - tl.load(peak_out + line)) / heat) / tl.load(mass_out + line)
    mine = tl.where(some == float("-inf"), 0.0, mine)
    refused = row < tl.load(lengths + seq).to(tl.int32)
    if SAMPLED:
        drawn = (seq * (rows - 1) + row).to(tl.int64) * width
        read = tl.where(refused, width, 0)  # there is no draft row behind the last target row
        theirs = tl.load(probs + drawn + ids, mask=ids < read, other=0.0).to(tl.float32)
    else:
        token = tl.load(tokens + seq * (rows - 1) + row, mask=refused, other=-1)
        theirs = (ids == token).to(tl.float32)
    return mine, tl.maximum(mine - theirs, 0.0), refused


@triton.jit
def leave(
    logits,
    probs,
    tokens,
    lengths,
    temperature,
    peak_out,
    mass_out,
    accepted,
    rest,  # [N, blocks] out: what the draft leaves of each block of the deciding row
    width,
    rows,
    blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    SAMPLED: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
    TINY: tl.constexpr,  # noqa: N803
):
    block, seq = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    _, left, _ = _weights(
        logits,
        probs,
        tokens,
        lengths,
        temperature,
        peak_out,
        mass_out,
        accepted,
        seq,
        ids,
        width,
        rows,
        SAMPLED,
        GREEDY,
    )
    tl.store(rest + seq * blocks + block, tl.sum(left, axis=0))


@triton.jit
def finish(
    logits,
    probs,
    tokens,
    lengths,
    temperature,
    uniform,
    peaks,
    masses,
    peak_out,
    mass_out,
    accepted,
    rest,
    bonus,  # [N] in: the best token of the deciding row; out: the token that ends the round
    width,
    rows,
    blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    SAMPLED: tl.constexpr,  # noqa: N803
    GREEDY: tl.constexpr,  # noqa: N803
    TINY: tl.constexpr,  # noqa: N803
):
    seq = tl.program_id(0)
    heat = tl.load(temperature + seq)
    if heat >= GREEDY:
        lanes = tl.arange(0, CHUNK)
        row = tl.load(accepted + seq).to(tl.int32)
        line = seq * rows + row
        peak = tl.load(peak_out + line)
        whole = tl.load(mass_out + line)
        left = 0.0
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            left += tl.sum(tl.load(rest + seq * blocks + at, mask=at < blocks, other=0.0), axis=0)
        by_rest = (row < tl.load(lengths + seq).to(tl.int32)) & (left > TINY)
        wanted = tl.load(uniform + seq * rows + rows - 1) * tl.where(by_rest, left, 1.0)
        passed = 0.0
        chosen = 0
        last = 0
        before = 0.0
        before_last = 0.0
        done = 0
        for begin in range(0, blocks, CHUNK):
            at = begin + lanes
            top = tl.load(peaks + line * blocks + at, mask=at < blocks, other=float("-inf"))
            mass = tl.load(masses + line * blocks + at, mask=at < blocks, other=0.0)
            mass = tl.where(mass > 0, mass * tl.exp((top - peak) / heat) / whole, 0.0)
            mass = tl.where(by_rest, tl.load(rest + seq * blocks + at, mask=at < blocks, other=0.0), mass)
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
        mine, kept, _ = _weights(
            logits,
            probs,
            tokens,
            lengths,
            temperature,
            peak_out,
            mass_out,
            accepted,
            seq,
            ids,
            width,
            rows,
            SAMPLED,
            GREEDY,
        )
        weights = tl.where(by_rest, kept, mine)
        ends = before + tl.cumsum(weights, axis=0)
        over = (ends > wanted) & (weights > 0)
        first = tl.argmax(over.to(tl.int32), axis=0, tie_break_left=True)
        hit = tl.max(over.to(tl.int32), axis=0)
        final = tl.max(tl.where(weights > 0, inner, 0), axis=0)
        tl.store(bonus + seq, (chosen * BLOCK + tl.where(hit == 1, first, final)).to(tl.int64))
