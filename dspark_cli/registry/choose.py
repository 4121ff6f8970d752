"""Which files of a target, which drafter, which backend and device: one pure function over plain facts.

The order of preference:
1. the whole pair on an accelerator at the usual context: the full-precision checkpoint where torch drives it, else the best
   quant (Q8_0 at most); where no quant fits with the drafter, the best without it, then a shorter context;
2. more than half of the layers on an accelerator, as many as possible: what stays in memory sets the pace;
3. the CPU: memory bandwidth decides there, so about four bits first, more bits only when nothing else is published.
What is on this disk goes before what would have to be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.registry.plan import DEFAULT_CTX, Device, DrafterSize, MemoryPlan, PlanOptions, make_plan, size
from dspark_cli.registry.quants import FULL_PRECISION, USUAL, rank
from dspark_cli.registry.schema import Entry, KnownDrafter

#: on a CPU, first to last
CPU_ORDER = ("Q4_K_M", "Q4_0", "Q4_1", "Q4_K_S", "IQ4_XS", "Q5_K_M", "Q3_K_M", "Q6_K", "Q8_0", "Q2_K", "F16")
#: family of targets that models.toml does not know
UNKNOWN = "unknown"
#: --backend words that are kinds of devices
DEVICE_KINDS = ("cuda", "rocm", "metal", "vulkan", "cpu")


@dataclass(frozen=True)
class Machine:
    """What the choice must know of a machine. accelerators: best first; torch: whether torch can be imported."""

    cpu: Device
    accelerators: tuple[Device, ...] = ()
    torch: bool = False


@dataclass(frozen=True)
class Wish:
    """What the user asked for. here: quants of the target on this disk ("BF16" = its checkpoint)."""

    quant: str | None = None
    backend: str = "auto"
    drafter: str = "auto"
    options: PlanOptions = field(default_factory=PlanOptions)
    here: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """What to load.

    format:  gguf or safetensors; quant: of the target
    drafter: the model drafter; None = lookup alone
    notes:   what the user should know: what was left out and why, and what would change it
    """

    entry: Entry
    backend: str
    format: str
    quant: str
    repository: str | None
    file: str | None
    drafter: KnownDrafter | None
    plan: MemoryPlan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    device: Device
    backend: str
    format: str
    quant: str


def choose(entry: Entry, machine: Machine, wish: Wish | None = None) -> Resolution:
    """The best pair of `entry` for `machine`. Raises NotReady with the numbers when nothing fits."""
    wish = wish or Wish()
    candidates = _candidates(entry, machine, wish)
    if not candidates:
        raise _no_candidate(entry, machine, wish)
    drafters = _drafters(entry, machine, wish, [candidate.backend for candidate in candidates])
    nothing = dict.fromkeys(drafters, NO_DRAFTER)
    attempts = [drafters, nothing] if drafters != nothing and wish.drafter == "auto" else [drafters]
    usual = wish.options.ctx or min(entry.context or DEFAULT_CTX, DEFAULT_CTX)
    full = replace(wish, options=replace(wish.options, ctx=usual))
    for place in (_whole, _partly, _on_cpu):
        for options, attempt in ((o, d) for o in (full, wish) for d in attempts):
            able = [c for c in candidates if _is_pair(c, attempt, wish)]
            plans = [(c, _plan(entry, c, attempt[c.backend].drafter, machine, options)) for c in able]
            fits = [(c, plan) for c, plan in plans if plan.fits and place(plan)]
            if place is _partly:
                fits.sort(key=lambda found: -found[1].gpu_layers / found[1].n_layer)
            if fits:
                chosen, plan = fits[0]
                found, wanted = attempt[chosen.backend].drafter, drafters[chosen.backend]
                left_out = () if found is wanted.drafter else (_left_out(wanted.drafter),)
                notes = (*wanted.notes, *left_out, *plan.notes)
                return _resolution(entry, chosen, plan, found, notes, wish.here)
    raise _too_small(entry, candidates, machine, wish)


def fitting(entry: Entry, machine: Machine) -> dict[str, MemoryPlan]:
    """Every quant that fits with the drafter it would get, with its plan; best first. For `dspark models`."""
    here = tuple(entry.gguf_files)
    found = {}
    for quant in sorted({*quants(entry), *((FULL_PRECISION,) if entry.safetensors else ())}, key=rank):
        try:
            found[quant] = choose(entry, machine, Wish(quant=quant, here=here)).plan
        except DsparkError:
            continue
    return found


def quants(entry: Entry) -> list[str]:
    """Quants of its GGUF files: as listed; the usual ones where the repository's listing was not read yet."""
    if entry.gguf_files:
        return sorted(entry.gguf_files, key=rank)
    return list(USUAL) if entry.gguf else []


