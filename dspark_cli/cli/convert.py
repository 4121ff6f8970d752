"""`dspark convert`: a drafter from safetensors to GGUF and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.cli import options as o


def convert(
    source: Annotated[
        Path, typer.Argument(help="A drafter: folder (DeepSpec, z-lab, speculators) or GGUF file.", show_default=False)
    ],
    destination: Annotated[
        Path, typer.Argument(help="NAME.gguf, or a folder for DeepSpec's safetensors.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="The target it drafts for: name or GGUF file. To and from GGUF it is needed.", show_default=False
        ),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Of the matrices in a GGUF file.")] = "F16",
    vocab_format: o.VocabFormat = "",
    embedding_format: o.EmbeddingFormat = "",
    force: Annotated[bool, typer.Option("--force", help="Replace DESTINATION if it exists.")] = False,
    offline: o.Offline = False,
) -> None:
    """Write the drafter SOURCE in the other format. Nothing of it is ever executed, pickles are refused.

    Example: dspark convert ./dspark_qwen3_4b_block7 dspark-qwen3-4b.gguf --target qwen3-4b --format Q8_0
    """
    formats = Formats(format, vocab_format, embedding_format)
    if not source.exists():
        raise BadInput(f"{source} does not exist")
    if destination.exists() and not force:
        raise BadInput(f"{destination} exists already", hint="--force, or another name")
    to_gguf, from_gguf = destination.suffix == ".gguf", source.is_file()
    if (to_gguf or from_gguf) and target is None:
        what = "the tokenizer" if to_gguf else "embedding and output head"
        raise BadInput(
            f"a GGUF drafter shares {what} with its target",
            hint=f"dspark convert {source} {destination} --target MODEL",
        )
    path = None if target is None else _target_file(target, offline)

    from dspark_cli.backends.torch.checkpoint import load_drafter
    from dspark_cli.backends.torch.export import save_drafter
    from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, save_gguf_drafter, target_tables

    if from_gguf:
        assert path is not None
        model = load_gguf_drafter(source, path)
    else:
        model = load_drafter(source, tables=target_tables(path) if path else None)
    try:
        if to_gguf:
            assert path is not None
            save_gguf_drafter(model, destination, path, formats)
        else:
            save_drafter(model, destination)
    except OSError as error:
        raise DsparkError(f"{destination} cannot be written: {error.strerror or error}") from None
    typer.echo(f"wrote {destination}", err=True)


def _target_file(target: str, offline: bool) -> Path:
    found, _ = o.find_pair(o.PairOptions(target, "none", None, "auto", None, None, None, None, "f16", "auto", offline))
    if found.path.is_dir():
        raise BadInput(f"{target} is a checkpoint folder; the GGUF file of the target is needed")
    return found.path
