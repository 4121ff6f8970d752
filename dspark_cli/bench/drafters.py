"""DSpark, DFlash and Eagle3 for one target: the same texts, the same anchors or time, the same prompts.

    python -m dspark_cli.bench.drafters smollm2-135m --anchors 300000 --work FOLDER --format F16 -o docs/drafters

FOLDER holds `documents.jsonl` and `features/` (a work folder of `dspark train` will do); every drafter is trained there
anew with each seed. Written are NAME.json, NAME.md (the table) and NAME.svg (the curves). Anchors are the fairer budget: a
process takes longer while others use the memory, up to twice as long here; the minutes of each drafter are in the table.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dspark_cli.backends.base import Drafter
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.machine import processor
from dspark_cli.backends.torch.drafter import make_drafter
from dspark_cli.backends.torch.speed import fastest_dtype
from dspark_cli.bench.arms import Arm, answer
from dspark_cli.bench.formats import requantize
from dspark_cli.bench.plots import lines, standalone
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off
from dspark_cli.engine.stats import Stats
from dspark_cli.training.evaluate import evaluate
from dspark_cli.training.pipeline import Pipeline, Recipe, own_prompts
from dspark_cli.training.process import prepare_process

DRAFTERS = ("dspark", "dflash", "eagle3")
KINDS_USED = ("question", "arithmetic", "code", "story")  # of `own_prompts`


class _Quiet:
    """Says a line at the end of a stage."""

    def __init__(self, name: str) -> None:
        self._name = name

    def begin(self, stage: str, total: float, have: float, note: str) -> None:
        print(f"{self._name}: {stage}, {note}", flush=True)

    def advance(self, amount: float, note: str = "") -> None:
        pass

    def end(self) -> None:
        pass


def train(target: Path, shared: Path, recipe: Recipe) -> tuple[Drafter, list[dict[str, Any]]]:
    """A drafter trained by `recipe` on the texts in `shared`, and its curve."""
    budget = f"{recipe.anchors} anchors" if recipe.anchors else f"{recipe.hours:g} hours"
    work = shared / "compare" / budget / f"{recipe.kind}-{recipe.seed}"
    work.mkdir(parents=True, exist_ok=True)
    for name in ("documents.jsonl", "features"):
        if not (work / name).exists():
            os.symlink(shared / name, work / name)
    if not (work / "checkpoint.pt").exists():
        (work / "curve.jsonl").unlink(missing_ok=True)
    trainer, _ = Pipeline(target, work, recipe, _Quiet(work.name)).train()
    model = trainer.model.float().eval().requires_grad_(False)
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    return make_drafter(model.to(fastest_dtype(model.config)), name=work.name), curve


def speeds(target: LlamaCppTarget, drafters: Mapping[str, Drafter], requests: Sequence[Request]) -> dict[str, Any]:
    """Best fixed length of each drafter against plain decoding: ratios inside a cycle, plain before and after.

    The length is chosen on every other request and judged on the rest.
    """
    ratios: dict[str, dict[int, list[float]]] = {name: {} for name in drafters}
    for request in requests:
        for name, drafter in drafters.items():
            arms = [Arm(f"{name}:{n}", drafter, Fixed(n)) for n in range(1, drafter.block_size + 1)]
            before = _rate(target, Arm("plain", None, Off()), request)
            rates = [_rate(target, arm, request) for arm in arms]
            plain = (before + _rate(target, Arm("plain", None, Off()), request)) / 2
            for n, rate in enumerate(rates, start=1):
                ratios[name].setdefault(n, []).append(rate / plain)
    best = {name: max(by, key=lambda n: fmean(by[n][::2])) for name, by in ratios.items()}
    return {
        name: {"best_length": n, "ratio_to_plain": round(fmean(ratios[name][n][1::2]), 3)} for name, n in best.items()
    }


def _rate(target: LlamaCppTarget, arm: Arm, request: Request) -> float:
    return Stats.of(answer(target, arm, request)).decode_tok_s


def compare(
    target: Path,
    served: Path,
    shared: Path,
    recipe: Recipe,
    seeds: Sequence[int],
    tokens: int,
    prompts: int | None = None,
) -> dict[str, Any]:
    """Figures of every drafter and seed on the target file `served`; `prompts`: of each kind, None = all."""
    trained = {
        f"{kind}-{seed}": train(target, shared, replace(recipe, kind=kind, seed=seed))
        for kind in DRAFTERS
        for seed in seeds
    }
    with LlamaCppTarget(served, ContextOptions(ctx=1024)) as opened:
        groups = {kind: texts[:prompts] for kind, texts in own_prompts(opened).items()}
        found = {name: evaluate(opened, d, groups, tokens=tokens) for name, (d, _) in trained.items()}
        ends = opened.tokenizer.eog_ids
        flat = [ids for texts in zip(*groups.values(), strict=True) for ids in texts]
        requests = [Request(ids, tokens, SamplingOptions(), ends) for ids in flat]
        first = {name: d for name, (d, _) in trained.items() if name.endswith(f"-{seeds[0]}")}
        for drafter in first.values():
            opened.request_features(drafter.feature_layers)
        quick = speeds(opened, first, requests[::2])
    return {
        "schema": "dspark-drafters/1",
        "machine": processor(),
        "served": served.name,
        "recipe": vars(recipe),
        "seeds": list(seeds),
        "curves": {name: curve for name, (_, curve) in trained.items()},
        "evaluations": found,
        "speeds": quick,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: tau by drafter and temperature, with the spread over seeds, and the best fixed length's speed."""
    rows = [
        "| drafter | anchors | minutes | expected tau | tau greedy | tau at temperature 1 | greedy by kind | "
        "best fixed length | plain x |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in DRAFTERS:
        names = [n for n in found["evaluations"] if n.startswith(f"{kind}-")]
        taus = {t: [_tau(found["evaluations"][n], "all", t) for n in names] for t in (0.0, 1.0)}
        kinds = ", ".join(f"{k} {fmean(_tau(found['evaluations'][n], k, 0.0) for n in names):.2f}" for k in KINDS_USED)
        speed, ends = found["speeds"][names[0]], [found["curves"][n][-1] for n in names]
        anchors, minutes = fmean(p["positions"] for p in ends), 60 * fmean(p["hours"] for p in ends)
        expected = _spread([p["expected_tau"] for p in ends])
        rows.append(
            f"| {kind} | {anchors:,.0f} | {minutes:.1f} | {expected} | {_spread(taus[0.0])} | {_spread(taus[1.0])} | {kinds} | "
            f"{speed['best_length']} | {speed['ratio_to_plain']:.2f} |"
        )
    return "\n".join(rows) + "\n"


def _tau(evaluation: dict[str, Any], group: str, temperature: float) -> float:
    rows = evaluation["rows"]
    return next(float(r["accepted_length"]) for r in rows if r["prompts"] == group and r["temperature"] == temperature)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")


def plot(found: dict[str, Any]) -> str:
    """Expected tau (teacher forced, held-out texts, mean over seeds) against thousands of anchors."""
    curves = {}
    for kind in DRAFTERS:
        seeds = [c for n, c in found["curves"].items() if n.startswith(f"{kind}-")]
        together = zip(*seeds, strict=False)  # looked at after the same shares of the schedule
        curves[kind] = [
            (fmean(p["positions"] for p in at) / 1000, fmean(p["expected_tau"] for p in at)) for at in together
        ]
    return standalone(lines("Held-out expected tau by anchors", curves, "thousand anchors", "tau", bottom=1.0))


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m dspark_cli.bench.drafters", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=0.1, help="of training, for each drafter and seed")
    parser.add_argument("--anchors", type=int, default=0, help="to train on instead; 0 = the hours count (default 0)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--format", default="F16", help="of the target that is decoded")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, help="of each kind that are decoded (default all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--out", type=Path, default=Path("drafters"))
    args = parser.parse_args(arguments)

    from dspark_cli.registry import resolve

    prepare_process(args.threads)
    target = resolve(args.model).path
    served = requantize(target, args.format, args.work / "formats")
    recipe = Recipe(
        args.model,
        layers=1,
        block=args.block,
        vocabulary=args.vocab,
        hours=args.hours,
        through="torch",
        anchors=args.anchors,
    )
    found = compare(target, served, args.work, recipe, range(args.seeds), args.tokens, args.prompts)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".svg").write_text(plot(found))
    args.out.with_suffix(".md").write_text(table(found))
    say(table(found))


if __name__ == "__main__":
    main()
