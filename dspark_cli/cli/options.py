"""Options that several commands share, each defined once, and what they become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cli.backends.errors import BadInput, NotReady

if TYPE_CHECKING:
    from dspark_cli.engine.rounds import SamplingOptions
    from dspark_cli.engine.session import Session

BACKENDS = ("auto", "llamacpp", "cpu")

Model = Annotated[str, typer.Argument(help="Name from `dspark models`, or path to a GGUF file.", show_default=False)]
Drafter = Annotated[
    str,
    typer.Option(help="auto, dspark, dflash, small, lookup, none, or path to a drafter GGUF.", metavar="NAME|PATH"),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="Tokens to verify per round: auto (by measured costs), off, fixed:N or threshold:P (lowest confidence, 0 to 1)."
    ),
]
Backend = Annotated[str, typer.Option(help="auto, llamacpp or cpu.")]
Quant = Annotated[str | None, typer.Option(help="Format of a named model, such as Q4_K_M.")]
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
FlashAttn = Annotated[str, typer.Option(help="Flash attention: auto, on or off.")]
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


def open_session(options: PairOptions) -> Session:
    """Resolve names and load the pair. Raises DsparkError, before anything is loaded where that is possible."""
    if options.backend not in BACKENDS:
        if options.backend in ("cuda", "rocm", "metal"):
            raise NotReady(
                f"backend {options.backend} runs full-precision checkpoints through torch, which this version does not do yet",
                hint="--backend auto (llama.cpp uses the GPU it was built for)",
            )
        raise BadInput(f"unknown backend {options.backend!r}: one of {', '.join(BACKENDS)}")
    if options.offline:
        import os

        os.environ["HF_HUB_OFFLINE"] = "1"
    from dspark_cli.registry import resolve

    found = resolve(options.model, options.quant)
    check_drafter(options.drafter)
    from dspark_cli.engine.session import OpenOptions, Session

    return Session.open(
        OpenOptions(
            model=found.path,
            name=found.name,
            drafter=options.drafter,
            drafter_path=found.drafter_path,
            policy=options.policy,
            ctx=options.ctx,
            threads=options.threads,
            gpu_layers=0 if options.backend == "cpu" else options.gpu_layers,
            kv_type=options.kv_type,
            flash_attn=options.flash_attn,
            notice=lambda text: typer.secho(text, dim=True, err=True),
        )
    )


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
