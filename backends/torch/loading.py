"""From a folder's weights to a transformers model, and the failures on the way in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from dspark_cli.backends.torch import attention
from dspark_cli.backends.torch.config import BadCheckpoint
from dspark_cli.backends.torch.devices import Facts, is_out_of_memory
from dspark_cli.backends.torch.folder import out_of_memory

#: what transformers raises for folders that it cannot load
UNLOADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with every weight from `folder`. Raises BadCheckpoint for weights that are missing or misshapen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except UNLOADABLE as error:
        if is_out_of_memory(error):
            raise
        raise BadCheckpoint(f"{folder} cannot be loaded: {_reason(error)}") from None
    for name in sorted(loaded["mismatched_keys"], key=str):
        raise BadCheckpoint(f"{folder}: {_misshapen(name)}")
    missing = sorted(map(str, loaded["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BadCheckpoint(f"{folder} lacks weights: {', '.join(missing[:3])}{more}", hint="download it again")
    return model.to(device).eval().requires_grad_(False)


def _misshapen(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """What is wrong with a weight; transformers 4 tells its name only."""
    if isinstance(key, str):
        return f"{key} has another shape than config.json says"
    name, found, needed = key
    return f"{name} has shape {tuple(found)}, config.json says {tuple(needed)}"


def _reason(error: BaseException) -> str:
    """The first line of an error that says something."""
    if attention.NAME in str(error):
        return "transformers' code for this kind of model has attention of its own, which cannot be replaced"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError) and len(lines) > 1:
        lines = lines[1:]  # the first says which validator it was
    return lines[0] if lines else type(error).__name__


def end_tokens(model: Any) -> list[int]:
    """Every token that config and generation config call an end."""
    found: list[int] = []
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found += [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)]
    return found


@contextmanager
def failures(what: str, needed: int, facts: Facts) -> Iterator[None]:
    """Turn a failed allocation into NotReady with the numbers."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, needed, facts.free) from None


@contextmanager
def unfit(name: str) -> Iterator[None]:
    """Turn whatever the first passes raise into one sentence: this model does not work as the backend expects."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BadCheckpoint(
            f"{name} cannot be run by the torch backend: {_reason(error)}", hint="a GGUF of it"
        ) from error


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """transformers' own eager attention, for comparison."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)
