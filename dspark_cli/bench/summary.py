"""From runs to rows: medians, ratios with bootstrap intervals, and the JSON of schema "dspark-bench/1" (docs/bench.md)."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np
import psutil

from dspark_cli import __version__
from dspark_cli.backends.machine import installed, processor, usable_cores
from dspark_cli.bench.arms import PLAIN
from dspark_cli.bench.local import AUTO, Results, Run
from dspark_cli.bench.oracle import judge
from dspark_cli.engine.calibration import Recorded, Sts, ece, pooled, reliability
from dspark_cli.engine.rounds import Round
from dspark_cli.engine.stats import Stats, ids_sha256

SCHEMA = "dspark-bench/1"
RESAMPLES = 2000
POOLED = "all"  # the kind of the rows over all kinds


def interval(values: Sequence[float], *, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the median."""
    if len(values) < 2:
        return [round(v, 4) for v in (*values, *values)][:2]
    draws = np.random.default_rng(seed).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def is_static(arm: str) -> bool:
    """Plain decoding is the static length 0."""
    return arm == PLAIN or arm.startswith("fixed:")


def summarise(results: Results) -> dict[str, Any]:
    """The whole answer as one JSON object."""
    return {
        "schema": SCHEMA,
        "dspark": __version__,
        "machine": machine(),
        "model": results.model,
        "backend": results.backend,
        "device": results.device,
        "drafters": results.drafters,
        "interrupted": results.interrupted,
        "rows": rows(results),
        "oracle": oracles(results.runs),
        "costs": {form: costs.as_dict() for form, costs in results.costs.items()},
        "chosen_lengths": {form: chosen_lengths(results.runs, form) for form in results.costs},
        "reliability": reliabilities(results.runs),
        "runs": [_raw(run) for run in results.runs],
    }


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "libraries": {name: installed(name) for name in ("llama-cpp-python", "torch", "numpy")},
    }


def groups(runs: Sequence[Run]) -> Iterable[tuple[tuple[str, str, float], list[Run]]]:
    """Runs by (format, kind, temperature), and over all kinds where there are several."""
    found: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.format, run.prompt.kind, run.temperature), []).append(run)
    if len({kind for _, kind, _ in found}) > 1:
        for run in runs:
            found.setdefault((run.format, POOLED, run.temperature), []).append(run)
    return found.items()


def rows(results: Results) -> list[dict[str, Any]]:
    return [row for key, runs in groups(results.runs) for row in _rows(key, runs)]


