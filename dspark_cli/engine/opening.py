"""Which backend opens what: a GGUF file through llama.cpp, a checkpoint folder through torch, and drafters beside it.

torch is imported only where a folder is opened: it takes seconds, and may not be installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_cli.backends.base import BadInput, Drafter, NotReady, PairMismatch, Target

if TYPE_CHECKING:
    from dspark_cli.backends.torch.target import TorchOptions
    from dspark_cli.engine.session import OpenOptions

#: packages that the torch backend needs
NEEDED = ("torch", "transformers", "safetensors")


def open_target(options: OpenOptions) -> Target:
    """The target of `options`: the file or folder decides the backend. Raises what the backends raise."""
    if options.model.is_dir():
        need_torch(options.name)
        from dspark_cli.backends.torch.target import open_target as open_folder

        return open_folder(options.model, _torch_options(options), name=options.name)
    from dspark_cli.backends.llamacpp.target import LlamaCppTarget

    told = options.told("loading the model")
    return LlamaCppTarget(options.model, options.context(), name=options.name, progress=told)


def need_torch(name: str) -> None:
    """Raise NotReady unless the packages that run checkpoints are installed."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise NotReady(
            f"{name} is a checkpoint folder, which runs through torch; not installed: {', '.join(missing)}",
            hint="pip install 'dspark[torch]'",
        )


def _torch_options(options: OpenOptions) -> TorchOptions:
    from dspark_cli.backends.torch.target import TorchOptions

    if options.kv_type not in ("f16", "bf16", "f32"):
        raise BadInput(
            f"--kv-type {options.kv_type} is of llama.cpp: torch keeps keys and values in the model's own dtype"
        )
    return TorchOptions(
        ctx=options.ctx,
        n_seq=options.n_seq,
        device=options.device,
        threads=options.threads,
        notice=options.notice,
    )


def drafter_beside_torch(path: Path, options: OpenOptions, target: Target) -> Drafter:
    """The drafter in the folder `path` for a target of the torch backend: a drafter's checkpoint, or a small model's.

    Raises BadInput for a GGUF, BadCheckpoint or PairMismatch for a folder that does not fit.
    """
    import torch

    from dspark_cli.backends.torch.drafter import open_drafter
    from dspark_cli.backends.torch.folder import is_drafter, read_config_file
    from dspark_cli.backends.torch.target import TorchTarget
    from dspark_cli.backends.torch.target import open_target as open_folder
    from dspark_cli.backends.torch.tokenizer import difference_between

    assert isinstance(target, TorchTarget)
    if not path.is_dir():
        raise BadInput(
            f"{path.name} drafts beside a GGUF target; {options.name} runs through torch and needs a checkpoint folder",
            hint="--drafter FOLDER, or a GGUF of the target",
        )
    info = target.info
    if is_drafter(read_config_file(path)):
        drafter = open_drafter(
            path,
            n_vocab=info.n_vocab,
            n_embd=info.n_embd,
            n_layer=info.n_layer,
            tables=target.tables,
            dtype=getattr(torch, str(info.details["kv_type"])),
            device=info.device,
        )
        drafter.notice = options.notice
        return drafter
    from dspark_cli.backends.standalone import StandaloneDrafter

    small = open_folder(path, _torch_options(options))
    difference = difference_between(small.tokenizer, target.tokenizer)
    if difference:
        small.close()
        raise PairMismatch(
            f"{path.name} cannot draft for {options.name}: {difference}",
            hint="--drafter lookup, or a small model of the same family",
        )
    return StandaloneDrafter(small, n_vocab=info.n_vocab)
