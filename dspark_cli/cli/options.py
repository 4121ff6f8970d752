"""Options that several commands share, each defined once, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.backends.errors import BadInput, NotReady

if TYPE_CHECKING:
    from dspark_cli.engine.rounds import SamplingOptions
    from dspark_cli.engine.session import OpenOptions, Session
    from dspark_cli.registry.choose import Machine, Wish
    from dspark_cli.registry.download import Report
    from dspark_cli.registry.plan import MemoryPlan
    from dspark_cli.registry.resolve import Resolved

#: words that name a kind of accelerator
ACCELERATORS = ("cuda", "rocm", "metal")
BACKENDS = ("auto", "llamacpp", "torch", *ACCELERATORS, "cpu")

MODEL = "Name from `dspark models`, Hub repository (owner/name), or path to a GGUF file or a checkpoint folder."
Model = Annotated[str, typer.Argument(help=MODEL, show_default=False)]
Drafter = Annotated[
    str,
    typer.Option(
        help="auto, dspark, dflash, eagle3, small, lookup, none, or path to a drafter (GGUF or checkpoint folder).",
        metavar="NAME|PATH",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="Tokens to verify per round: auto (by measured costs), off, fixed:N or threshold:P (lowest confidence, 0 to 1)."
    ),
]
Backend = Annotated[str, typer.Option(help="auto, llamacpp, torch, or a device: cuda, rocm, metal, cpu.")]
Quant = Annotated[str | None, typer.Option(help="Format of a named model, such as Q4_K_M.")]
VocabFormat = Annotated[
    str, typer.Option(help="The same for rows of the draft vocabulary: output head, second Markov matrix.")
]
EmbeddingFormat = Annotated[
    str, typer.Option(help="The same for the Markov embedding, a row for every token of the target.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample from the K most likely tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Smallest set of tokens with this mass; 1 is off.")
]
MinP = Annotated[
    float, typer.Option("--min-p", min=0.0, max=1.0, help="Drop tokens below this share of the best one's probability.")
]
RepeatPenalty = Annotated[float, typer.Option(min=0.1, help="Divide logits of recent tokens by this; 1 is off.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
Accept = Annotated[str, typer.Option(help="Accept rule when sampling: exact (same text as plain) or residual.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to produce at most.")]
Ctx = Annotated[
    int | None, typer.Option(help="Context in tokens; default what the model was trained on, at most 4096.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default the physical cores.")]
GpuLayers = Annotated[int | None, typer.Option(help="Layers on the GPU; default all, 0 is none.")]
KvType = Annotated[str, typer.Option(help="Type of cached keys and values: f16, q8_0, q4_0, ...")]
FlashAttn = Annotated[str, typer.Option(help="Flash attention: auto (off where a CPU gains by it), on or off.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="For models whose template has the switch.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the network.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@dataclass(frozen=True)
class PairOptions:
    """Everything that decides what is loaded, as the commands take it."""

    model: str
    drafter: str
    policy: str | None
    backend: str
    quant: str | None
    ctx: int | None
    threads: int | None
    gpu_layers: int | None
    kv_type: str
    flash_attn: str
    offline: bool
    thinking: bool | None = None
    chat: bool = True
    parallel: int | None = 1  # sequences at once; None = as many as pay and fit, up to `most`
    most: int = 16
    quiet: bool = False


def open_session(options: PairOptions) -> Session:
    """Resolve names and load the pair. Raises DsparkError, before anything is loaded where that is possible."""
    return load(options, *find_checked(options))


def open_options(options: PairOptions) -> OpenOptions:
    """What `open_session` would load, for commands that load it more than once."""
    return loading(options, *find_checked(options))


def check_backend(options: PairOptions) -> None:
    """Refuse a backend nobody knows, or that this version does not drive."""
    if options.backend not in BACKENDS:
        raise BadInput(f"unknown backend {options.backend!r}: one of {', '.join(BACKENDS)}")


def find_checked(
    options: PairOptions, *, report: Report | None = None, say: Callable[[str], None] | None = None
) -> tuple[Resolved, MemoryPlan]:
    """`find_pair` after a look at the backend; tells the user (`say`, or stderr) the plan and what else there is to say."""
    check_backend(options)
    go_offline(options.offline)
    found, plan = find_pair(options, report=report)
    for line in (why(found, plan, options), plan.line(), *found.notes, *cautions_about(found, options)):
        (say or (lambda text: tell(options, text)))(line)
    return found, plan


def why(found: Resolved, plan: MemoryPlan, options: PairOptions) -> str:
    """Which backend runs the pair, and why."""
    from dspark_cli.registry.reason import backend_line

    return backend_line(found, plan, usable_machine(options), pair_wish(options))


def load(options: PairOptions, found: Resolved, plan: MemoryPlan) -> Session:
    """The pair as it was found and planned, ready to answer."""
    from dspark_cli.engine.session import Session

    return Session.open(loading(options, found, plan))


def note(text: str) -> None:
    """Something worth knowing that is not the answer."""
    typer.secho(text, dim=True, err=True)


def loading(
    options: PairOptions, found: Resolved, plan: MemoryPlan, say: Callable[[str], None] | None = None
) -> OpenOptions:
    """The engine's words for what was found and planned."""
    from dspark_cli.engine.session import OpenOptions

    return OpenOptions(
        model=found.path,
        name=found.name,
        drafter=options.drafter,
        drafter_path=found.drafter_path,
        policy=options.policy,
        ctx=plan.ctx if options.ctx is None else options.ctx,
        n_seq=plan.n_seq,
        threads=options.threads,
        gpu_layers=plan.gpu_layers,
        kv_type=options.kv_type,
        flash_attn=options.flash_attn,
        device=torch_device(plan) if plan.backend == "torch" else "auto",
        spare=plan.host_spare,
        notice=say or (lambda text: tell(options, text)),
    )


