"""Names of weight formats, how many bits they take, and which is better."""

from __future__ import annotations

import re

#: owner/name as the Hub allows it: no part begins or ends with a dot or dash, none has two of them in a row
REPOSITORY = re.compile(r"^(?!.*(?:--|\.\.))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])$")
#: what a checkpoint in safetensors is
FULL_PRECISION = "BF16"
#: bits per weight, best first. Mixed formats (K) are averages over whole models; those with a file size in models.toml
#: agree within 1 % (tests/test_registry.py).
BITS = {
    "F32": 32.0,
    "BF16": 16.0,
    "F16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_K_M": 5.69,
    "Q5_K_S": 5.54,
    "Q5_1": 6.0,
    "Q5_0": 5.5,
    "Q4_K_M": 4.87,
    "Q4_K_S": 4.58,
    "Q4_1": 5.0,
    "MXFP4": 4.6,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.32,
    "Q4_0": 4.6,
    "Q3_K_L": 4.27,
    "Q3_K_M": 3.91,
    "Q3_K_S": 3.5,
    "IQ3_M": 3.66,
    "Q2_K": 3.0,
}
#: what GGUF repositories usually hold, best first
USUAL = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
#: beginnings of files beside the model: projectors, importance matrices, drafters that travel along
_NOT_A_TARGET = ("mmproj", "imatrix", "dspark-", "dflash-", "mtp-", "eagle3-")
_QUANT = re.compile(r"(?<![A-Za-z0-9])(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")(?![A-Za-z0-9_])", re.I)
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.I)


def weight_bytes(n_params: int, quant: str) -> int:
    """Bytes of a file with `n_params` weights at `quant`. Raises KeyError for a format nobody knows."""
    return int(n_params * BITS[quant] / 8)


def quant_of(file_name: str) -> str | None:
    """The format a file name ends with ("model-q4_k_m-00001-of-00003.gguf" -> "Q4_K_M"); None if it names none."""
    stem = _PART.sub("", file_name.rpartition("/")[2])
    found = _QUANT.findall(stem)
    return found[-1].upper() if found else None


def is_target_file(file_name: str) -> bool:
    """Whether a GGUF file may be a target: what lies beside one is named by what it is."""
    base = file_name.rpartition("/")[2].lower()
    return base.endswith(".gguf") and not base.startswith(_NOT_A_TARGET)


def rank(quant: str) -> int:
    """Smaller is better; unknown formats come last."""
    return list(BITS).index(quant) if quant in BITS else len(BITS)


def part_of(file_name: str) -> tuple[int, int] | None:
    """(number, count) of a part of a split GGUF, counted from 1; None for a whole file."""
    match = _PART.search(file_name)
    return (int(match[1]), int(match[2])) if match else None


def whole_name(file_name: str) -> str:
    """The name without its part number: the same for all parts of a split file."""
    return _PART.sub("", file_name)


def parts_of(file_name: str) -> list[str]:
    """All part names of the split file that `file_name` belongs to; itself for a whole file."""
    part = part_of(file_name)
    if part is None:
        return [file_name]
    return [_PART.sub(f"-{i:05d}-of-{part[1]:05d}", file_name) for i in range(1, part[1] + 1)]
