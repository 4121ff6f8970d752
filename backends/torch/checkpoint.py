"""Drafter checkpoints on disk: safetensors only, every key accounted for, nothing from the folder is ever executed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dspark_cli.backends.base import PairMismatch
from dspark_cli.backends.torch.config import BadCheckpoint, DrafterConfig
from dspark_cli.backends.torch.dialects import read_config
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.backends.torch.layers import RMSNorm

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
#: weights that training keeps beside the drafter; drafting does not need them
IGNORED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight", "rotary_emb.inv_freq")
TIED = ("embed_tokens.weight", "lm_head.weight")
SHOWN = 6  # keys named in an error before "and N more"


@dataclass(frozen=True)
class TargetTables:
    """The target's own matrices, for checkpoints that leave them out. float [V, d] each.

    lm_head: None when the target ties it to the embedding.
    """

    embed_tokens: Tensor
    lm_head: Tensor | None = None


def load_drafter(
    folder: Path,
    *,
    tables: TargetTables | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    untrained: bool = False,
) -> DSpark | Eagle3:
    """The drafter in `folder`, ready for inference. Raises BadCheckpoint for anything that does not fit exactly.

    untrained: accept norms that are all ones (a model saved before its first step).
    """
    config = read_config(folder)
    weights = read_weights(folder)
    with torch.device("meta"):
        model = build(config)
    weights = _drop_ignored(weights)
    if "d2t" in weights and config.reduced:
        weights["d2t"] = absolute_ids(weights["d2t"], config)
    _borrow(weights, config, tables)
    _check_keys(weights, model, folder)
    _check_values(weights, model, untrained)
    model.load_state_dict(weights, assign=True)
    _materialise_rotary(model)
    model.to(device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def build(config: DrafterConfig) -> DSpark | Eagle3:
    """A module of the right class with fresh weights."""
    return Eagle3(config) if config.kind == "eagle3" else DSpark(config)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors file(s) in `folder`."""
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} cannot be read: {error}", hint="download it again") from None
    return weights


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadCheckpoint(f"{index} cannot be read: {error}") from None
        if any(Path(name).name != name for name in names):
            raise BadCheckpoint(f"{index} names files outside its folder")
        return [folder / name for name in sorted(names)]
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise BadCheckpoint(
            f"{folder} has pickled weights only ({_some(pickled)}); loading them could run code",
            hint="convert them to model.safetensors where they come from",
        )
    raise BadCheckpoint(f"{folder} has no model.safetensors")


def _drop_ignored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key not in IGNORED}


def absolute_ids(offsets: Tensor, config: DrafterConfig) -> Tensor:
    """int64 [W]: the target id of each draft id, from the offsets (target id - draft id) that checkpoints hold."""
    if offsets.shape != (config.draft_vocab_size,) or offsets.is_floating_point():
        raise BadCheckpoint(f"d2t has shape {tuple(offsets.shape)}, needs {config.draft_vocab_size} integers")
    ids = offsets.long() + torch.arange(len(offsets))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(ids.unique()) != len(ids):
        raise BadCheckpoint(f"d2t does not map to {len(ids)} different tokens below {config.vocab_size}")
    return ids


def _borrow(weights: dict[str, Tensor], config: DrafterConfig, tables: TargetTables | None) -> None:
    """Fill in embedding and output head from the target where the checkpoint leaves them out."""
    if tables is None:
        return
    head = tables.embed_tokens if tables.lm_head is None else tables.lm_head
    if "lm_head.weight" not in weights:
        ids = weights.get("d2t") if config.reduced else None
        weights["lm_head.weight"] = head if ids is None else head[ids.to(head.device)]
    weights.setdefault("embed_tokens.weight", tables.embed_tokens)


def _check_keys(weights: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing and set(missing) <= set(TIED):
        raise BadCheckpoint(
            f"{folder} leaves out {_some(missing)}: it borrows them from the target", hint="give the target as well"
        )
    if missing or extra:
        parts = [f"{word} keys: {_some(keys)}" for word, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise BadCheckpoint(f"{folder} does not fit its config.json; {'; '.join(parts)}")
    for key, tensor in expected.items():
        if weights[key].shape != tensor.shape:
            found, needed = tuple(weights[key].shape), tuple(tensor.shape)
            what = "vocabulary does not match: " if key in TIED and found[1:] == needed[1:] else ""
            raise BadCheckpoint(f"{what}{key} has shape {found}, config.json says {needed}")


def _check_values(weights: Mapping[str, Tensor], model: nn.Module, untrained: bool) -> None:
    broken = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise BadCheckpoint(f"NaN or infinite values in {_some(broken)}", hint="download it again")
    norms = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm))
    ones = [key for key in norms if key in weights and bool((weights[key] == 1).all())]
    if ones and not untrained:
        raise BadCheckpoint(f"norm weights are all ones, as before training: {_some(ones)}")


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest


def _materialise_rotary(model: DSpark | Eagle3) -> None:
    """The rotary table is no weight: it was built on the meta device and needs a real one."""
    model.rotary = type(model.rotary)(model.config)


def check_pair(config: DrafterConfig, *, n_vocab: int, n_embd: int, n_layer: int, same_tokens: bool = False) -> None:
    """Raise PairMismatch unless a drafter of `config` fits a target of these sizes.

    same_tokens: the caller compared the tokenizers, so vocabulary sizes may differ by padding.
    """
    if config.vocab_size != n_vocab and not same_tokens:
        raise PairMismatch(f"the drafter's vocabulary has {config.vocab_size} tokens, the target's {n_vocab}")
    if config.target_hidden_size != n_embd:
        raise PairMismatch(f"the drafter reads hidden states of {config.target_hidden_size}, the target has {n_embd}")
    beyond = [layer for layer in config.target_layer_ids if layer >= n_layer]
    if beyond:
        raise PairMismatch(f"the drafter reads target layers {beyond}, the target has {n_layer} (0..{n_layer - 1})")
    if config.num_target_layers is not None and config.num_target_layers != n_layer:
        raise PairMismatch(f"the drafter is for a target of {config.num_target_layers} layers, this one has {n_layer}")
