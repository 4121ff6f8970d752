"""A GGUF target in process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dspark_cli.backends.base import BadInput, PairMismatch, Row, RowOutput, Target, TargetInfo
from dspark_cli.backends.llamacpp import native
from dspark_cli.backends.llamacpp.context import DEFAULT_CTX, Context, ContextOptions
from dspark_cli.backends.llamacpp.model import DRAFTER_ARCHITECTURE, ChatTemplate, GgufTokenizer, Model
from dspark_cli.backends.llamacpp.native import lib
from dspark_cli.kernels import cpu_kernels


class LlamaCppTarget(Target):
    """One GGUF model in one libllama context of `options.n_seq` sequences."""

    def __init__(
        self,
        path: str | Path,
        options: ContextOptions | None = None,
        *,
        name: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        options = options or ContextOptions()
        self.model = Model(path, gpu_layers=options.gpu_layers, progress=progress)
        try:
            if self.model.architecture == DRAFTER_ARCHITECTURE:
                raise BadInput(
                    f"{self.model.path.name} is a drafter, not a model that can answer", hint="--drafter PATH"
                )
            n_ctx = options.ctx or min(self.model.n_ctx_train, DEFAULT_CTX)
            if n_ctx > self.model.n_ctx_train:
                raise BadInput(
                    f"--ctx {n_ctx} is more than the {self.model.n_ctx_train} tokens "
                    f"{self.model.path.name} was trained on"
                )
            self.context = Context(self.model, options, n_ctx=n_ctx)
        except BaseException:
            self.model.close()
            raise
        self.tokenizer = GgufTokenizer(self.model)
        self.template = ChatTemplate(self.model, self.tokenizer)
        self._layers: tuple[int, ...] = ()
        self._hidden = False
        self.max_rows = self.context.max_rows
        self.info = TargetInfo(
            name=name or self.model.path.stem,
            path=str(self.model.path),
            backend="llamacpp",
            format=self.model.format,
            device="cpu" if options.on_cpu else "gpu",
            n_vocab=self.model.n_vocab,
            n_embd=self.model.n_embd,
            n_layer=self.model.n_layer,
            n_ctx=n_ctx,
            n_seq=options.n_seq,
            details={
                "threads": self.context.threads,
                "kv_type": options.kv_type,
                "flash_attn": self.context.flash,
                "gpu_layers": options.gpu_layers,
                "kernels": cpu_kernels.identity() if options.on_cpu and cpu_kernels.state().types else "ggml",
            },
            # One cache for all: flash attention on a CPU skips what is masked, everything else computes it.
            crowded=self.context.flash == "off" or not options.on_cpu,
        )

    def render_chat(self, messages: Sequence[dict[str, str]], *, thinking: bool | None = None) -> str:
        return self.template.render(messages, thinking=thinking)

    def request_features(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not -1 <= layer < self.info.n_layer - 1:
                raise PairMismatch(
                    f"the drafter reads the output of layer {layer}; {self.info.name} has usable layers "
                    f"-1 to {self.info.n_layer - 2}"
                )
        switch = native.export("llama_set_embeddings_layer_inp")
        for layer in set(self._layers) - set(layers):
            switch(self.context.handle, layer + 1, False)
        for layer in set(layers) - set(self._layers):
            switch(self.context.handle, layer + 1, True)
        self._layers = tuple(layers)

    def request_hidden(self, wanted: bool) -> None:
        """Whether `step` also returns the final hidden states (training needs them, decoding does not)."""
        lib.llama_set_embeddings(self.context.handle, wanted)
        self._hidden = wanted

    def step(self, rows: Sequence[Row]) -> list[RowOutput]:
        batch = self.context.batch
        batch.logits[:] = 0
        end = 0
        for row in rows:
            begin, end = end, end + len(row.tokens)
            start = self.context.length(row.seq)
            batch.token[begin:end] = row.tokens
            batch.pos[begin:end] = np.arange(start, start + end - begin)
            batch.seq[begin:end] = row.seq
            batch.logits[begin if row.n_logits is None else end - row.n_logits : end] = 1
        self.context.decode(batch, end)
        self.native_ms = self.context.native_ms
        return self._outputs(rows, end)

    def _outputs(self, rows: Sequence[Row], n_tokens: int) -> list[RowOutput]:
        counts = [len(row.tokens) if row.n_logits is None else row.n_logits for row in rows]
        n_logits = sum(counts)
        logits = self.context.logits(n_logits) if n_logits else np.empty((0, self.info.n_vocab), dtype=np.float32)
        features = self.context.layer_outputs(self._layers, n_tokens) if self._layers else None
        hidden = self.context.hidden(n_logits) if self._hidden and n_logits else None
        outputs, token, logit = [], 0, 0
        for row, count in zip(rows, counts, strict=True):
            mine = None if features is None else features[token : token + len(row.tokens)]
            states = None if hidden is None else hidden[logit : logit + count]
            outputs.append(RowOutput(logits[logit : logit + count], mine, states))
            token, logit = token + len(row.tokens), logit + count
        return outputs

    def length(self, seq: int) -> int:
        return self.context.length(seq)

    def rewind(self, seq: int, length: int) -> None:
        self.context.rewind(seq, length)

    def fork(self, source: int, destination: int, length: int | None = None) -> None:
        self.context.fork(source, destination, length)

    def close(self) -> None:
        self.context.close()
        self.model.close()