def _candidates(entry: Entry, machine: Machine, wish: Wish) -> list[_Candidate]:
    """Everything that could be loaded, in order of preference."""
    return [
        candidate
        for device in (*machine.accelerators, machine.cpu)
        if wish.backend in ("auto", "llamacpp", "torch", device.kind)
        for candidate in _on(device, entry, wish, machine.torch)
    ]


def _on(device: Device, entry: Entry, wish: Wish, torch: bool) -> Iterator[_Candidate]:
    found: list[_Candidate] = []
    listed = sorted({*quants(entry), *(q for q in wish.here if q != FULL_PRECISION)}, key=_preference(device))
    # On a CPU a checkpoint costs four times what a quant does: only when it is asked for.
    drives = "torch" in device.runs if device.kind != "cpu" else torch and wish.backend == "torch"
    if entry.safetensors and drives and wish.backend != "llamacpp":
        found.append(_Candidate(device, "torch", "safetensors", FULL_PRECISION))
    if "llamacpp" in device.runs and wish.backend != "torch":
        found += [_Candidate(device, "llamacpp", "gguf", quant) for quant in listed]
    if wish.quant is not None:
        found = [candidate for candidate in found if candidate.quant == wish.quant]
    # what is here goes first; sorted() keeps the order within both groups
    return iter(sorted(found, key=lambda candidate: candidate.quant not in wish.here))


def _preference(device: Device) -> Callable[[str], tuple[bool, int]]:
    def on_cpu(quant: str) -> tuple[bool, int]:
        return quant not in CPU_ORDER, CPU_ORDER.index(quant) if quant in CPU_ORDER else rank(quant)

    def elsewhere(quant: str) -> tuple[bool, int]:
        # F16 and F32 files cost twice what Q8_0 does for no visible gain: last
        return quant in ("F32", "F16", "BF16"), rank(quant)

    return on_cpu if device.kind == "cpu" else elsewhere


def _is_pair(candidate: _Candidate, attempt: dict[str, _Drafting], wish: Wish) -> bool:
    """Left to `auto`, a checkpoint that no drafter can serve gives way to a GGUF that one can (Qwen2.5: small models)."""
    served = any(drafting.drafter for drafting in attempt.values())
    return candidate.backend != "torch" or wish.backend == "torch" or not served or bool(attempt["torch"].drafter)


@dataclass(frozen=True)
class _Drafting:
    """A drafter that can run, or None, with what there is to say about it."""

    drafter: KnownDrafter | None = None
    notes: tuple[str, ...] = ()


NO_DRAFTER = _Drafting()


def _drafters(entry: Entry, machine: Machine, wish: Wish, backends: Iterable[str]) -> dict[str, _Drafting]:
    """The first drafter for the target on each backend. Raises BadInput when the kind asked for runs on none of them."""
    if wish.drafter not in ("auto", "dspark", "dflash", "eagle3", "small"):
        return dict.fromkeys(
            backends, NO_DRAFTER
        )  # none and lookup need nothing, a path is looked at when it is loaded
    found = {backend: _drafter(entry, machine, wish, backend) for backend in backends}
    if wish.drafter == "auto" or any(drafting.drafter for drafting in found.values()):
        return found
    kinds = list(dict.fromkeys(d.kind for d in entry.drafter if d.usable))
    known = (
        f"the {wish.drafter} drafter of {entry.name} cannot run here"
        if wish.drafter in kinds
        else (f"no {wish.drafter} drafter is known for {entry.name}; known: {', '.join(kinds) or 'none but lookup'}")
    )
    why = next((note for drafting in found.values() for note in drafting.notes), "")
    raise BadInput(
        known + (f" ({why})" if why else ""),
        hint="--drafter lookup, or --drafter PATH",
    )


