"""Verify passes of a fixed shape, recorded once and replayed.

A pass of a small model on a fast device is hundreds of kernels that each take less time than their launch from Python. A
recorded pass has fixed buffers, so its shape must repeat: widths and key counts are padded up to a few sizes, and every
sequence takes part (absent ones as padding).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from dspark_cli.backends.torch.cache import KeyValues, Place
from dspark_cli.backends.torch.network import Network, PassOutput

#: columns of recorded passes; wider ones (prefill) are not recorded
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
#: fewest keys of a recorded pass; then doubled up to the context
FEWEST_KEYS = 256
#: recordings kept; each holds buffers for its outputs
MOST = 48

Run = Callable[[], PassOutput]
#: turns one pass on fixed buffers into something that repeats it
Record = Callable[[Run], Run]


def width_bucket(width: int) -> int | None:
    """The smallest recorded width for `width` columns; None when it is too wide."""
    return next((size for size in WIDTHS if size >= width), None)


def keys_bucket(keys: int, n_ctx: int) -> int:
    """The smallest recorded number of keys for a pass that reads `keys`."""
    size = FEWEST_KEYS
    while size < keys:
        size *= 2
    return min(size, n_ctx)


@dataclass
class _Recording:
    """Buffers int64 [n_seq, L] that a replay reads, and the replay."""

    ids: Tensor
    positions: Tensor
    write_at: Tensor
    replay: Run | None = None


class Recorder:
    """Recorded passes by (columns, keys), all over every sequence of `cache`."""

    def __init__(self, network: Network, cache: KeyValues, n_seq: int, record: Record) -> None:
        self.network, self.cache, self.record = network, cache, record
        self.slots = tuple(range(n_seq))
        self._kept: dict[tuple[int, int], _Recording] = {}

    def __call__(self, ids: Tensor, positions: Tensor, write_at: Tensor, keys: int) -> PassOutput:
        """A pass over int64 [n_seq, L] of a recorded shape; all columns get logits. Views until the next pass."""
        shape = (ids.shape[1], keys)
        kept = self._kept.get(shape)
        if kept is None:
            if len(self._kept) >= MOST:
                self.clear()
            kept = self._kept[shape] = _Recording(ids.clone(), positions.clone(), write_at.clone())
            kept.replay = self.record(self._pass_on(kept, keys))
        for buffer, new in ((kept.ids, ids), (kept.positions, positions), (kept.write_at, write_at)):
            buffer.copy_(new)
        assert kept.replay is not None
        return kept.replay()

    def _pass_on(self, kept: _Recording, keys: int) -> Run:
        place = Place(self.slots, kept.positions, kept.write_at, keys)
        return lambda: self.network(kept.ids, self.cache, place, None)

    def clear(self) -> None:
        """Forget every recording: what a pass must keep has changed, or memory is short."""
        self._kept.clear()


def recorder_for(how: str, device: torch.device) -> Record:
    """How passes are recorded: "graph" or "compile"."""
    return _Graphs(device) if how == "graph" else compiled


def compiled(run: Run) -> Run:
    """Through torch.compile. Every shape is a compilation of its own, so the limit on those is raised."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST)
    mode = "reduce-overhead" if torch.cuda.is_available() else None
    return torch.compile(run, dynamic=False, mode=mode)


#: held while something runs on a recording stream: what another thread sent there would be recorded too
_recording = Lock()


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this process on which passes of `device` are warmed up and recorded.

    torch keeps a cuBLAS workspace for every stream that a product ever ran on (32 MiB on Hopper): with streams of their own,
    targets that were opened and closed left one each. They cannot be taken back at `close`
    (torch._C._cuda_clearCublasWorkspaces): recordings of other targets hold their addresses.
    """
    return torch.cuda.Stream(device)


class _Graphs:
    """CUDA and HIP graphs, in one memory pool: a replay's outputs are read before the next replay.

    Warming up and recording share one stream: what libraries make for a stream while recording would lie in the pool for
    good. A pool cannot be used again once all its graphs are gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = _recording_stream(device)
        self.device = device
        self._replays: list[weakref.ref[Run]] = []

    def __call__(self, run: Run) -> Run:
        self._replays = [replay for replay in self._replays if replay() is not None]
        if not self._replays:
            self._pool = torch.cuda.graph_pool_handle()
        with _recording:
            graph, output = self._record(run)

        def replay() -> PassOutput:
            graph.replay()
            return output

        self._replays.append(weakref.ref(replay))
        return replay

    def _record(self, run: Run) -> tuple[torch.cuda.CUDAGraph, PassOutput]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # libraries set themselves up outside the recording
            for _ in range(2):
                run()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads ask of the device meanwhile (free memory, say) does not spoil the recording
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            output = run()
        return graph, output
