"""Model families through the torch target: cached, ragged, rewound passes give what transformers itself gives without a cache.

Tiny random weights, sequences longer than the sliding windows. Opening a target already compares twelve tokens; this goes
past every window and compares features too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dspark_cli.backends.base import DsparkError, Row  # noqa: E402
from dspark_cli.backends.torch.config import BadCheckpoint  # noqa: E402
from dspark_cli.backends.torch.loading import plain_attention  # noqa: E402
from dspark_cli.backends.torch.network import mask_windows  # noqa: E402
from dspark_cli.backends.torch.target import TorchOptions, TorchTarget, open_target  # noqa: E402
from tiny import N_VOCAB, save_tokenizer, tiny_model  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"] * 2

#: model_type -> what its config needs beside the sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},  # SmolLM2 is this
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},  # Qwen2.5
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mistral": {"sliding_window": 9, "head_dim": 8},
    "phi3": {"sliding_window": 9},
    "smollm3": {},
    "gemma2": {"head_dim": 8, "sliding_window": 9, "layer_types": MIXED},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": MIXED},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 9,
        "layer_types": MIXED,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}
GEMMA4 = FAMILIES["gemma4_text"]
#: models that see and hear as well, as they are published: model_type -> (of its text part, what that needs, the others)
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Gemma 3 from 4B on
    "gemma3": (
        "gemma3_text",
        FAMILIES["gemma3_text"],
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    # Gemma 4 E2B, E4B: embeddings of every layer, the last layers without keys and values of their own
    "gemma4": (
        "gemma4_text",
        {**GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": N_VOCAB, "num_kv_shared_layers": 2},
        {"vision_config": None, "audio_config": None},
    ),
    "gemma4_unified": ("gemma4_unified_text", GEMMA4, {}),  # Gemma 4 12B
}


def family_config(kind: str) -> transformers.PretrainedConfig:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if kind in FAMILIES:
        return transformers.CONFIG_MAPPING[kind](**{**SIZES, **FAMILIES[kind]})
    text, needs, others = PUBLISHED[kind]
    return transformers.CONFIG_MAPPING[kind](text_config={"model_type": text, **SIZES, **needs}, **others)


def save_family(kind: str, folder: Path) -> Path:
    config = family_config(kind)
    tiny_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def open_family(kind: str, folder: Path) -> TorchTarget:
    return open_target(save_family(kind, folder), TorchOptions(n_seq=2, threads=1, capture="off"))


def check_passes(target: TorchTarget) -> None:
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, size=40).tolist()
    with plain_attention(target.network.model), torch.inference_mode():
        ids = torch.tensor([tokens], device=target.device)
        whole = target.network.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    target.request_features((-1, 0, 2))
    first = target.step([Row(0, tokens[:17]), Row(1, tokens[5:12])])[0]
    target.rewind(0, 15)
    rest = [target.step([Row(0, tokens[i : i + 5])])[0] for i in range(15, 40, 5)]
    logits = np.concatenate([first.logits[:15], *(part.logits for part in rest)])
    parts = [first.features[:15], *(part.features for part in rest)]  # type: ignore[index]
    np.testing.assert_allclose(logits, whole.logits[0].float().cpu().numpy(), atol=2e-3, rtol=1e-3)
    wanted = np.concatenate([whole.hidden_states[layer + 1][0].cpu().numpy() for layer in (-1, 0, 2)], axis=1)
    np.testing.assert_allclose(np.concatenate(parts), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [*FAMILIES, *PUBLISHED])
def test_passes_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    with open_family(kind, tmp_path) as target:
        check_passes(target)


def test_layers_that_cannot_take_back_tokens_are_refused() -> None:
    for kinds in (["linear_attention", "full_attention"], ["chunked_attention"], ["conv", "full_attention"]):
        config = transformers.LlamaConfig(**SIZES)
        config.layer_types = kinds
        with pytest.raises(DsparkError, match=r"layers of type .*cannot be taken back"):
            mask_windows(config, "model")


def test_a_model_that_does_not_take_our_masks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at load: here with masks that let every column see everything."""
    from dspark_cli.backends.torch.cache import Place

    monkeypatch.setattr(Place, "mask", lambda self, window: torch.ones(1, 1, self.positions.shape[1], self.keys) > 0)
    with pytest.raises(BadCheckpoint, match="differ from transformers' own"):
        open_family("llama", tmp_path)
