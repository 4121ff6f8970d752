"""The bench's answer as one self-contained HTML file, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from dspark_cli.bench.plots import Axes, bars, colour_of, lines
from dspark_cli.bench.summary import POOLED

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr.auto { background: #eef6f0; } .bad { color: #b00; }
svg { width: 100%; max-width: 640px; display: block; margin: 1em 0; background: #fff; }
svg .title { font: 600 13px system-ui; } svg .label, svg .tick { font: 11px system-ui; fill: #555; }
svg .grid { stroke: #e4e4e4; }
"""
HEAD = (
    *("arm", "tok/s", "min-max", "x plain", "95 %", "worst prompt", "x best static", "tau", "verified", "parked"),
    *("draft", "verify", "inject", "own", "output"),
)


def as_html(summary: dict[str, Any]) -> str:
    """A complete page: tables, and plots of speed, costs with chosen lengths, acceptance and reliability."""
    machine = summary["machine"]
    title = f"dspark bench: {summary['model']} on {machine['system']}, {machine['cores']} cores"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>dspark {escape(summary['dspark'])}, backend {escape(summary['backend'])} on {escape(summary['device'])}, "
        f"Python {escape(machine['python'])}, {escape(_libraries(machine))}. Every arm in one process, in turn; ratios are "
        "taken within a cycle against plain decoding before and after; 95 % bootstrap intervals of the median.</p>",
    ]
    if summary["interrupted"]:
        body.append('<p class="bad">Interrupted: these are the cycles that were finished.</p>')
    for key in dict.fromkeys((r["format"], r["temperature"]) for r in summary["rows"]):
        body += _section(summary, *key)
    body += [_costs(summary), *_reliability(summary)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _libraries(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in machine["libraries"].items() if number)


def _section(summary: dict[str, Any], form: str, temperature: float) -> Iterable[str]:
    """Tables and plots of one format and temperature, all kinds."""
    rows = [r for r in summary["rows"] if r["format"] == form and r["temperature"] == temperature]
    yield f"<h2>{escape(form)}, temperature {temperature:g}</h2>"
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    overall = POOLED if POOLED in kinds else kinds[0]
    main = [r for r in rows if r["kind"] == overall]
    yield bars(
        f"decoding, {overall} prompts (median)", {r["arm"]: r["decode_tok_s"] for r in main}, "tokens per second"
    )
    survival = {r["arm"]: [(i, s) for i, s in enumerate(r["survival"], 1)] for r in main if len(r["survival"]) > 1}
    longest = sorted(survival, key=lambda arm: len(survival[arm]))[-4:]
    if longest:
        curves = {arm: survival[arm] for arm in longest}
        yield lines("accepted at position (of those verified)", curves, "position", "share", top=1.0)
    for kind in kinds:
        yield f"<h3>{escape(kind)}</h3>" + _table([r for r in rows if r["kind"] == kind])
    nearness = [o for o in summary["oracle"] if o["format"] == form and o["temperature"] == temperature]
    if nearness:
        found = "; ".join(f"{o['kind']} {o['auto_to_oracle']:.2f} of {o['oracle_to_plain']:.2f}x" for o in nearness)
        yield f"<p>auto against the oracle schedule (share of its rate; its rate over plain): {escape(found)}.</p>"


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{h}</th>' for h in HEAD)}</tr>"]
    for r in rows:
        total = sum(r["time_ms"].values()) or 1.0
        best = "-" if r["ratio_to_best_static"] is None else f"{r['ratio_to_best_static']:.2f}"
        values = [
            escape(r["arm"]),
            f"{r['decode_tok_s']:.1f}",
            f"{r['decode_tok_s_min']:.0f}-{r['decode_tok_s_max']:.0f}",
            f"{r['ratio_to_plain']:.2f}",
            f"{r['ratio_ci'][0]:.2f}-{r['ratio_ci'][1]:.2f}",
            f"{r['ratio_worst_prompt']:.2f}",
            best,
            f"{r['accepted_length']:.2f}",
            f"{r['verified_per_round']:.2f}",
            f"{r['parked_share']:.0%}",
            *(f"{r['time_ms'][name] / total:.0%}" for name in ("draft", "verify", "inject", "own")),
            "identical" if r["identical"] else f'<span class="bad">{escape(difference(r))}</span>',
        ]
        mark = ' class="auto"' if r["arm"] == "auto" else ""
        cells.append(f"<tr{mark}>{''.join(f'<td>{v}</td>' for v in values)}</tr>")
    return f"<table>{''.join(cells)}</table>"


def difference(row: dict[str, Any]) -> str:
    """The first difference from plain decoding in words."""
    first = row["first_difference"]
    margin = "" if first["margin"] is None else f" (logits {first['margin']:.3f} apart)"
    return f"differs at token {first['token']}{margin}"


def _costs(summary: dict[str, Any]) -> str:
    """The cost curve of each format; dots show how often `auto` verified that many tokens."""
    curves = {
        form: sorted((int(n), ms) for n, ms in costs["verify"].items()) for form, costs in summary["costs"].items()
    }
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return ""
    widest = max(n for n, _ in points)
    axes = Axes(
        "cost of a verify pass; dots: how often auto chose it",
        (0, widest + 1),
        (0.0, 1.08 * max(ms for _, ms in points)),
        "tokens in the pass (1 = plain)",
        "ms",
    )
    for tick in range(1, widest + 1):
        axes.x_tick(tick, str(tick))
    for i, (form, curve) in enumerate(curves.items()):
        axes.line([(float(n), ms) for n, ms in curve], colour_of(i))
        chosen = {int(n) + 1: count for n, count in summary["chosen_lengths"].get(form, {}).items()}
        total = sum(chosen.values()) or 1
        for n, ms in curve:
            if chosen.get(n):
                axes.dot(
                    (n, ms), colour_of(i), 2 + 10 * (chosen[n] / total) ** 0.5, f"{chosen[n] / total:.0%} of rounds"
                )
    axes.legend(list(curves))
    return f"<h2>Costs on this machine</h2>{axes.svg()}"


def _reliability(summary: dict[str, Any]) -> Iterable[str]:
    for i, found in enumerate(summary["reliability"]):
        title = f"{found['source']}: predicted and real survival, ECE {found['ece']:.3f}"
        axes = Axes(title, (0.0, 1.0), (0.0, 1.0), "predicted", "happened")
        for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
            axes.x_tick(tick, f"{tick:g}")
        axes.line([(0.0, 0.0), (1.0, 1.0)], "#999999", dashed=True)
        total = sum(b["tokens"] for b in found["bins"]) or 1
        axes.line([(b["predicted"], b["happened"]) for b in found["bins"]], colour_of(i))
        for b in found["bins"]:
            radius = 2 + 12 * (b["tokens"] / total) ** 0.5
            axes.dot((b["predicted"], b["happened"]), colour_of(i), radius, f"{b['tokens']} tokens")
        yield ("<h2>Reliability of confidences</h2>" if i == 0 else "") + axes.svg()
