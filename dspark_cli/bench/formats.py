"""Other formats of a target, made from the file at hand: never downloaded, kept until their source changes."""

from __future__ import annotations

import os
from pathlib import Path

from dspark_cli.backends.errors import BadInput, DsparkError

FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0")


def requantize(source: Path, form: str, folder: Path) -> Path:
    """`source` in format `form` under `folder`; made by llama_model_quantize unless it is there already.

    Requantizing adds no quality: an F16 version of a Q4_1 file says the same and costs what F16 costs, which is what
    comparing formats on one machine needs. Raises BadInput for an unknown format, DsparkError when it cannot be made.
    """
    if form.upper() not in FORMATS:
        raise BadInput(f"unknown format {form!r}: one of {', '.join(FORMATS)}")
    import gguf

    from dspark_cli.backends.gguf_file import check_file
    from dspark_cli.backends.llamacpp import native
    from dspark_cli.backends.llamacpp.native import lib

    check_file(source)
    facts = source.stat()
    path = folder / f"{source.stem}-{facts.st_size:x}-{facts.st_mtime_ns:x}.{form.upper()}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    log = native.start()
    log.clear()
    params = lib.llama_model_quantize_default_params()
    name = form.upper() if form.upper() == "F32" else f"MOSTLY_{form.upper()}"
    params.ftype = int(gguf.LlamaFileType[f"ALL_{name}" if name == "F32" else name])
    params.allow_requantize = True
    # Written under another name first: an interrupted run leaves nothing that looks whole.
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        status = lib.llama_model_quantize(str(source).encode(), str(unfinished).encode(), params)
        if status != 0:
            raise DsparkError(f"{source.name} cannot be made {form}: {log.reason() or f'status {status}'}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
