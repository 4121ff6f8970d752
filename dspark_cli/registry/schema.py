"""What may stand in models.toml: every key with its type. Anything else is an error with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from dspark_cli.backends.llamacpp.attention import few_sequences
from dspark_cli.registry.plan import DrafterSize, TargetSize
from dspark_cli.registry.quants import BITS, FULL_PRECISION, REPOSITORY, weight_bytes


def _repository(value: str) -> str:
    if not REPOSITORY.match(value):
        raise ValueError("no Hub repository (owner/name)")
    return value


Repository = Annotated[str, AfterValidator(_repository)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.+-]+$", min_length=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ThinkingMode = Literal["on", "off", "both"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GgufFile(_Table):
    """One file of a GGUF repository; of a split file the name without `-00001-of-0000N`."""

    file: str
    bytes: PositiveInt | None = None
    sha256: Sha256 | None = None


class KnownDrafter(_Table):
    """A drafter published or shipped for a target.

    builtin:         file under dspark_cli/drafters, when it ships with this package
    block_size:      drafts per round, the anchor not counted
    accepted_length: tau by benchmark as `source` publishes it (the bonus token included)
    thinking:        the mode of the text it was trained on; None where nobody says
    usable:          False: listed so that nobody looks for it in vain; `note` says why it cannot be loaded
    unconfirmed:     keys of this table that no public page confirms
    """

    kind: Literal["dspark", "dflash", "eagle3", "small"]
    format: Literal["gguf", "safetensors"]
    repository: Repository | None = None
    revision: str | None = None
    file: str | None = None
    builtin: str | None = None
    block_size: PositiveInt | None = None
    n_params: PositiveInt | None = None
    bytes: PositiveInt | None = None
    sha256: Sha256 | None = None
    accepted_length: dict[str, float] = Field(default_factory=dict)
    speedup: str | None = None
    thinking: ThinkingMode | None = None
    gated: bool = False
    usable: bool = True
    note: str | None = None
    source: str = ""
    unconfirmed: tuple[str, ...] = ()

    @field_validator("unconfirmed", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("accepted_length", mode="before")
    @classmethod
    def _floats(cls, value: Any) -> Any:
        return {key: float(v) if isinstance(v, int) else v for key, v in value.items()} if _is_table(value) else value

    @model_validator(mode="after")
    def _has_a_place(self) -> KnownDrafter:
        if not (self.repository or self.builtin):
            raise ValueError('needs repository, such as "deepseek-ai/dspark_qwen3_4b_block7"')
        return self

    @property
    def path(self) -> Path | None:
        """Where it lies on this disk (a file, or the folder of a checkpoint); None if it does not."""
        from dspark_cli.registry.disk import builtin_file, cached_checkpoint, cached_file

        if self.builtin:
            return builtin_file(self.builtin)
        if self.format == "safetensors":
            return cached_checkpoint(self.repository)
        return cached_file(self.repository, self.file)


class Entry(_Table):
    """One target of models.toml.

    n_params:    for sizes of files that are not listed; `parameters` is what people call it
    n_ff:        widest feed-forward layer (of one expert); n_active: parameters a token uses, of mixtures of experts
    gguf_files:  quant -> file; where empty, the repository's own listing decides
    thinking:    "optional" (its chat template has the switch), "always" or None
    sibling:     a similar target that has a drafter of its own, for targets that have none
    unconfirmed: keys of this table that no public page confirms
    """

    name: Name
    family: str
    parameters: str
    aliases: tuple[Name, ...] = ()
    n_params: PositiveInt | None = None
    n_active: PositiveInt | None = None
    context: PositiveInt | None = None
    n_layer: PositiveInt | None = None
    n_embd: PositiveInt | None = None
    n_ff: PositiveInt | None = None
    n_head_kv: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    n_vocab: PositiveInt | None = None
    thinking: Literal["optional", "always"] | None = None
    licence: str | None = None
    package: str | None = None
    safetensors: Repository | None = None
    gated: bool = False
    gguf: Repository | None = None
    gguf_mirrors: tuple[Repository, ...] = ()
    gguf_files: dict[str, GgufFile] = Field(default_factory=dict)
    note: str | None = None
    sibling: str | None = None
    source: str = ""
    unconfirmed: tuple[str, ...] = ()
    drafter: tuple[KnownDrafter, ...] = ()

    @field_validator("aliases", "gguf_mirrors", "unconfirmed", "drafter", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("gguf_files", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`Q4_K_M = "name.gguf"` is short for `{ file = "name.gguf" }`."""
        return {q: {"file": f} if isinstance(f, str) else f for q, f in value.items()} if _is_table(value) else value

    @field_validator("gguf_files")
    @classmethod
    def _known_formats(cls, value: dict[str, GgufFile]) -> dict[str, GgufFile]:
        if wrong := next((quant for quant in value if quant not in BITS), None):
            raise ValueError(f"unknown format {wrong!r}, one of {', '.join(BITS)}")
        return value

    @model_validator(mode="after")
    def _has_files(self) -> Entry:
        if not (self.gguf or self.safetensors or self.package):
            raise ValueError('needs gguf or safetensors, a Hub repository such as "Qwen/Qwen3-4B-GGUF"')
        return self

    @field_validator("parameters")
    @classmethod
    def _countable(cls, value: str) -> str:
        if _count(value) is None:
            raise ValueError('needs a number with M, B or T, such as "4B" or "30B-A3B"')
        return value

    @property
    def count(self) -> int:
        """Parameters, as exactly as the entry knows them."""
        return self.n_params or _count(self.parameters) or 0

    def on_disk(self) -> dict[str, Path]:
        """GGUF files of this target that are here: quant -> path (of a split file, its first part)."""
        from dspark_cli.registry.disk import cached_quants, package_file

        if not self.package:
            return cached_quants(self)
        found = {quant: package_file(self.package, file.file) for quant, file in self.gguf_files.items()}
        return {quant: path for quant, path in found.items() if path is not None}

    def checkpoint(self) -> Path | None:
        """The folder of the full-precision checkpoint, when it is on this disk."""
        from dspark_cli.registry.disk import cached_checkpoint

        return cached_checkpoint(self.safetensors)

    def file_bytes(self, quant: str) -> int:
        """Bytes of the weights at `quant`: as listed, else from bits per weight."""
        listed = self.gguf_files.get(quant)
        return listed.bytes if listed and listed.bytes else weight_bytes(self.count, quant)

    def size_at(self, quant: str = FULL_PRECISION) -> TargetSize:
        """What the memory plan needs. Shapes that the entry does not know are estimated from the parameter count."""
        guess = _typical(self.count)
        layers = self.n_layer or guess["n_layer"]
        width = (self.n_head_kv or 8) * (self.head_dim or 128)
        n_embd = self.n_embd or guess["n_embd"]
        return TargetSize(
            weights=self.file_bytes(quant),
            n_layer=layers,
            n_embd=n_embd,
            n_vocab=self.n_vocab or 152064,
            kv_values=2 * layers * width,
            n_ff=self.n_ff or 4 * n_embd,
            n_ctx_train=self.context or 32768,
            n_head=n_embd // (self.head_dim or 128),
            few_sequences=few_sequences(quant),
        )

    @property
    def shape_known(self) -> bool:
        return None not in (self.n_layer, self.n_embd, self.n_head_kv, self.head_dim, self.n_vocab)

    def has_gguf_form(self, drafter: KnownDrafter) -> bool:
        """Whether libllama has a graph for what `drafter` is, as far as its table says (heads are seen in its config.json)."""
        return drafter.kind != "eagle3" and not self.family.startswith("gemma")

    def drafter_size(self, drafter: KnownDrafter, backend: str = "torch") -> DrafterSize:
        """What the memory plan needs of `drafter`. Published cards give little: the rest is the target's own shape.

        backend: of the target; beside llama.cpp a checkpoint runs as its Q8_0 copy
        """
        target = self.size_at()
        n_params = drafter.n_params or max(self.count // 8, 1)
        copied = backend == "llamacpp" and drafter.format == "safetensors" and self.has_gguf_form(drafter)
        form = "Q8_0" if drafter.format == "gguf" or copied else FULL_PRECISION
        listed = drafter.bytes and int(drafter.bytes * (BITS[form] / BITS[FULL_PRECISION] if copied else 1))
        small = drafter.kind == "small"
        layers = 24 if small else 1 if drafter.kind == "eagle3" else 5
        # A standalone small model of today has narrow keys and values; the others attend as the target does.
        kv_width = 2 * layers * 256 if small else target.kv_values * layers // max(target.n_layer, 1)
        return DrafterSize(
            kind=drafter.kind,
            weights=listed or weight_bytes(n_params, form),
            n_layer=layers,
            n_embd=896 if small else target.n_embd,
            n_vocab=target.n_vocab,
            kv_values=kv_width,
            n_ff=4864 if small else target.n_ff,
            block_size=drafter.block_size or 8,
            features=0 if small else (3 if drafter.kind == "eagle3" else 5) * target.n_embd,
            n_head=target.n_head,
        )


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _count(text: str) -> int | None:
    """ "14B" -> 14e9, "30B-A3B" -> 30e9, "135M" -> 135e6."""
    match = re.match(r"^(\d+(?:\.\d+)?)([MBT])(?:-A[\d.]+B)?$", text)
    if match is None:
        return None
    return int(float(match[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[match[2]])


def _typical(n_params: int) -> dict[str, int]:
    """Layers and width of a dense model of about this size: for estimates before its file is here."""
    for limit, n_layer, n_embd in ((2e9, 24, 2048), (6e9, 36, 2560), (1e10, 36, 4096), (2e10, 48, 5120)):
        if n_params < limit:
            return {"n_layer": n_layer, "n_embd": n_embd}
    return {"n_layer": 64, "n_embd": 5120}
