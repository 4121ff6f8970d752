"""How many drafted tokens are worth a place in the verify pass: pure functions of survivals and costs.

A survival a_k is the probability that draft tokens 1..k are all accepted. Verifying j tokens over all R requests costs
ms[j] and brings R + (sum of their survivals) tokens. The rate to maximise counts the recent past with the round at hand
(`carry`): a round after a costly draft should not buy tokens dearer than the session as a whole gets them. With nothing
carried it is the paper's Theta, with the drafter's cost inside ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

#: Survivals [k] of a draft, or ms [n] by tokens. Numbers and not arrays: they are few, and each call of numpy takes some
#: microseconds here, between passes that leave nothing in the caches.
Numbers = Sequence[float]


def convex_minorant(ms: Numbers) -> list[float]:
    """The greatest convex curve below ms [n]: no jag of it can end a search early.

    On a convex cost the rate rises, then falls: survivals come in falling order, so tokens are concave in their number.
    Stopping at the first drop then finds the best length without looking at later tokens.
    """
    hull: list[int] = []
    for i, value in enumerate(ms):
        while len(hull) > 1 and (ms[hull[-1]] - ms[hull[-2]]) * (i - hull[-1]) >= (value - ms[hull[-1]]) * (
            hull[-1] - hull[-2]
        ):
            hull.pop()
        hull.append(i)
    smooth: list[float] = np.interp(np.arange(len(ms)), hull, [ms[i] for i in hull]).tolist()
    return smooth


def admit(
    survival: Sequence[Numbers],
    ms: Numbers,
    *,
    early_stop: bool,
    carry: tuple[float, float] = (0.0, 0.0),
    cap: int | None = None,
) -> list[int]:
    """How many tokens of each draft to verify.

    survival:   [k_r] for each request, each falling
    ms:         [n], n > sum of k_r: cost of a round that verifies 0, 1, ... draft tokens in all
    early_stop: stop at the first drop (sampled drafts: admission of position k then rests on survivals up to k only; `ms`
                should be convex). Otherwise the best number over the whole curve, jags and all.
    carry:      (tokens, ms) of the recent past
    cap:        most draft tokens in the pass, over all requests
    """
    sizes = [len(a) for a in survival]
    total = sum(sizes) if cap is None else min(sum(sizes), max(0, cap))
    if total == 0:
        return [0] * len(sizes)
    if len(sizes) == 1:
        return [_best_count(survival[0][:total], 1, ms, carry, early_stop)]
    values = np.fromiter(chain.from_iterable(survival), dtype=np.float64)
    # Stable: of equal survivals the earlier position comes first, so every admitted set is a prefix of each draft.
    order = np.argsort(-values, kind="stable")[:total]
    count = _best_count(values[order].tolist(), len(sizes), ms, carry, early_stop)
    rows = np.repeat(np.arange(len(sizes)), sizes)[order[:count]]
    return [int(n) for n in np.bincount(rows, minlength=len(sizes))]


def _best_count(falling: Numbers, requests: int, ms: Numbers, carry: tuple[float, float], early_stop: bool) -> int:
    """How many of the survivals (already in falling order) to admit."""
    tokens, spent = requests + carry[0], carry[1]
    count, best = 0, tokens / (ms[0] + spent)
    for i, survival in enumerate(falling, start=1):
        tokens += survival
        rate = tokens / (ms[i] + spent)
        if rate > best:
            count, best = i, rate
        elif early_stop:
            break
    return count
