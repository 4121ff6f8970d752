"""Who runs a block drafter beside a GGUF target: its own backend (libllama, on a CPU our kernels), or torch.

Drafter and target need not share a backend: features cross as arrays. llama.cpp's backend runs `dflash` GGUF files only, torch
runs those and checkpoint folders (gated and RNN heads, Eagle3, Gemma4-style blocks). Which is cheaper differs by machine and by
the number of sequences (libllama's Markov chain costs the same for each, torch's hardly more for eight than for one), so both
are timed once and the answer is kept: by `dspark calibrate` for one sequence, by the first session of several for that many.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from platformdirs import user_cache_path

from dspark_cli.backends.base import BadInput, Drafter, DraftRequest, DsparkError, FloatArray, NotReady, Row
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter, facts_of
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.model import DRAFTER_ARCHITECTURE
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.machine import installed, processor
from dspark_cli.engine.profile import SEVERAL, TAKEN_IN, Notice, budget_s, file_facts
from dspark_cli.kernels import cpu_drafter

RUNNERS = ("auto", "llamacpp", "torch")
BETTER = 0.9  # of the other's time: torch takes a second to import, and must be worth it
REPEATS = 9
CONTEXT = 64  # tokens of context that the passes are timed with
TORCH_ITSELF = 330_000_000  # bytes of the loaded library and of what its first passes allocate (Linux, CPU build)


def open_block_drafter(
    path: Path,
    target: LlamaCppTarget,
    options: ContextOptions,
    runner: str = "auto",
    notice: Notice = lambda text: None,
    spare: int | None = None,
) -> Drafter:
    """The drafter in `path` (a `dflash` GGUF or a checkpoint folder) for a GGUF target; `notice` hears what takes long.

    spare: bytes of memory that torch may take to be chosen by `auto`; None = as much as it needs
    Raises PairMismatch or BadCheckpoint for a drafter that does not fit, NotReady where torch is needed and missing.
    """
    if runner not in RUNNERS:
        raise BadInput(f"unknown drafter backend {runner!r}: one of {', '.join(RUNNERS)}")
    if path.is_dir() and runner == "llamacpp":
        raise BadInput(
            f"{path.name} is a checkpoint folder, which llama.cpp cannot run",
            hint=f"dspark convert {path} drafter.gguf --target {target.info.path}",
        )
    if runner == "auto":
        runner = "torch" if path.is_dir() else _cheaper(path, target, options, notice, spare)
    if runner == "torch":
        return _torch_drafter(path, target, options.threads)
    return LlamaCppDrafter(path, target, options)


def _cheaper(path: Path, target: LlamaCppTarget, options: ContextOptions, notice: Notice, spare: int | None) -> str:
    """Who runs the drafter, as timed before; for several sequences now, if never before. libllama where nothing is known,
    or where torch does not fit in `spare` bytes."""
    if spare is not None and torch_bytes(path, target) > spare:
        return "llamacpp"
    known = remembered(path, target)
    if known is None and target.info.n_seq > 1 and _torch_is_here() and budget_s() >= 1:
        notice(
            f"timing who drafts quicker for {_sequences(target)} sequences, llama.cpp or torch (once, a few seconds)"
        )
        try:
            known = remember(path, target, compare(path, target, options))
        except DsparkError:  # libllama says what is wrong with the pair, or runs what torch cannot
            return "llamacpp"
    return known or "llamacpp"


def torch_bytes(path: Path, target: LlamaCppTarget) -> int:
    """What torch takes beside libllama to run the drafter in `path`: itself, the drafter dequantized, and a copy of its own
    of the target's embedding and output head (measured with the embedded pair: tests/measure_several.py)."""
    tables = 2 * target.info.n_vocab * target.info.n_embd
    return TORCH_ITSELF + 4 * (path.stat().st_size + tables)


def _torch_is_here() -> bool:
    return find_spec("torch") is not None and find_spec("safetensors") is not None


def _torch_drafter(path: Path, target: LlamaCppTarget, threads: int | None) -> Drafter:
    if not _torch_is_here():
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
    """Median ms, by runner, of taking in a round's features and drafting a whole block, for all sequences of the target
    (`SEVERAL` at most); interleaved. Without torch only libllama's."""
    able = [r for r in RUNNERS[1:] if r != "torch" or _torch_is_here()]
    with ExitStack() as stack:
        drafters = {r: stack.enter_context(open_block_drafter(path, target, options, r)) for r in able}
        target.request_features(next(iter(drafters.values())).feature_layers)
        stack.callback(target.drop, 0)
        ids = np.random.default_rng(0).integers(0, target.info.n_vocab, CONTEXT).tolist()
        features = target.step([Row(0, ids, n_logits=1)])[0].features
        assert features is not None
        seqs = range(_sequences(target))
        for drafter in drafters.values():
            drafter.observe_all([(seq, ids, features) for seq in seqs])
        some = features[:TAKEN_IN].copy()
        return _interleaved({r: _passes(d, ids, some, seqs) for r, d in drafters.items()}, REPEATS)


def _sequences(target: LlamaCppTarget) -> int:
    return min(target.info.n_seq, SEVERAL)


def _passes(drafter: Drafter, ids: list[int], features: FloatArray, seqs: Sequence[int]) -> Callable[[], object]:
    """What a round costs beside verifying: take in features of a few tokens, draft a block."""

    def draft() -> None:
        drafter.observe_all([(seq, ids[: len(features)], features) for seq in seqs])
        drafter.propose([DraftRequest(seq, ids[0], drafter.block_size) for seq in seqs])
        for seq in seqs:
            drafter.rewind(seq, len(ids))

    return draft


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
    place, key = _place(path, target), _key(path, target)
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
        raw = json.loads(_place(path, target).read_text(encoding="utf-8"))
        return str(raw["runner"]) if raw["key"] == json.loads(json.dumps(_key(path, target))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place(path: Path, target: LlamaCppTarget) -> Path:
    name = hashlib.sha256(f"{path.absolute()} {_sequences(target)}".encode()).hexdigest()[:24]
    return user_cache_path("dspark") / "runners" / f"{name}.json"


def _key(path: Path, target: LlamaCppTarget) -> Sequence[object]:
    libraries = [installed(name) for name in ("torch", "llama-cpp-python")]
    # Our kernels run the drafter in libllama's place where they can.
    kernels = [target.info.details[word] for word in ("kernels", "kv_type")] + [cpu_drafter.unfit()]
    return [processor(), os.cpu_count(), libraries, kernels, target.context.threads, file_facts(path)]
