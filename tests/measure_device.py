"""What torch makes of a device: a checkpoint of Qwen3's shape and a DSpark drafter, both with random weights.

    python tests/measure_device.py --shape 4b --device cuda       needs 10 GB under --folder and 12 GB on the device

Four things, in this order: ms of a verify pass by its tokens at two depths, recorded and eager; ms of the drafter's pass by
the path of its kernels; speed of `auto` and `fixed:7` over plain decoding (a random drafter: what a useless one costs); memory
planned and taken. `--device cpu --shape tiny` tries the script.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import gettempdir

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from dspark_cli.backends.base import Drafter, DraftRequest, Row
from dspark_cli.backends.torch.checkpoint import build
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.export import save_drafter
from dspark_cli.backends.torch.target import TorchTarget
from dspark_cli.engine.rounds import Request
from dspark_cli.engine.schedule import parse_policy
from dspark_cli.engine.session import OpenOptions, Session
from dspark_cli.engine.stats import Stats
from dspark_cli.kernels import dispatch
from dspark_cli.registry.devices import this_machine
from dspark_cli.registry.plan import PlanOptions
from dspark_cli.registry.resolve import Resolved, plan_for
from tiny import save_tokenizer

CTX, DEPTHS, BLOCK = 4096, (64, 1984), 7


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    taps: tuple[int, ...]
    rank: int


SHAPES = {
    "4b": Shape(2560, 36, 32, 8, 128, 9728, 151_936, (1, 9, 17, 25, 33), 256),  # Qwen3-4B
    "tiny": Shape(128, 6, 4, 2, 32, 256, 4096, (1, 2, 4), 16),
}


def write(shape: Shape, folder: Path, device: str) -> None:
    """Target and drafter in bfloat16 under `folder`, unless they are there."""
    if (folder / "drafter" / "config.json").exists():
        return
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "target")
    save_tokenizer(folder / "target")
    drafting = DrafterConfig(
        kind="dspark",
        family="qwen3",
        hidden_size=shape.hidden,
        target_hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_layers=5,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        draft_vocab_size=shape.vocabulary,
        block_size=BLOCK,
        target_layer_ids=shape.taps,
        num_target_layers=shape.layers,
        mask_token_id=shape.vocabulary - 1,
        max_position_embeddings=40_960,
        markov_rank=shape.rank,
        confidence_head=True,
        confidence_head_with_markov=True,
    )
    with torch.device(device):
        model = build(drafting).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    borrowed = ("embed_tokens.weight", "lm_head.weight")
    save_drafter(model, folder / "drafter", dtype=torch.bfloat16, without=borrowed)


def timed(job: Callable[[], object], *, repeats: int = 8, warm: int = 2) -> float:
    """Median ms; every job ends with its results on the host."""
    times = []
    for _ in range(warm + repeats):
        began = time.perf_counter()
        job()
        times.append((time.perf_counter() - began) * 1e3)
    return median(times[warm:])


def fill(target: TorchTarget, drafter: Drafter, ids: Sequence[int]) -> None:
    """Sequence 0 of both with `ids` cached and nothing else."""
    target.drop(0)
    drafter.drop(0)
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        drafter.observe(0, part, target.step([Row(0, part, 1)])[0].features)


def verify_curve(target: TorchTarget, ids: Sequence[int]) -> dict[int, float]:
    """Tokens of a pass -> ms, after what is cached."""
    length = target.length(0)

    def one(tokens: int) -> None:
        target.step([Row(0, ids[:tokens])])
        target.rewind(0, length)

    return {tokens: timed(lambda tokens=tokens: one(tokens)) for tokens in range(1, 17)}  # type: ignore[misc]


def print_passes(session: Session, ids: Sequence[int]) -> None:
    target, drafter = session.target, getattr(session.drafter, "model", session.drafter)
    assert isinstance(target, TorchTarget)
    recorder = target._recorder
    for depth in DEPTHS:
        fill(target, drafter, ids[:depth])
        for name in ("recorded", "eager") if recorder is not None else ("eager",):
            target._recorder = recorder if name == "recorded" else None
            curve = verify_curve(target, ids)
            print(f"verify, {name:8}  at {depth:4}:", " ".join(f"{n}:{ms:.2f}" for n, ms in curve.items()), flush=True)
        target._recorder = recorder
        for path in dispatch.PATHS if target.device.type == "cuda" and dispatch.installed() else ("reference",):
            dispatch.use(path)
            found = {n: timed(lambda n=n: drafter.propose([DraftRequest(0, ids[1], n)])) for n in (1, 4, BLOCK)}  # type: ignore[misc]
            print(f"draft, {path:9}  at {depth:4}:", " ".join(f"{n}:{ms:.2f}" for n, ms in found.items()), flush=True)
        dispatch.use("reference")


def print_speeds(session: Session, ids: Sequence[int], tokens: int, cycles: int) -> None:
    """The first cycle of every arm is a warm-up: it records the shapes that no profile did."""
    auto = session.schedule
    for cycle in range(cycles + 1):
        request = Request(ids[100 * cycle : 100 * cycle + 64], tokens)
        stats: dict[str, Stats] = {}
        for arm in ("plain", "auto", "fixed:7", "plain again"):
            session._engine.forget()
            session.schedule = parse_policy(arm) if arm.startswith("fixed") else auto
            stats[arm] = Stats.of(list(session.run(request, plain=arm.startswith("plain"))))
        plain = (stats["plain"].decode_tok_s + stats["plain again"].decode_tok_s) / 2
        ratios = ", ".join(f"{arm} {stats[arm].decode_tok_s / plain:.3f}" for arm in ("auto", "fixed:7"))
        name, parked = f"cycle {cycle}" if cycle else "warm-up", stats["auto"].parked_share
        print(f"{name}: plain {plain:.1f} tok/s, over it {ratios}; auto parked {parked:.0%}", flush=True)
    session.schedule = auto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "dspark-random", help="of the checkpoints")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer (default 256)")
    parser.add_argument("--cycles", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder / options.shape
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # the profile of random weights is nobody's
    write(SHAPES[options.shape], folder, options.device)
    target, drafter = folder / "target", folder / "drafter"
    plan = plan_for(Resolved("random", target, drafter), this_machine(), PlanOptions(ctx=CTX))
    opened = OpenOptions(
        target, "random", drafter=str(drafter), policy="auto", ctx=CTX, device=options.device, notice=print
    )
    ids = np.random.default_rng(0).integers(0, SHAPES[options.shape].vocabulary - 1, size=CTX).tolist()
    with Session.open(opened) as session:
        details = session.target.info.details
        print(f"{details['chip']}, torch {torch.__version__}, capture {details['capture']}")
        print_passes(session, ids)
        print_speeds(session, ids, options.tokens, options.cycles)
    print(f"planned on {plan.device.name} {(plan.on_device or plan.total) / 1e9:.2f} GB")
    if options.device != "cpu":
        print(f"taken there at most {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
