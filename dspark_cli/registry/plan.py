"""The memory plan: what a pair needs on a device, before anything is loaded. Arithmetic; of this machine it asks only who
computes on its CPU, and on how many cores.

Every figure is bytes. A part that a CPU only reserves and never touches is not counted there: a device with memory of its
own commits what it allocates, a CPU what is written. The constants below were fitted to libllama 0.3.36 and are checked
against real loads by tests/test_plan_measured.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dspark_cli.backends.llamacpp.attention import FEW_SEQUENCES, flash_word, score_bytes, ubatch_rows
from dspark_cli.backends.machine import usable_cores
from dspark_cli.kernels import cpu_drafter

GIB = 1024**3
MIB = 1024**2
#: bytes of one cached value by KV type (blocks of 32 values with their scales)
KV_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}
DEFAULT_CTX = 4096
#: what torch makes for itself at its first passes on a CPU (measured: 36 to 50 MB with models of 85 to 490 MB)
TORCH_CPU = 42_000_000
#: of a context beside its buffers
PER_CONTEXT = 2_000_000
#: contexts tried, longest first, when none was asked for and the default does not fit
SHORTER_CTX = (2048, 1024)


@dataclass(frozen=True)
class Device:
    """Something weights can lie on.

    kind:    cpu, cuda, rocm, metal or vulkan
    total:   bytes; free: bytes that could be allocated now (Metal: of the recommended maximum)
    runs:    backends that can use it here: "llamacpp", "torch"
    unified: it shares the machine's memory (Apple, integrated GPUs), so target, drafter and system draw on one pool
    """

    name: str
    kind: str
    total: int
    free: int
    runs: tuple[str, ...] = ("llamacpp",)
    unified: bool = False

    @property
    def usable(self) -> int:
        """Free bytes less what must stay free: allocators fragment, displays and other programs grow."""
        margin = min(512 * MIB, self.total // 16)
        return max(0, self.free - margin)


@dataclass(frozen=True)
class TargetSize:
    """What the plan must know of a target.

    weights:   bytes of the weight files as loaded
    kv_values: cached values a token: sum over layers of key width + value width
    n_ff:      widest feed-forward layer (of one expert)
    n_head:    query heads of a layer (the most of any)
    few_sequences: up to which attention on a CPU does without flash (attention.few_sequences)
    """

    weights: int
    n_layer: int
    n_embd: int
    n_vocab: int
    kv_values: int
    n_ff: int = 0
    n_ctx_train: int = DEFAULT_CTX
    n_head: int = 0
    few_sequences: int = 0


@dataclass(frozen=True)
class DrafterSize:
    """What the plan must know of a drafter; of a small model (kind "small") the same as of a target.

    features: m*d, values of target features a token; 0 when it reads none
    n_logits: rows of its output head (a reduced vocabulary has fewer); 0 when it has no passes (lookup)
    """

    kind: str
    weights: int
    n_layer: int
    n_embd: int
    n_vocab: int
    kv_values: int
    n_ff: int = 0
    block_size: int = 8
    features: int = 0
    n_head: int = 0

    @property
    def width(self) -> int:
        """Rows of the largest verify pass: the anchor and a whole block."""
        return 1 + self.block_size


@dataclass(frozen=True)
class Need:
    """Bytes of one loaded model.

    scores:   what attention writes out, scores or masks; like the KV it grows with the context
    overhead: vocabulary and tensor tables, which lie in ordinary memory
    """

    weights: int = 0
    kv: int = 0
    scores: int = 0
    compute: int = 0
    features: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.scores + self.compute + self.features + self.overhead


@dataclass(frozen=True)
class MemoryPlan:
    """What will be allocated where.

    on_device, on_host: bytes; the whole plan is on the host when the device is the CPU
    gpu_layers:         target layers on the device (all of them = n_layer + 1, counting the output head; 0 on a CPU)
    verify_width:       rows of the largest verify pass
    """

    device: Device
    backend: str
    target: Need
    drafter: Need | None
    ctx: int
    n_seq: int
    kv_type: str
    gpu_layers: int
    n_layer: int
    verify_width: int
    on_device: int
    on_host: int
    host_free: int
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        return self.on_device + self.on_host

    @property
    def fits(self) -> bool:
        if self.device.kind == "cpu" or self.device.unified:
            return self.total <= self.device.usable
        return self.on_device <= self.device.usable and self.on_host <= self.host_free

    def or_refuse(self, name: str) -> MemoryPlan:
        """This plan. Raises NotReady with the numbers, and the longest context that would fit, when it does not fit."""
        if self.fits:
            return self
        from dspark_cli.backends.errors import NotReady

        short, free = (
            (self.on_host, self.host_free)
            if self.on_device <= self.device.usable
            else (self.on_device, self.device.usable)
        )
        if self.device.kind == "cpu" or self.device.unified:
            short, free = self.total, self.device.usable
        growing = sum(need.kv + need.scores for need in (self.target, self.drafter) if need)
        room = free - (short - growing)
        ctx = int(self.ctx * room / growing) // 256 * 256 if growing else 0
        fewer = f"--ctx {ctx} fits" if ctx >= 256 else "a smaller quant or model: `dspark models --fits`"
        raise NotReady(
            f"{name} with {self.ctx} tokens of context needs {size(short)} on {self.device.name}, {size(free)} can be used",
            hint=fewer,
        )

    @property
    def host_spare(self) -> int:
        """Bytes of ordinary memory that this plan leaves."""
        if self.device.kind == "cpu" or self.device.unified:
            return max(0, self.device.usable - self.total)
        return max(0, self.host_free - self.on_host)

    @property
    def offload(self) -> str:
        """Where the target's layers lie, in words."""
        if self.device.kind == "cpu":
            return self.device.name
        if self.gpu_layers > self.n_layer:
            return f"all on {self.device.name}"
        return f"{self.gpu_layers} of {self.n_layer} layers on {self.device.name}"

    def line(self) -> str:
        """The plan in one line, as printed at the start."""
        parts = [f"target {size(self.target.weights)}"]
        if self.drafter is not None and self.drafter.total:
            parts.append(f"drafter {size(self.drafter.weights)}")
        kv = self.target.kv + (self.drafter.kv if self.drafter else 0)
        parts.append(f"KV {size(kv)} ({self.ctx} tokens{f' x {self.n_seq}' if self.n_seq > 1 else ''}, {self.kv_type})")
        rest = self.total - self.target.weights - kv - (self.drafter.weights if self.drafter else 0)
        parts.append(f"buffers {size(rest)}")
        free = self.device.free
        return f"{size(self.total)} of {size(free)} free on {self.device.name}: {', '.join(parts)}; {self.offload}"

    def as_dict(self) -> dict[str, object]:
        """Everything, for `doctor --json`."""
        return {
            "device": self.device.name,
            "device_kind": self.device.kind,
            "device_free_bytes": self.device.free,
            "backend": self.backend,
            "fits": self.fits,
            "total_bytes": self.total,
            "device_bytes": self.on_device,
            "host_bytes": self.on_host,
            "target": vars(self.target),
            "drafter": vars(self.drafter) if self.drafter else None,
            "ctx": self.ctx,
            "sequences": self.n_seq,
            "kv_type": self.kv_type,
            "gpu_layers": self.gpu_layers,
            "n_layer": self.n_layer,
            "verify_width": self.verify_width,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for; None leaves the choice to the plan."""

    ctx: int | None = None
    n_seq: int = 1
    kv_type: str = "f16"
    gpu_layers: int | None = None
    flash_attn: str = "auto"

    def flash(self, device: Device, backend: str, *, few: int) -> str:
        """The attention that is computed: auto, on, or off, which writes scores out."""
        if backend != "llamacpp":
            return "on"
        return flash_word(self.flash_attn, self.kv_type, device.kind == "cpu", self.n_seq, few=few)


def size(n_bytes: int) -> str:
    """Bytes as people read them: "9.1 GB", "98 MB", "12 kB"."""
    if 0 < n_bytes < 0.95e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 0.95e9 else f"{n_bytes / 1e6:.0f} MB"


def kv_bytes(values: int, ctx: int, n_seq: int, kv_type: str) -> int:
    """Keys and values of `n_seq` sequences; libllama pads a context to a multiple of 256."""
    return int(values * _cached(ctx, n_seq) * KV_BYTES[kv_type])


def _cached(ctx: int, n_seq: int) -> int:
    return -(-ctx * n_seq // 256) * 256


def target_need(
    target: TargetSize,
    device: Device,
    ctx: int,
    options: PlanOptions,
    width: int,
    features: int,
    backend: str = "llamacpp",
) -> Need:
    """What the target takes. features: values a token that a drafter reads (libllama keeps a batch, we one pass of them)."""
    # libllama computes in float32 whatever the weights are, torch in the dtype that it keeps keys and values in
    each = KV_BYTES[options.kv_type] if backend == "torch" else 4.0
    flash = options.flash(device, backend, few=target.few_sequences)
    rows = min(ubatch_rows(flash), ctx)
    return Need(
        weights=target.weights,
        kv=kv_bytes(target.kv_values, ctx, options.n_seq, options.kv_type),
        scores=_scores(target.n_head, _cached(ctx, options.n_seq), rows, flash, backend),
        compute=_compute(target.n_embd, target.n_ff, target.n_vocab, device, rows, width, each),
        features=4 * features * (_batch(options, ctx, rows) + rows),
        overhead=_overhead(target.n_vocab) + (TORCH_CPU if backend == "torch" and device.kind == "cpu" else 0),
    )


def drafter_need(
    drafter: DrafterSize, device: Device, ctx: int, options: PlanOptions, backend: str = "llamacpp"
) -> Need:
    """What the drafter takes beside the target."""
    if not drafter.weights:
        return Need()
    if drafter.features and backend == "llamacpp" and device.kind == "cpu" and cpu_drafter.probable(options.kv_type):
        return _kernels_need(drafter, device, ctx, options)
    flash = options.flash(device, backend, few=FEW_SEQUENCES)
    rows = min(ubatch_rows(flash), ctx)
    cached = ctx + drafter.width
    # the features as they are handed over, libllama's copy of them, and its "nextn" rows for a whole batch
    handed = 4 * (2 * rows * drafter.features + _batch(options, ctx, rows) * drafter.n_embd)
    return Need(
        weights=drafter.weights,
        kv=kv_bytes(drafter.kv_values, cached, options.n_seq, options.kv_type),
        scores=_scores(drafter.n_head, _cached(cached, options.n_seq), rows, flash, backend),
        compute=_compute(drafter.n_embd, drafter.n_ff, drafter.n_vocab, device, rows, drafter.width),
        features=handed if drafter.features else 0,
        overhead=_overhead(drafter.n_vocab),
    )


def _kernels_need(drafter: DrafterSize, device: Device, ctx: int, options: PlanOptions) -> Need:
    """The same where our own kernels run it: keys and values in F16, scores of a block's rows for each thread, and no buffers
    for whole prompts."""
    cached = ctx + drafter.width
    return Need(
        weights=drafter.weights,
        kv=int(drafter.kv_values * cached * options.n_seq * KV_BYTES["f16"]),
        scores=4 * drafter.width * cached * usable_cores(),
        compute=_compute(drafter.n_embd, drafter.n_ff, drafter.n_vocab, device, cpu_drafter.COLUMNS, drafter.width),
        features=4 * min(ubatch_rows("off"), ctx) * drafter.features,  # as they are handed over
        overhead=_overhead(drafter.n_vocab),
    )


def _compute(n_embd: int, n_ff: int, n_vocab: int, device: Device, rows: int, width: int, each: float = 4.0) -> int:
    """Activations (`each` bytes a value) and logits of the largest pass, and the copy of the logits that the host reads."""
    activations = int(each * rows * (3 * n_embd + 4 * n_ff))
    # A device reserves logits for every row of a pass; on a CPU only the rows that are computed are ever written.
    logits = 4 * n_vocab * (rows if device.kind != "cpu" else 2 * width)
    return activations + logits


def _scores(n_head: int, cached: int, rows: int, flash: str, backend: str) -> int:
    if backend == "torch":
        return 16 * rows * cached  # masks of grouped heads, as bool and as numbers (measured: 8 kB a token, 512 rows)
    return score_bytes(n_head, cached, rows) if flash == "off" else 0


def _batch(options: PlanOptions, ctx: int, rows: int) -> int:
    """Rows of the buffers that libllama makes for a whole batch (Context: at most 2048)."""
    return max(rows, min(2048, ctx * options.n_seq))


def _overhead(n_vocab: int) -> int:
    """Token texts and their index as libllama keeps them (measured: 49152 tokens take 17 MB), and a little per context: its
    graphs, and the scratch of the threads that compute products (kernels/cpu_kernels.c: a MiB each).
    """
    return 350 * n_vocab + PER_CONTEXT


def make_plan(
    device: Device,
    backend: str,
    target: TargetSize,
    drafter: DrafterSize | None = None,
    options: PlanOptions | None = None,
    *,
    host_free: int | None = None,
) -> MemoryPlan:
    """The plan for this pair on `device`; look at `fits`. With no context asked for, shorter ones are tried.

    host_free: free bytes of ordinary memory, for layers that stay there; None = as much as needed.
    """
    options = options or PlanOptions()
    free = host_free if host_free is not None else 1 << 62
    contexts = [options.ctx] if options.ctx else _contexts(target.n_ctx_train)
    plan = None
    for ctx in contexts:
        plan = _plan_at(device, backend, target, drafter, options, ctx, free)
        if plan.fits:
            if ctx < contexts[0]:
                plan = replace(plan, notes=(*plan.notes, f"context {ctx}, as {contexts[0]} tokens do not fit"))
            return plan
    assert plan is not None
    return plan


def _contexts(n_ctx_train: int) -> list[int]:
    first = min(n_ctx_train, DEFAULT_CTX)
    return [first, *(ctx for ctx in SHORTER_CTX if ctx < first)]


def _plan_at(
    device: Device,
    backend: str,
    target: TargetSize,
    drafter: DrafterSize | None,
    options: PlanOptions,
    ctx: int,
    host_free: int,
) -> MemoryPlan:
    width = drafter.width if drafter else 1
    features = drafter.features if drafter else 0
    need = target_need(target, device, ctx, options, width * options.n_seq, features, backend)
    theirs = drafter_need(drafter, device, ctx, options, backend) if drafter else None
    on_cpu = device.kind == "cpu"
    everything = need.total + (theirs.total if theirs else 0)
    host = need.overhead + (theirs.overhead if theirs else 0)
    layers, on_device, on_host = 0, 0, everything
    if not on_cpu:
        layers, on_device, on_host = target.n_layer + 1, everything - host, host
        fixed = on_device - need.weights - need.kv
        if backend == "llamacpp" and (options.gpu_layers is not None or fixed + need.weights + need.kv > device.usable):
            layers = _layers_that_fit(device, target, need, fixed, options)
            share = layers / (target.n_layer + 1)
            moved = int((need.weights + need.kv) * (1 - share))
            on_device, on_host = on_device - moved, on_host + moved
    return MemoryPlan(
        device=device,
        backend=backend,
        target=need,
        drafter=theirs,
        ctx=ctx,
        n_seq=options.n_seq,
        kv_type=options.kv_type,
        gpu_layers=layers,
        n_layer=target.n_layer,
        verify_width=width,
        on_device=on_device,
        on_host=on_host,
        host_free=host_free,
    )


def _layers_that_fit(device: Device, target: TargetSize, need: Need, fixed: int, options: PlanOptions) -> int:
    """Layers (the output head counts as one) that fit beside the drafter and the buffers."""
    if options.gpu_layers is not None and options.gpu_layers >= 0:
        return min(options.gpu_layers, target.n_layer + 1)
    each = (need.weights + need.kv) / (target.n_layer + 1)
    return max(0, min(target.n_layer + 1, int((device.usable - fixed) / each))) if device.usable > fixed else 0
