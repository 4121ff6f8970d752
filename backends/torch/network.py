"""A transformers model as a function of one pass: ids and places in, logits and hidden states out.

Features are taken by hooks on the layers that are asked for, so nothing else is kept. The output head runs only on the
columns whose logits are wanted.

Shapes: N = sequences, L = columns of the pass, C = columns whose logits are wanted, V = vocabulary, d = hidden size, m*d =
width of the features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspark_cli.backends.base import DsparkError
from dspark_cli.backends.torch.cache import FULL, SLIDING, KeyValues, Place, ShapeProbe


@dataclass(frozen=True)
class PassOutput:
    """logits [N, C, V]; features [N, L, m*d] or None; hidden [N, C, d] or None: what the output head reads."""

    logits: Tensor
    features: Tensor | None
    hidden: Tensor | None


class Network:
    """The model with its hooks. `layers` and `hidden` say what a pass keeps besides the logits."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.text = model.config.get_text_config()
        self.n_layer = int(self.text.num_hidden_layers)
        self.decoder_layers = _decoder_layers(model, self.n_layer, name)
        self.windows = mask_windows(self.text, name)
        self.layers: tuple[int, ...] = ()
        self.hidden = False
        self._taken: dict[int | str, Tensor] = {}
        self._handles: list[Any] = []
        parameters = inspect.signature(model.forward).parameters
        self._cache_word = "cache" if "cache" in parameters else "past_key_values"
        self._keeps = "logits_to_keep" in parameters

    @property
    def embedding(self) -> Tensor:
        """[V, d]."""
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> Tensor:
        """[V, d]; the embedding itself where they are tied."""
        return self.model.get_output_embeddings().weight

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(int(parameter.nbytes) for parameter in self.model.parameters())

    def take(self, layers: Sequence[int], hidden: bool) -> None:
        """Keep the outputs of these decoder layers (-1 = the embeddings) from now on, and what the output head reads."""
        for handle in self._handles:
            handle.remove()
        self.layers, self.hidden = tuple(layers), hidden
        self._handles = [self._hook(layer) for layer in sorted(set(layers))]
        if hidden:
            head = self.model.get_output_embeddings()
            self._handles.append(head.register_forward_pre_hook(self._keep_input("hidden"), with_kwargs=True))
        self._taken = {}

    def _hook(self, layer: int) -> Any:
        if layer == -1:
            return self.decoder_layers[0].register_forward_pre_hook(self._keep_input(-1), with_kwargs=True)

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._taken[layer] = output[0] if isinstance(output, tuple) else output

        return self.decoder_layers[layer].register_forward_hook(keep)

    def _keep_input(self, key: int | str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            self._taken[key] = args[0] if args else kwargs["hidden_states"]

        return keep

    def __call__(self, ids: Tensor, cache: KeyValues, place: Place, keep: Tensor | None) -> PassOutput:
        """One pass over ids [N, L] at `place`. keep: columns whose logits are wanted, int64 [C]; None = all."""
        logits = self._forward(ids, cache.at(place), place.positions, self._masks(place), keep)
        features = torch.cat([self._taken[layer] for layer in self.layers], dim=-1) if self.layers else None
        hidden = self._taken["hidden"] if self.hidden else None
        self._taken = {}
        return PassOutput(logits, features, hidden)

    def probe(self, ids: Tensor) -> dict[int, tuple[int, int, int]]:
        """What the layers cache (`KeyValues`), found by one pass over ids [1, L]."""
        probe, length = ShapeProbe(), ids.shape[1]
        positions = torch.arange(length, device=ids.device).unsqueeze(0)
        self._forward(ids, probe, positions, self._masks(Place([0], positions, positions, length)), None)
        return probe.shapes

    @torch.inference_mode()
    def without_cache(self, ids: Tensor) -> Tensor:
        """Logits [1, L, V] of ids [1, L] as transformers itself computes them, with its own masks and no cache."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def _forward(self, ids: Tensor, cache: Any, positions: Tensor, mask: Any, keep: Tensor | None) -> Tensor:
        wanted = {"logits_to_keep": keep} if self._keeps and keep is not None else {}
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_word: cache},
            **wanted,
        ).logits
        return logits if self._keeps or keep is None else logits[:, keep]

    def _masks(self, place: Place) -> Any:
        """One mask where all layers see alike, else one by layer type, as transformers' own generation passes them."""
        if len(self.windows) == 1:
            return place.mask(next(iter(self.windows.values())))
        return {kind: place.mask(window) for kind, window in self.windows.items()}


def mask_windows(text: Any, name: str) -> dict[str, int | None]:
    """Layer type -> sliding window (None = everything) of a text config.

    Raises DsparkError for models with layers that cannot take back tokens, or whose masks are of another kind.
    """
    kinds = list(getattr(text, "layer_types", None) or [])
    if not kinds:
        if getattr(text, "attention_chunk_size", None):
            kinds = ["chunked_attention"]
        else:
            kinds = [SLIDING if getattr(text, "sliding_window", None) else FULL]
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise DsparkError(
            f"{name} has layers of type {', '.join(unknown)}: their state cannot be taken back, so drafts cannot be verified",
            hint="a GGUF of it with --drafter none",
        )
    return {kind: int(text.sliding_window) if kind == SLIDING else None for kind in sorted(set(kinds))}


def _decoder_layers(model: Any, n_layer: int, name: str) -> Sequence[nn.Module]:
    """The decoder layers, where transformers keeps them."""
    layers = getattr(model.get_decoder(), "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) == n_layer:
        return layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layer]
    if len(found) != 1:
        raise DsparkError(
            f"the decoder layers of {name} ({type(model).__name__}) cannot be told from its other modules"
        )
    return found[0]
