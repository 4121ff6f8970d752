"""Drafter checkpoints on disk: safetensors only, every key accounted for, nothing from the folder is ever executed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dspark_cli.backends.pairing import DrafterFacts, TargetFacts, check
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
    with torch.device("meta"):
        model = build(config)
    _check_shapes(read_shapes(folder), model, folder)
    weights = _drop_ignored(read_weights(folder))
    if "d2t" in weights and config.reduced:
        weights["d2t"] = absolute_ids(weights["d2t"], config)
    return assemble(config, weights, folder, tables=tables, dtype=dtype, device=device, untrained=untrained)


def assemble(
    config: DrafterConfig,
    weights: dict[str, Tensor],
    source: Path,
    *,
    tables: TargetTables | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    untrained: bool = False,
) -> DSpark | Eagle3:
    """A drafter from its weights (`d2t` as absolute ids), checked, ready for inference; `source` is named in errors."""
    with torch.device("meta"):
        model = build(config)
    _borrow(weights, config, tables)
    _check_keys(weights, model, source)
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
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} cannot be read: {error}", hint="download it again") from None
    return weights


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in `folder`, from the headers of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path} cannot be read: {error}", hint="download it again") from None
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; none of them outside its folder (the Hub's cache links to its own blobs)."""
    files = _named_weight_files(folder)
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    for path in files:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise BadCheckpoint(f"{path} is a link out of its folder, to {path.resolve()}")
    return files


def _named_weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = any(Path(name).name != name for name in names)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadCheckpoint(f"{index} cannot be read: {error}") from None
        if outside:
            raise BadCheckpoint(f"{index} names files outside its folder")
        if not names:
            raise BadCheckpoint(f"{index} names no weight files", hint="download it again")
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


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, folder: Path) -> None:
    """Before anything is read: no tensor that the config does not ask for, none of another size."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, shape in shapes.items():
        if key in expected and key not in TIED and shape != expected[key]:
            raise BadCheckpoint(f"{key} has shape {shape}, config.json of {folder} says {expected[key]}")


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


def facts_of(config: DrafterConfig, name: str = "the drafter") -> DrafterFacts:
    """What the pair check must know of a drafter."""
    return DrafterFacts(
        name=name,
        kind=config.kind,
        n_vocab=config.vocab_size,
        n_embd=config.target_hidden_size,
        layers=config.target_layer_ids,
        block_size=config.block_size,
        rows=config.block_rows,
        made_for=config.num_target_layers,
        mask=config.mask_token_id,
        rope_theta=config.rope_theta,
        head_dim=config.head_dim,
        markov=bool(config.markov_rank),
        confidence=config.confidence_head,
        reduced=config.reduced,
        format="safetensors",
    )


def check_pair(
    config: DrafterConfig,
    *,
    n_vocab: int,
    n_embd: int,
    n_layer: int,
    depth: int | None = None,
    same_tokens: bool = False,
    name: str = "the drafter",
    target: str = "this target",
) -> None:
    """Raise PairMismatch unless a drafter of `config` fits a target of these sizes.

    n_layer:     layers whose outputs can be read (libllama hands out all but the last)
    depth:       layers of the target, to compare with what the drafter was made for; None: not compared
    same_tokens: the caller compared the tokenizers, so vocabulary sizes may differ by padding.
    """
    facts = TargetFacts(target, n_vocab=n_vocab, n_embd=n_embd, n_layer=depth or n_layer, last_layer=n_layer - 1)
    drafter = facts_of(config, name)
    check(drafter if depth else replace(drafter, made_for=None), facts, same_tokens=same_tokens)