def _rows(key: tuple[str, str, float], runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    static = {arm: median(r.ratio for r in own) for arm, own in by_arm.items() if is_static(arm)}
    best_static = max(static, key=lambda arm: static[arm])
    best = {(r.prompt, i): r.ratio for i, r in _numbered(by_arm[best_static])}
    for arm, own in by_arm.items():
        speeds, ratios = [r.stats.decode_tok_s for r in own], [r.ratio for r in own]
        to_best = [r.ratio / best[r.prompt, i] for i, r in _numbered(own) if (r.prompt, i) in best]
        total = Stats.of(item for run in own for item in run.rounds)
        worst = min((median(r.ratio for r in own if r.prompt == p) for p in {r.prompt for r in own}), default=0.0)
        different = next((r for r in own if r.first_difference is not None), None)
        yield {
            "arm": arm,
            "format": key[0],
            "kind": key[1],
            "temperature": key[2],
            "runs": len(own),
            "decode_tok_s": round(median(speeds), 2),
            "decode_tok_s_min": round(min(speeds), 2),
            "decode_tok_s_max": round(max(speeds), 2),
            "ratio_to_plain": round(median(ratios), 4),
            "ratio_ci": interval(ratios),
            "ratio_worst_prompt": round(worst, 4),
            "best_static": best_static,
            "ratio_to_best_static": round(median(to_best), 4) if to_best else None,
            "ratio_to_best_static_ci": interval(to_best) if to_best else None,
            "accepted_length": round(total.accepted_length, 4),
            "acceptance_rate": round(total.acceptance_rate, 4),
            "survival": [round(s, 4) for s in total.survival],
            "drafted_per_round": round(total.drafted / total.rounds, 4) if total.rounds else 0.0,
            "verified_per_round": round(total.verified / total.rounds, 4) if total.rounds else 0.0,
            "parked_share": round(total.parked_share, 4),
            "time_ms": {
                "draft": round(total.draft_ms, 2),
                "verify": round(total.verify_ms, 2),
                "inject": round(total.inject_ms, 2),
                "own": round(total.own_ms, 2),
            },
            "identical": different is None,
            "first_difference": None
            if different is None
            else {
                "prompt": different.prompt.text[:60],
                "token": different.first_difference,
                "margin": different.margin,
            },
        }


def _numbered(runs: Sequence[Run]) -> Iterable[tuple[int, Run]]:
    """Runs with the number of the repeat they were: the n-th of an arm and prompt shares its cycle with the n-th of another."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.prompt.text] = seen.get(run.prompt.text, -1) + 1
        yield seen[run.prompt.text], run


def oracles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per format, kind and temperature: what perfect lengths would have brought, and how near `auto` came."""
    found = []
    for (form, kind, temperature), own in groups(runs):
        verdict = judge(own)
        if verdict is not None:
            found.append(
                {
                    "format": form,
                    "kind": kind,
                    "temperature": temperature,
                    "oracle_to_plain": round(verdict.oracle_tok_s / verdict.plain_tok_s, 4),
                    "auto_to_oracle": round(verdict.auto_to_oracle, 4),
                }
            )
    return found


def reliabilities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per drafter source: how confidences as the drafter gave them compare with what happened (static arms only)."""
    rounds: dict[str, list[Round]] = {}
    for run in runs:
        if run.arm.removeprefix("lookup ").startswith("fixed:"):
            for item in run.rounds:
                if item.verified and item.confidence is not None:
                    rounds.setdefault(item.source, []).append(item)
    found = []
    for source, items in rounds.items():
        recorded = Recorded.of([(r.confidence or (), r.verified, r.accepted) for r in items])
        predicted, happened = pooled(recorded, Sts())
        bins = [
            {"predicted": round(p, 4), "happened": round(h, 4), "tokens": n}
            for p, h, n in reliability(predicted, happened)
        ]
        found.append({"source": source, "ece": round(ece(predicted, happened), 4), "bins": bins})
    return found


def _raw(run: Run) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "format": run.format,
        "kind": run.prompt.kind,
        "prompt": run.prompt.text[:60],
        "temperature": run.temperature,
        "ratio_to_plain": round(run.ratio, 4),
        "ids_sha256": ids_sha256(run.tokens),
        "first_difference": run.first_difference,
        "margin": run.margin,
        **run.stats.as_dict(),
    }


CSV_COLUMNS = (
    *("format", "kind", "temperature", "arm", "runs", "decode_tok_s", "decode_tok_s_min", "decode_tok_s_max"),
    *("ratio_to_plain", "ratio_ci_low", "ratio_ci_high", "ratio_worst_prompt", "best_static", "ratio_to_best_static"),
    *("accepted_length", "acceptance_rate", "drafted_per_round", "verified_per_round", "parked_share"),
    *("draft_ms", "verify_ms", "inject_ms", "own_ms", "identical"),
)


def as_csv(summary: dict[str, Any]) -> str:
    """The rows, one a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in summary["rows"]:
        low, high = row["ratio_ci"] or (None, None)
        times = {f"{name}_ms": ms for name, ms in row["time_ms"].items()}
        writer.writerow({**row, **times, "ratio_ci_low": low, "ratio_ci_high": high})
    return text.getvalue()


def chosen_lengths(runs: Sequence[Run], form: str) -> dict[int, int]:
    """How often `auto` verified each number of tokens, on one format."""
    counts: dict[int, int] = {}
    for run in runs:
        if run.arm == AUTO and run.format == form:
            for item in run.rounds:
                if not item.is_prefill:
                    counts[item.verified] = counts.get(item.verified, 0) + 1
    return dict(sorted(counts.items()))
