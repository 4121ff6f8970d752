"""How well lengths could have been chosen: a schedule that knows the true costs and what each confidence was worth.

The oracle sees the drafts of recorded rounds, the measured cost of every width, and for every (position, confidence) the
share of tokens that were in fact accepted; it chooses lengths, and whether to draft at all, to maximise tokens per ms over
all of them. It does not know which tokens will be accepted: nobody can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import numpy.typing as npt

from dspark_cli.bench.arms import PLAIN
from dspark_cli.bench.local import AUTO, Run
from dspark_cli.engine.rounds import Round

BINS = 8  # of confidence, by equal counts
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrueCosts:
    """Medians over every round that was measured: verify ms [tokens], ms of drafting a full block by source, overhead."""

    verify: Array
    drafting: dict[str, float]
    own: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> TrueCosts:
        by_width: dict[int, list[float]] = {}
        drafting: dict[str, list[float]] = {}
        own: list[float] = []
        rounds = _decoding(runs)
        full: dict[str, int] = {}
        for item in rounds:
            full[item.source] = max(full.get(item.source, 0), item.drafted)
        for item in rounds:
            by_width.setdefault(item.verified + 1, []).append(item.times.verify)
            own.append(item.times.own)
            if item.drafted and item.drafted == full[item.source]:
                drafting.setdefault(item.source, []).append(item.times.draft + item.times.inject)
        known = {n: median(ms) for n, ms in by_width.items()}
        widths = sorted(known)
        verify = np.interp(np.arange(max(widths) + 1), widths, [known[n] for n in widths])
        return cls(verify, {s: median(ms) for s, ms in drafting.items()}, median(own))

    def round_ms(self, source: str, size: int) -> Array:
        """ms [size + 1] of a round by the draft tokens it verifies."""
        ends = np.minimum(np.arange(1, size + 2), len(self.verify) - 1)
        result: Array = self.verify[ends] + self.own + self.drafting.get(source, 0.0)
        return result


class SeenSurvival:
    """Per source, position and confidence: the share of reached tokens that were accepted."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        seen: dict[str, list[tuple[int, float, bool]]] = {}
        for item in rounds:
            for k in range(min(item.verified, item.accepted + 1)):
                conf = item.confidence[k] if item.confidence is not None else 0.0
                seen.setdefault(item.source, []).append((k, conf, k < item.accepted))
        self._edges: dict[str, Array] = {}
        self._share: dict[tuple[str, int, int], float] = {}
        for source, rows in seen.items():
            confidences = np.asarray([c for _, c, _ in rows])
            edges = self._edges[source] = np.unique(np.quantile(confidences, np.linspace(0, 1, BINS + 1)[1:-1]))
            cells: dict[tuple[int, int], list[bool]] = {}
            for k, c, ok in rows:
                place = int(np.searchsorted(edges, c, side="right"))
                cells.setdefault((-1, place), []).append(ok)
                cells.setdefault((min(k, 3), place), []).append(ok)
            # A cell of a position with few tokens is replaced by that of all positions.
            self._share |= {(source, k, b): fmean(ok) for (k, b), ok in cells.items() if k < 0 or len(ok) >= 10}

    def __call__(self, item: Round) -> Array:
        """Survivals [drafted] of a round's draft."""
        edges = self._edges.get(item.source)
        if edges is None:
            return np.zeros(item.drafted)
        conf = item.confidence if item.confidence is not None else (0.0,) * item.drafted
        shares = []
        for k, c in enumerate(conf):
            place = int(np.searchsorted(edges, c, side="right"))
            overall = self._share.get((item.source, -1, place), 0.0)
            shares.append(self._share.get((item.source, min(k, 3), place), overall))
        return np.cumprod(shares, dtype=np.float64)


@dataclass(frozen=True)
class Verdict:
    """Expected tokens per second with true costs and survivals: of the oracle, of `auto`'s own choices, of plain decoding."""

    oracle_tok_s: float
    auto_tok_s: float
    plain_tok_s: float

    @property
    def auto_to_oracle(self) -> float:
        return self.auto_tok_s / self.oracle_tok_s


def judge(runs: Sequence[Run]) -> Verdict | None:
    """The oracle over the runs of one format, kind and temperature; None without runs of `auto`."""
    mine = _decoding([r for r in runs if r.arm == AUTO])
    if not mine:
        return None
    costs = TrueCosts.of(runs)
    survival = SeenSurvival(_decoding([r for r in runs if r.arm != PLAIN]))
    plain = float(costs.round_ms("", 0)[0])
    rounds = [(survival(item), costs.round_ms(item.source if item.drafted else "", item.drafted)) for item in mine]
    tokens = ms = 0.0
    for item, (a, cost) in zip(mine, rounds, strict=True):
        tokens += 1.0 + float(a[: item.verified].sum())
        ms += float(cost[item.verified])
    # The drafts that `auto` did not ask for while parked: as the arm that always drafted got them.
    longest = max((r.arm for r in runs if r.arm.startswith("fixed:")), key=lambda a: int(a[6:]), default=PLAIN)
    always = [
        (survival(item), costs.round_ms(item.source if item.drafted else "", item.drafted))
        for item in _decoding([r for r in runs if r.arm == longest])
    ]
    best = max(_best_rate(rounds, plain), _best_rate(always, plain), 1.0 / plain)
    return Verdict(best * 1e3, tokens / ms * 1e3, 1e3 / plain)


def _best_rate(rounds: Sequence[tuple[Array, Array]], plain: float) -> float:
    """The highest tokens per ms over all choices of one length a round, or a plain round instead (Dinkelbach's iteration)."""
    rate = 1.0 / plain
    for _ in range(20):
        tokens = ms = 0.0
        for a, cost in rounds:
            gained = 1.0 + np.concatenate([[0.0], np.cumsum(a)])
            values = gained - rate * cost
            best = int(values.argmax())
            if values[best] >= 1.0 - rate * plain:
                tokens, ms = tokens + float(gained[best]), ms + float(cost[best])
            else:
                tokens, ms = tokens + 1.0, ms + plain
        if not ms or tokens / ms <= rate * (1 + 1e-9):
            break
        rate = tokens / ms
    return rate


def _decoding(runs: Sequence[Run]) -> list[Round]:
    return [item for run in runs for item in run.rounds if not item.is_prefill]