def tell(options: PairOptions, text: str) -> None:
    """A line the user may want to know, on stderr."""
    if not options.quiet:
        note(text)


def go_offline(offline: bool) -> None:
    """Must come before the first use of huggingface-hub, which reads the variable once."""
    if offline:
        import os

        os.environ["HF_HUB_OFFLINE"] = "1"


def wish(
    *,
    quant: str | None = None,
    backend: str = "auto",
    drafter: str = "auto",
    ctx: int | None = None,
    kv_type: str = "f16",
    gpu_layers: int | None = None,
    flash_attn: str = "auto",
) -> Wish:
    """What the memory plan and the choice of files must respect. Raises BadInput for words nobody knows."""
    from dspark_cli.registry.choose import DEVICE_KINDS, Wish
    from dspark_cli.registry.hub import known_quant
    from dspark_cli.registry.plan import KV_BYTES, PlanOptions

    if backend not in ("auto", "llamacpp", "torch", *DEVICE_KINDS):
        raise BadInput(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    if kv_type not in KV_BYTES:
        raise BadInput(f"unknown KV type {kv_type!r}: one of {', '.join(KV_BYTES)}")
    layers = gpu_layers if gpu_layers is not None and gpu_layers >= 0 else None
    return Wish(
        quant=known_quant(quant) if quant else None,
        backend=backend,
        drafter=drafter,
        options=PlanOptions(ctx=ctx or None, kv_type=kv_type, gpu_layers=layers, flash_attn=flash_attn),
    )


def find_pair(
    options: PairOptions, *, download: bool = True, report: Report | None = None
) -> tuple[Resolved, MemoryPlan]:
    """Files of the pair, downloaded where they are missing (`download`), and their memory plan.

    Raises NotReady with the numbers when it does not fit, before anything is loaded.
    """
    found, plan = find_planned(options, download=download, report=report)
    return found, plan.or_refuse(found.name)


def find_planned(
    options: PairOptions, *, download: bool = True, report: Report | None = None
) -> tuple[Resolved, MemoryPlan]:
    """`find_pair` for a plan that need not fit. report: hears of downloads, instead of bars on stderr."""
    from dspark_cli.cli.progress import make_report
    from dspark_cli.registry.obtain import obtain
    from dspark_cli.registry.parallel import plan_parallel
    from dspark_cli.registry.resolve import plan_for, resolve

    wanted, machine = pair_wish(options), usable_machine(options)
    if download and report is not None:
        found = obtain(options.model, wanted, machine, report)
    elif download:
        with make_report() as bars:
            found = obtain(options.model, wanted, machine, bars)
    else:
        found = resolve(options.model, wanted.quant, wanted, machine)
    check_opens(found, options)
    check_drafter(options.drafter)
    own = Path(options.drafter).expanduser()
    drafter = own if own.exists() and is_path(options.drafter) else None
    beside = drafter or found.drafter_path
    if found.backend == "llamacpp" and beside is not None and beside.is_dir():
        try:
            need_working_torch(beside.name)
        except NotReady as error:
            if options.drafter != "auto":
                raise
            found = replace(found, drafter_path=None, notes=(*found.notes, f"no drafter: {error} ({error.hint})"))
    if options.parallel == 1:
        plan = plan_for(found, machine, wanted.options, drafter)
    else:
        plan = plan_parallel(found, machine, wanted.options, drafter, n_seq=options.parallel, most=options.most)
    check_card(found)
    return found, plan


def pair_wish(options: PairOptions) -> Wish:
    """What `options` ask of the choice of files."""
    return wish(
        quant=options.quant,
        backend=options.backend,
        drafter=options.drafter,
        ctx=options.ctx,
        kv_type=options.kv_type,
        gpu_layers=options.gpu_layers,
        flash_attn=options.flash_attn,
    )


def usable_machine(options: PairOptions) -> Machine:
    """This machine, less the accelerators that are not wanted. Raises NotReady where none of the wanted kind is here."""
    from dspark_cli.registry.devices import this_machine

    machine = this_machine()
    if options.backend == "cpu" or options.gpu_layers == 0:
        return replace(machine, accelerators=())
    if options.backend not in ACCELERATORS:
        return machine
    wanted = tuple(device for device in machine.accelerators if device.kind == options.backend)
    if not wanted:
        have = ", ".join(dict.fromkeys(device.kind for device in (*machine.accelerators, machine.cpu)))
        raise NotReady(
            f"this machine has no {options.backend} device that dspark can use; it has {have}", hint="dspark doctor"
        )
    return replace(machine, accelerators=wanted)


def check_opens(found: Resolved, options: PairOptions) -> None:
    """Refuse what the backend asked for cannot open. Raises BadInput, or NotReady where torch is missing."""
    if found.backend == "torch":
        if options.backend == "llamacpp":
            raise BadInput(f"{found.name} is a checkpoint folder, which llama.cpp cannot open", hint="--backend auto")
        if options.gpu_layers is not None and options.gpu_layers > 0:
            raise BadInput("--gpu-layers is of llama.cpp: torch puts all layers on one device", hint="--backend cpu")
        need_working_torch(found.name)
    elif options.backend == "torch":
        raise BadInput(f"{found.name} is a GGUF file, which runs through llama.cpp", hint="--backend auto")


def need_working_torch(name: str) -> None:
    """Refuse what torch must run (`name`, a checkpoint folder) where it is missing, or installed by halves."""
    from dspark_cli.engine.opening import need_torch

    need_torch(name)
    try:
        import torch  # noqa: F401
    except Exception as error:  # a half-installed torch fails in many ways
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise NotReady(
            f"{name} is a checkpoint folder, which runs through torch, and torch cannot be imported: {why}",
            hint="pip install --force-reinstall 'dspark[torch]'; GGUF models work without it",
        ) from None


def torch_device(plan: MemoryPlan) -> str:
    """torch's device for what the plan calls "CUDA0" or "cpu"."""
    number = "".join(filter(str.isdigit, plan.device.name))
    return f"{plan.device.kind}:{number}" if number else plan.device.kind


def check_card(found: Resolved) -> None:
    """A drafter that models.toml knows must draft as many tokens as its card says. Raises PairMismatch."""
    known = found.resolution.drafter if found.resolution else None
    if known is None or found.drafter_path is None or found.drafter_path.is_dir() or found.path.is_dir():
        return
    from dspark_cli.backends.llamacpp.header import read_header
    from dspark_cli.backends.pairing import check_published, gguf_drafter, gguf_target

    header = read_header(found.drafter_path)
    if header.architecture == "dflash" and "block_size" not in known.unconfirmed:
        target = gguf_target(read_header(found.path), found.path.name)
        check_published(gguf_drafter(header, found.drafter_path, target), known.block_size)


def cautions_about(found: Resolved, options: PairOptions) -> list[str]:
    """What may make a fitting pair draft badly with these settings."""
    from dspark_cli.backends.pairing import cautions
    from dspark_cli.registry.sizes import target_facts

    known = found.resolution.drafter if found.resolution else None
    trained = known.thinking if known else None
    mode = found.entry.thinking if found.entry is not None else None
    return cautions(
        target_facts(found.path),
        trained_thinking=trained if options.chat else None,
        thinking=True if mode == "always" else options.thinking,
        switch=mode == "optional",
        chat=options.chat,
    )


def is_path(drafter: str) -> bool:
    """Whether `--drafter` names a file and not a kind."""
    from dspark_cli.engine.words import DRAFTER_WORDS

    return drafter not in DRAFTER_WORDS


def check_drafter(name: str) -> None:
    """Refuse a drafter that is neither a known word nor a file, before the target is loaded."""
    from dspark_cli.engine.words import DRAFTER_WORDS

    if name not in DRAFTER_WORDS and not Path(name).expanduser().exists():
        raise BadInput(f"unknown drafter {name!r}: one of {', '.join(DRAFTER_WORDS)}, or a file that exists")


def sampling_options(**values: Any) -> SamplingOptions:
    """`SamplingOptions` from the command line's values. Raises BadInput for an unknown accept rule."""
    from dspark_cli.engine.rounds import SamplingOptions

    if values["accept"] not in ("exact", "residual"):
        raise BadInput(f"unknown accept rule {values['accept']!r}: exact or residual")
    return SamplingOptions(**values)
