"""The device that these tests run on, and what is opened there. Importing this skips the file where there is none.

DSPARK_TEST_DEVICE names another device than cuda. On cpu the kernels' references stand in for the kernels and a recording
runs its pass again: that tries the tests, not the device. With TRITON_INTERPRET=1 the kernels run there, interpreted.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dspark_cli.backends.torch.target import TorchTarget

torch = pytest.importorskip("torch")
DEVICE = os.environ.get("DSPARK_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("no CUDA or ROCm device on this machine", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATH = "triton" if ON_GPU or INTERPRETED else "reference"
N_SEQ, N_CTX = 3, 512
# float32 throughout; passes of other widths sum in another order. Logits are about 1 to 10.
ATOL = 2e-3

only_gpu = pytest.mark.skipif(not ON_GPU, reason="says nothing on a CPU")


def on_device(case: Any) -> Any:
    """A dataclass of tensors, with all of them on the device."""
    moved = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: x.to(DEVICE) for name, x in moved.items() if isinstance(x, torch.Tensor)})


def opened(folder: Path, *, recorded: bool = True, **more: Any) -> TorchTarget:
    from dspark_cli.backends.torch.target import TorchOptions, open_target

    how = "graph" if recorded and ON_GPU else "off"
    options = TorchOptions(**{"ctx": N_CTX, "n_seq": N_SEQ, "device": DEVICE, "threads": 2, "capture": how, **more})
    target = open_target(folder, options)
    return record_again(target) if recorded else target


def record_again(target: TorchTarget) -> TorchTarget:
    """On a CPU: padding and fixed buffers as on a GPU, and a "recording" that runs the pass again."""
    from dspark_cli.backends.torch.capture import Recorder

    if not ON_GPU:
        target._recorder = Recorder(target.network, target.cache, target.info.n_seq, lambda run: run)
    return target