def _drafter(entry: Entry, machine: Machine, wish: Wish, backend: str) -> _Drafting:
    notes = [] if _has_block_drafter(entry) else [no_block_drafter(entry)]
    for drafter in entry.drafter:
        if not drafter.usable or wish.drafter not in ("auto", drafter.kind) or (drafter.builtin and not drafter.path):
            continue
        problem = _cannot_run(entry, drafter, backend, machine, asked=wish.drafter == drafter.kind)
        if problem is None:
            return _Drafting(drafter, tuple(notes))
        if problem and not any(problem.partition(":")[0].partition(" ")[2] in note for note in notes):
            notes.append(problem)
    return _Drafting(None, tuple(notes))


def _cannot_run(entry: Entry, drafter: KnownDrafter, backend: str, machine: Machine, *, asked: bool) -> str | None:
    """Why a drafter is not taken beside a target on `backend`, "" where that is nothing to tell; None if it is.

    Beside GGUF a checkpoint runs as its copy; one without a form as GGUF runs through torch on the CPU: only if `asked` for.
    """
    if backend == "torch":
        return None if drafter.format == "safetensors" else ""
    if drafter.format == "gguf":
        return None
    if drafter.kind == "small":
        return ""
    if not machine.torch:
        return f"{drafter.repository} needs torch: pip install 'dspark[torch]'"
    if not asked and not entry.has_gguf_form(drafter):
        return f"{drafter.repository} runs through torch beside a GGUF target: --drafter {drafter.kind} asks for it"
    return None


def _has_block_drafter(entry: Entry) -> bool:
    return any(drafter.kind != "small" for drafter in entry.drafter)


def no_block_drafter(entry: Entry) -> str:
    """The plain statement that a target has no drafter of its own, and what would change that."""
    if entry.family == UNKNOWN:
        return f"no drafter is known for {entry.name}: it drafts by lookup; --drafter PATH takes one"
    small = next((drafter.repository for drafter in entry.drafter if drafter.kind == "small"), None)
    instead = f"it drafts with {small} and lookup" if small else "it drafts by lookup"
    relative = f"; {entry.sibling} has one" if entry.sibling else ""
    return (
        f"no DSpark drafter is published for {entry.name}: {instead}. "
        f"What would change that: training one (`dspark train {entry.name}`){relative}"
    )


def _plan(
    entry: Entry, candidate: _Candidate, drafter: KnownDrafter | None, machine: Machine, wish: Wish
) -> MemoryPlan:
    options = wish.options
    beside = entry.drafter_size(drafter, candidate.backend) if drafter is not None else LOOKUP
    target = entry.size_at(candidate.quant)
    if options.ctx and entry.context and options.ctx > entry.context:
        raise BadInput(f"--ctx {options.ctx} is more than the {entry.context} tokens {entry.name} was trained on")
    return make_plan(candidate.device, candidate.backend, target, beside, options, host_free=machine.cpu.usable)


LOOKUP = DrafterSize("lookup", weights=0, n_layer=0, n_embd=0, n_vocab=0, kv_values=0)


def _whole(plan: MemoryPlan) -> bool:
    return plan.device.kind != "cpu" and plan.gpu_layers > plan.n_layer


def _partly(plan: MemoryPlan) -> bool:
    return plan.device.kind != "cpu" and plan.gpu_layers > plan.n_layer // 2


def _on_cpu(plan: MemoryPlan) -> bool:
    return plan.device.kind == "cpu"


