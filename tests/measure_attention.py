"""What passes cost with flash attention and without it, and whether logits depend on the width of a pass.

    python tests/measure_attention.py --format Q8_0

Prints medians in ms by the tokens of the pass and the depth of the context, the variants in turn; the speed of a prompt of
1,024 tokens; and of a greedy answer of 400 tokens, how far the logits of passes of 5 tokens lie from those of passes of one,
and how many of its tokens they would change. The drafter's pass is timed too, and with `--parallel 8,16,32` passes over so
many sequences in one cache instead of all that. Not part of the test suite.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import gettempdir

import numpy as np

from dspark_cli.backends.base import DraftRequest, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize
from dspark_cli.registry import resolve

DEPTHS, WIDTHS = (32, 150, 700), (1, 2, 3, 4, 5)
FLASH = ("on", "off")
STORY = "Write a short story about a lighthouse keeper who finds a map."


def pass_ms(target: LlamaCppTarget, ids: list[int], depth: int) -> float:
    began = time.perf_counter()
    target.step([Row(0, ids)])
    took = time.perf_counter() - began
    target.rewind(0, depth)
    return took * 1e3


def verify_costs(targets: dict[str, LlamaCppTarget], ids: list[int], repeats: int) -> None:
    for depth in DEPTHS:
        found: dict[tuple[str, int], list[float]] = {}
        for target in targets.values():
            target.drop(0)
            target.step([Row(0, ids[:depth], n_logits=1)])
        for _ in range(repeats):
            for flash, target in targets.items():
                for width in WIDTHS:
                    times = [pass_ms(target, ids[7 : 7 + width], depth) for _ in range(6)]
                    found.setdefault((flash, width), []).extend(times[1:])
        for flash in targets:
            figures = " ".join(f"{median(found[flash, width]):6.1f}" for width in WIDTHS)
            print(f"depth {depth:4}, flash {flash:3}: {figures} ms for {WIDTHS[0]}-{WIDTHS[-1]} tokens", flush=True)


def parallel_costs(path: Path, ids: list[int], n_seq: int, repeats: int) -> None:
    """Passes of one and two tokens for each of `n_seq` sequences, at 150 tokens of context."""
    options = ContextOptions(ctx=256, n_seq=n_seq)
    targets = {flash: LlamaCppTarget(path, replace(options, flash_attn=flash)) for flash in FLASH}
    found: dict[tuple[str, int], list[float]] = {}
    for target in targets.values():
        for seq in range(n_seq):
            target.step([Row(seq, ids[:150], n_logits=1)])
    for _ in range(3 * repeats):
        for flash, target in targets.items():
            for width in (1, 2):
                began = time.perf_counter()
                target.step([Row(seq, ids[7 : 7 + width]) for seq in range(n_seq)])
                found.setdefault((flash, width), []).append((time.perf_counter() - began) * 1e3)
                for seq in range(n_seq):
                    target.rewind(seq, 150)
    for flash, target in targets.items():
        print(f"{n_seq:3} sequences, flash {flash:3}: {median(found[flash, 1]):.1f} {median(found[flash, 2]):.1f} ms")
        target.close()


def prompt_speed(path: Path, ids: list[int], repeats: int) -> None:
    variants = (("on", 512), ("off", 512), ("off", 256))
    targets = {v: LlamaCppTarget(path, ContextOptions(ctx=2048, flash_attn=v[0], ubatch=v[1])) for v in variants}
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for variant, target in targets.items():
            target.drop(0)
            began = time.perf_counter()
            for begin in range(0, len(ids), 512):
                target.step([Row(0, ids[begin : begin + 512], n_logits=1)])
            found.setdefault(variant, []).append(len(ids) / (time.perf_counter() - began))
    for (flash, rows), target in targets.items():
        speed = median(found[flash, rows])
        print(f"a prompt of {len(ids)} tokens, flash {flash:3}, {rows} rows at once: {speed:.0f} tok/s")
        target.close()


def draft_costs(target: LlamaCppTarget, drafter: Path, ids: list[int], repeats: int) -> None:
    drafters = {flash: LlamaCppDrafter(drafter, target, ContextOptions(ctx=2048, flash_attn=flash)) for flash in FLASH}
    target.request_features(drafters["on"].feature_layers)
    target.drop(0)
    done = 0
    for depth in DEPTHS:
        new = ids[done:depth]
        features = target.step([Row(0, new, 0)])[0].features
        assert features is not None
        for drafter_ in drafters.values():
            drafter_.observe(0, new, features.copy())
        request = DraftRequest(0, ids[depth], drafters["on"].block_size)
        found: dict[str, list[float]] = {}
        for _ in range(6 * repeats):
            for flash, drafter_ in drafters.items():
                began = time.perf_counter()
                drafter_.propose([request])
                found.setdefault(flash, []).append((time.perf_counter() - began) * 1e3)
        figures = ", ".join(f"{flash} {median(times):.1f}" for flash, times in found.items())
        print(f"depth {depth:4}, a draft pass in ms, flash {figures}", flush=True)
        done = depth
    target.request_features(())
    for drafter_ in drafters.values():
        drafter_.close()


def answer(target: LlamaCppTarget, prompt: list[int], n_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """Greedy tokens and the logits they were read from."""
    target.drop(0)
    logits = target.step([Row(0, prompt, 1)])[0].logits[-1].copy()
    for _ in range(n_tokens):
        token = int(logits.argmax())
        yield token, logits
        logits = target.step([Row(0, [token])])[0].logits[0].copy()


def tokens_changed(flash: str, target: LlamaCppTarget) -> None:
    prompt = target.tokenizer.encode(target.render_chat([{"role": "user", "content": STORY}]), special=True)
    tokens, alone = zip(*answer(target, prompt, 400), strict=True)
    target.rewind(0, len(prompt))
    wide = [alone[0][None]]
    for begin in range(0, len(tokens) - 1, 5):
        wide.append(target.step([Row(0, list(tokens[begin : min(begin + 5, len(tokens) - 1)]))])[0].logits.copy())
    others = np.concatenate(wide)
    apart = np.sqrt(np.mean((others - np.array(alone)) ** 2))
    changed = int((others.argmax(1) != np.array(tokens)).sum())
    print(f"flash {flash:3}: passes of 5 lie {apart:.4f} logits from passes of 1 (rms); {changed} of 400 tokens change")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="Q8_0", help="requantize the target to this first (default Q8_0)")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--parallel", default="", help="sequences at once, such as 8,16,32")
    options = parser.parse_args()
    pair = resolve("smollm2-135m")
    path = requantize(pair.path, options.format, Path(gettempdir()) / "dspark-formats")
    ids = np.random.default_rng(0).integers(100, 40_000, 1024).tolist()
    if options.parallel:
        for n_seq in map(int, options.parallel.split(",")):
            parallel_costs(path, ids, n_seq, options.repeats)
        return
    prompt_speed(path, ids, options.repeats)
    targets = {flash: LlamaCppTarget(path, ContextOptions(ctx=2048, flash_attn=flash)) for flash in FLASH}
    verify_costs(targets, ids, options.repeats)
    if pair.drafter_path:
        draft_costs(targets["on"], pair.drafter_path, ids, options.repeats)
    for flash, target in targets.items():
        tokens_changed(flash, target)
        target.close()


if __name__ == "__main__":
    main()
