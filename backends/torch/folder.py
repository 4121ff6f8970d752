"""The first look at a checkpoint folder, before any of its weights are read: what is refused, and with which words."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dspark_cli.backends.base import BadInput, NotReady
from dspark_cli.backends.torch.checkpoint import weight_files
from dspark_cli.backends.torch.config import BadCheckpoint
from dspark_cli.backends.torch.dialects import DEEPSPEC_CLASSES, ZLAB_CLASSES

#: safetensors' words for the dtypes that can be computed in -> torch's
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
#: bytes of a safetensors table that are read at most
LONGEST_TABLE = 100 << 20
#: dtypes that may lie beside the weights (counters, masks, maps); as a weight they would be read as numbers they are not
BESIDE = {"I64", "I32", "BOOL", "U8"}


@dataclass(frozen=True)
class Folder:
    """A checkpoint that may be loaded.

    dtype:  of most of its values ("bfloat16", ...)
    values: numbers in its weights
    """

    path: Path
    config: dict[str, Any]
    model_type: str
    dtype: str
    values: int

    def n_bytes(self, dtype: str) -> int:
        """Bytes of the weights in `dtype`."""
        return self.values * (4 if dtype == "float32" else 2)


def check_folder(path: Path) -> Folder:
    """The checkpoint in `path`. Raises DsparkError for what cannot or must not be loaded."""
    config = read_config_file(path)
    model_type = str(config.get("model_type") or "")
    if is_drafter(config):
        raise BadInput(f"{path} is a drafter, not a model that can answer", hint="--drafter FOLDER")
    _check_code(path, config, model_type)
    quantization = config.get("quantization_config")
    if quantization:
        known = isinstance(quantization, dict) and quantization.get("quant_method")
        method = known or "an unknown method"
        raise BadCheckpoint(
            f"{path} is quantized by {method}: the torch backend runs float32, bfloat16 and float16",
            hint="its unquantized repository, or a GGUF of it",
        )
    sizes = _sizes(path)
    return Folder(path, config, model_type, _most(sizes), sum(sizes.values()))


def stored_dtype(path: Path) -> str:
    """The dtype of most values in a checkpoint, as its files say: config.json may say another. Raises BadCheckpoint."""
    return _most(_sizes(path))


def _most(sizes: Counter[str]) -> str:
    return DTYPES[sizes.most_common(1)[0][0]]


def read_config_file(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises BadCheckpoint."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} is no checkpoint: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{file} is not a JSON object")
    return config


def is_drafter(config: dict[str, Any]) -> bool:
    """Whether a checkpoint reads features of a target (DSpark, DFlash, Eagle3) and is no model of its own."""
    named = config.get("architectures")
    classes = [*DEEPSPEC_CLASSES, *ZLAB_CLASSES]
    return "speculators_model_type" in config or any(name in classes for name in _listed(named))


def _listed(value: Any) -> list[Any]:
    """What a config gives as a list, a mapping's keys, or alone."""
    return list(value) if isinstance(value, list | dict) else [value]


def _check_code(path: Path, config: dict[str, Any], model_type: str) -> None:
    """Only models that transformers itself implements: code from a folder is never run."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if config.get("auto_map"):
        raise BadCheckpoint(
            f"{path} needs code that comes with it (auto_map: {', '.join(map(str, _listed(config['auto_map'])))}); "
            "dspark never runs code from a model",
            hint="a GGUF of it, or a release of transformers that has this model",
        )
    kind = repr(model_type) if model_type else "no model_type"
    raise NotReady(
        f"transformers {__version__} has no language model for {path} ({kind})",
        hint="pip install --upgrade transformers",
    )


def _sizes(path: Path) -> Counter[str]:
    """safetensors dtype -> values in it, over all weight files.

    Raises BadCheckpoint for files that are missing or damaged, and for dtypes that cannot be computed in.
    """
    files = weight_files(path)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadCheckpoint(
            f"{path} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:3])}",
            hint="download it again",
        )
    sizes: Counter[str] = Counter()
    for file in files:
        for name, (dtype, count) in _header(file).items():
            if dtype in DTYPES:
                sizes[dtype] += count
            elif dtype not in BESIDE or name.endswith(".weight"):
                raise BadCheckpoint(
                    f"{file.name}: {name} is {dtype}; the torch backend runs {', '.join(DTYPES)}",
                    hint="a GGUF of it, or its unquantized checkpoint",
                )
    if not sizes:
        raise BadCheckpoint(f"{path} has no weights in its safetensors files")
    return sizes


def _header(file: Path) -> dict[str, tuple[str, int]]:
    """Dtype and number of values of every tensor in a safetensors file, whose table is checked against its size."""
    found: dict[str, tuple[str, int]] = {}
    end = 0
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            table = json.loads(stream.read(min(length, LONGEST_TABLE)).decode("utf-8"))
        for name, entry in table.items():
            if name != "__metadata__":
                found[name] = (str(entry["dtype"]), prod(map(int, entry["shape"])))
                end = max(end, int(entry["data_offsets"][1]))
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadCheckpoint(
            f"{file} cannot be read as safetensors: {type(error).__name__}: {error}", hint="download it again"
        ) from None
    if file.stat().st_size != 8 + length + end:
        raise BadCheckpoint(
            f"{file} has {file.stat().st_size} bytes, its table needs {8 + length + end}", hint="download it again"
        )
    return found


def out_of_memory(what: str, needed: int, free: int, hint: str = "a smaller --ctx, or a GGUF of the model") -> NotReady:
    """The numbers of an allocation that failed (exit code 3)."""
    return NotReady(f"{what} needs about {_amount(needed)}, {_amount(free)} can be used", hint=hint)


def _amount(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