def _resolution(
    entry: Entry,
    candidate: _Candidate,
    plan: MemoryPlan,
    drafter: KnownDrafter | None,
    notes: Sequence[str],
    here: Sequence[str],
) -> Resolution:
    if candidate.format == "safetensors":
        repository, file = entry.safetensors, None
    else:
        listed = entry.gguf_files.get(candidate.quant)
        repository, file = entry.gguf, listed.file if listed else None
    if not entry.shape_known and candidate.quant not in here:
        notes = (
            *notes,
            f"the shape of {entry.name} is not in models.toml: the plan is an estimate until its file is here",
        )
    return Resolution(
        entry, candidate.backend, candidate.format, candidate.quant, repository, file, drafter, plan, tuple(notes)
    )


def _left_out(drafter: KnownDrafter | None) -> str:
    name = drafter.repository or drafter.builtin if drafter else ""
    return f"the drafter {name} does not fit beside the target: drafting by lookup alone"


def _no_candidate(entry: Entry, machine: Machine, wish: Wish) -> DsparkError:
    kinds = ", ".join(dict.fromkeys(device.kind for device in (*machine.accelerators, machine.cpu)))
    if wish.backend in DEVICE_KINDS and not any(
        device.kind == wish.backend for device in (*machine.accelerators, machine.cpu)
    ):
        return NotReady(
            f"this machine has no {wish.backend} device that dspark can use; it has {kinds}", hint="dspark doctor"
        )
    if wish.backend == "torch":
        missing = "torch is not installed" if entry.safetensors else "no checkpoint of it is known"
        hint = "pip install 'dspark[torch]'" if entry.safetensors else "--backend auto"
        return NotReady(f"{entry.name} cannot run through torch: {missing}", hint=hint)
    have = [*quants(entry), *([FULL_PRECISION] if entry.safetensors else [])]
    if wish.quant is not None and wish.quant not in have:
        return NotReady(
            f"{entry.name} is published as {', '.join(have)}, not as {wish.quant}", hint=f"--quant {have[0]}"
        )
    return NotReady(
        f"{entry.name} is published in full precision only ({entry.safetensors}), which needs torch on an accelerator",
        hint=f"a GGUF of it made by somebody you trust: dspark generate owner/repository, or a path; here: {kinds}",
    )


def _too_small(entry: Entry, candidates: Sequence[_Candidate], machine: Machine, wish: Wish) -> NotReady:
    """The numbers of the smallest that was tried, and the largest thing that would fit."""
    plans = [_plan(entry, candidate, None, machine, wish) for candidate in candidates]
    smallest = min(plans, key=lambda plan: plan.total)
    quant = candidates[plans.index(smallest)].quant
    text = (
        f"{entry.name} at {quant} with {smallest.ctx} tokens of context needs {size(smallest.total)}, "
        f"{smallest.device.name} can give {size(smallest.device.usable)} of its {size(smallest.device.total)}"
    )
    return NotReady(text, hint=_largest_that_fits(entry, machine, wish))


def _largest_that_fits(entry: Entry, machine: Machine, wish: Wish) -> str:
    """The nearest wish that can be served: a shorter context, another quant, else a smaller model's size."""
    looser = []
    if wish.options.ctx:
        looser += [replace(wish, options=replace(wish.options, ctx=c)) for c in _halved(wish.options.ctx)]
    if wish.quant or wish.backend != "auto" or wish.options.gpu_layers is not None:
        free = replace(wish, quant=None, backend="auto", options=replace(wish.options, gpu_layers=None))
        looser += [free, replace(free, options=replace(free.options, ctx=None))]
    for other in looser:
        try:
            found = choose(entry, machine, other)
        except DsparkError:
            continue
        return f"--quant {found.quant} --ctx {found.plan.ctx} fits ({found.plan.device.name})"
    best = max((device.usable for device in (*machine.accelerators, machine.cpu)), default=0)
    return f"a model of at most about {best / 0.7e9:.0f}B parameters at Q4_K_M; `dspark models` says what fits"


def _halved(ctx: int) -> list[int]:
    found = []
    while ctx > 512:
        ctx //= 2
        found.append(ctx)
    return found
