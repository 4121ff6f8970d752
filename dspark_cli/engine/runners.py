"""Who runs a block drafter beside a GGUF target: libllama, or torch.

Drafter and target need not share a backend: features cross as arrays. libllama runs `dflash` GGUF files only, torch runs
those and checkpoint folders (gated and RNN heads, Eagle3, Gemma4-style blocks). Which is cheaper differs per machine, so
`dspark calibrate` times both and the answer is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from platformdirs import user_cache_path

from dspark_cli.backends.base import BadInput, Drafter, DraftRequest, NotReady, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter, facts_of
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.model import DRAFTER_ARCHITECTURE
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.machine import installed, processor
from dspark_cli.engine.profile import file_facts

RUNNERS = ("auto", "llamacpp", "torch")
BETTER = 0.9  # of the other's time: torch takes a second to import, and must be worth it
REPEATS = 9
CONTEXT = 64  # tokens of context that the passes are timed with


def open_block_drafter(path: Path, target: LlamaCppTarget, options: ContextOptions, runner: str = "auto") -> Drafter:
    """The drafter in `path` (a `dflash` GGUF or a checkpoint folder) for a GGUF target.

    Raises PairMismatch or BadCheckpoint for a drafter that does not fit, NotReady where torch is needed and missing.
    """
    if runner not in RUNNERS:
        raise BadInput(f"unknown drafter backend {runner!r}: one of {', '.join(RUNNERS)}")
    if path.is_dir() and runner == "llamacpp":
        raise BadInput(
            f"{path.name} is a checkpoint folder, which llama.cpp cannot run",
            hint=f"dspark convert {path} drafter.gguf --target {target.info.path}",
        )
    if path.is_dir() or runner == "torch" or (runner == "auto" and remembered(path, target) == "torch"):
        return _torch_drafter(path, target, options.threads)
    return LlamaCppDrafter(path, target, options)


def _torch_drafter(path: Path, target: LlamaCppTarget, threads: int | None) -> Drafter:
    if find_spec("torch") is None or find_spec("safetensors") is None:
        raise NotReady(f"{path.name} needs torch to draft, not installed here", hint="pip install 'dspark[torch]'")
    import torch

    from dspark_cli.backends.torch.checkpoint import check_pair
    from dspark_cli.backends.torch.dialects import read_config
    from dspark_cli.backends.torch.drafter import make_drafter, open_drafter
    from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, target_tables
    from dspark_cli.backends.torch.speed import fastest_dtype

    torch.set_num_threads(threads or target.context.threads)
    file, info = Path(target.info.path), target.info
    if path.is_file():
        model = load_gguf_drafter(path, file, facts=facts_of(target.model))
        name = f"{path.name} (torch)"  # another runner has other costs: profiles go by this name
        return make_drafter(model.to(fastest_dtype(model.config)), name=name, n_vocab=info.n_vocab)
    config = read_config(path)
    check_pair(
        config, n_vocab=info.n_vocab, n_embd=info.n_embd, n_layer=info.n_layer - 1, name=path.name, target=info.name
    )
    return open_drafter(
        path,
        n_vocab=info.n_vocab,
        n_embd=info.n_embd,
        n_layer=info.n_layer,
        tables=target_tables(file),
        dtype=fastest_dtype(config),
    )


def time_runners(path: Path | None, model: Path, options: ContextOptions) -> dict[str, float] | None:
    """Time libllama and torch for the `dflash` GGUF `path` and keep the cheaper; None where there is no choice."""
    if path is None or not path.is_file() or model.is_dir() or read_header(path).architecture != DRAFTER_ARCHITECTURE:
        return None
    with LlamaCppTarget(model, replace(options, n_seq=1)) as target:
        times = compare(path, target, options)
        remember(path, target, times)
    return times


# -- which is cheaper ----------------------------------------------------------------------------------------------------


def compare(path: Path, target: LlamaCppTarget, options: ContextOptions) -> dict[str, float]:
    """Median ms of a whole draft pass by runner, interleaved; without torch only libllama's."""
    able = [r for r in RUNNERS[1:] if r != "torch" or (find_spec("torch") and find_spec("safetensors"))]
    drafters = {r: open_block_drafter(path, target, options, r) for r in able}
    layers = next(iter(drafters.values())).feature_layers
    target.request_features(layers)
    try:
        ids = np.random.default_rng(0).integers(0, target.info.n_vocab, CONTEXT).tolist()
        features = target.step([Row(0, ids, n_logits=1)])[0].features
        for drafter in drafters.values():
            drafter.observe(0, ids, features)
        passes = {r: _passes(d, ids[0]) for r, d in drafters.items()}
        return _interleaved(passes, REPEATS)
    finally:
        for drafter in drafters.values():
            drafter.close()
        target.drop(0)


def _passes(drafter: Drafter, anchor: int) -> Callable[[], object]:
    return lambda: drafter.propose([DraftRequest(0, anchor, drafter.block_size)])


def _interleaved(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median ms of each job, all of them in turn; the first turn only warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: median(samples[1:]) for name, samples in times.items()}


def remember(path: Path, target: LlamaCppTarget, times: dict[str, float]) -> str:
    """Keep which runner is cheaper for this drafter on this machine; returns it."""
    best = "torch" if times.get("torch", np.inf) < BETTER * times["llamacpp"] else "llamacpp"
    place, key = _place(path), _key(path, target)
    unfinished = place.with_suffix(f".{os.getpid()}.part")
    with suppress(OSError):  # a cache that cannot be written only costs the choice
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"key": key, "runner": best, "ms": times}))
        unfinished.replace(place)
    return best


def remembered(path: Path, target: LlamaCppTarget) -> str | None:
    """The cheaper runner, if both were timed for this very drafter, machine and libraries; None if not."""
    if find_spec("torch") is None:
        return None
    try:
        raw = json.loads(_place(path).read_text(encoding="utf-8"))
        return str(raw["runner"]) if raw["key"] == json.loads(json.dumps(_key(path, target))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
    return user_cache_path("dspark") / "runners" / f"{name}.json"


def _key(path: Path, target: LlamaCppTarget) -> Sequence[object]:
    libraries = [installed(name) for name in ("torch", "llama-cpp-python")]
    return [processor(), os.cpu_count(), libraries, target.context.threads, file_facts(path)]
