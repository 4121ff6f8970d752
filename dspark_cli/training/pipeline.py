"""The stages of `dspark train`: generate -> features -> train -> evaluate -> export. Each goes on where it was stopped.

WORK/recipe.json        what was asked for; another recipe needs another folder
WORK/documents.jsonl    what the target wrote
WORK/features/          what the target thought of it (features.py); not with torch on an accelerator, which thinks again
WORK/checkpoint.pt      weights, optimisers, place in the schedule
WORK/curve.jsonl        held-out acceptance along the way
WORK/evaluation.json    accepted length by real decoding
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dspark_cli.backends.base import BadInput, DsparkError, NotReady
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.export import stored_metadata
from dspark_cli.backends.llamacpp.header import read_header
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.pairing import gguf_target
from dspark_cli.backends.torch.checkpoint import build, load_drafter
from dspark_cli.backends.torch.config import DrafterConfig
from dspark_cli.backends.torch.devices import is_out_of_memory
from dspark_cli.backends.torch.drafter import make_drafter
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.backends.torch.gguf_drafter import load_gguf_drafter, target_norm, target_tables
from dspark_cli.backends.torch.gguf_model import Columns, load_gguf_model, untranslated
from dspark_cli.registry.plan import size
from dspark_cli.training.confidence import fit_confidence
from dspark_cli.training.corpus import Corpus, TargetHead, covered, draft_vocabulary
from dspark_cli.training.device import device_name, quick_bfloat16, training_device
from dspark_cli.training.documents import Document, append_documents, read_documents, write_whole
from dspark_cli.training.evaluate import evaluate
from dspark_cli.training.export import Exported, write_companions, write_drafter
from dspark_cli.training.features import FeatureCache, LlamaCppReader, Reader, TorchReader, bytes_per_token
from dspark_cli.training.start import begin
from dspark_cli.training.trainer import Trainer, TrainOptions, acceptance
from dspark_cli.training.writing import BatchWriter, EngineWriter, Frame, WritingOptions, openings

BYTES_PER_TOKEN = 5  # of documents.jsonl
SAVE_DOCUMENTS = 16  # written to disk at once
CURVE_POINTS = 24  # of a run: how often held-out acceptance is looked at
EVALUATED = 12  # held-out dialogues that are decoded for real
ROWS = (32, 256)  # texts that torch writes at once on a CPU, at least and at most: enough for full matrix products
ROWS_ON_ACCELERATOR = 2048  # at most there, where memory allows
TOGETHER_AT_MOST = 64  # documents of one training pass on an accelerator
COPIES = 10  # of a block's logits, in float32, that the loss and its gradient keep at their peak


class Report(Protocol):
    """Who shows how it goes. Units: "tokens" or "seconds"."""

    def begin(self, stage: str, total: float, have: float, note: str) -> None: ...
    def advance(self, amount: float, note: str = "") -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, apart from how long it is allowed to take.

    tokens:   of text, all documents together
    vocabulary: of the drafter's head; 0 = the target's whole
    through:  who runs the target for texts and features: llamacpp, torch, or auto (texts by whichever is quick here,
              features by llama.cpp, which runs the very file that will be served)
    features: target layers; () = five, spread from early to the last that can be read
    anchors:  to train on, instead of `hours`; 0 = hours count
    """

    target: str
    kind: str = "dspark"
    layers: int = 1
    block: int = 5
    rank: int = 128
    vocabulary: int = 8192
    head_type: str = "vanilla"
    hours: float = 1.0
    tokens: int = 500_000
    through: str = "auto"
    features: tuple[int, ...] = ()
    prompts: str = ""
    seed: int = 0
    anchors: int = 0


@dataclass
class Clock:
    """What is left of `--max-hours`. Stages look at it between steps."""

    max_hours: float | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.max_hours is not None and time.monotonic() - self.began > self.max_hours * 3600


class OutOfTime(Exception):
    """`--max-hours` is over; what was done is kept."""


class Pipeline:
    """One training in one folder."""

    def __init__(self, target: Path, work: Path, recipe: Recipe, report: Report, *, clock: Clock | None = None) -> None:
        self.target, self.work, self.recipe, self.report = target, work, recipe, report
        self.clock = clock or Clock()
        work.mkdir(parents=True, exist_ok=True)
        self._keep_recipe()
        header = read_header(target)
        self.n_layer, self.width = int(header.of_model("block_count")), int(header.of_model("embedding_length"))
        self.n_vocab = gguf_target(header, target.name).n_vocab
        self.layers = recipe.features or spread_layers(self.n_layer)
        self.n_ctx = int(header.of_model("context_length", 4096))

    def _keep_recipe(self) -> None:
        path = self.work / "recipe.json"
        mine = json.loads(json.dumps(asdict(self.recipe))) | {"file": self.target.name}  # a name may stand for several
        if path.exists():
            unsaid = {"file": self.target.name}  # by earlier versions
            found = unsaid | json.loads(path.read_text())
            # Time and text may grow from run to run; the rest makes another drafter.
            changed = [k for k in mine if k not in ("hours", "anchors", "tokens") and found.get(k) != mine[k]]
            if changed:
                what = ", ".join(f"{k} {found.get(k)!r}, now {mine[k]!r}" for k in changed)
                raise DsparkError(f"{self.work} was begun with another recipe: {what}", hint="another --work folder")
        write_whole(path, json.dumps(mine, indent=1) + "\n")

    def run(self, out: Path, *, formats: Formats, command: str, start: Path | None = None) -> Exported:
        """All stages. Raises OutOfTime when the clock says so, DsparkError for what cannot be done."""
        self.generate()
        self.read()
        trainer, facts = self.train(start)
        path = write_drafter(trainer.model, out, self.target, formats)
        evaluation = self.evaluate(path)
        curve = [json.loads(line) for line in (self.work / "curve.jsonl").read_text().splitlines()]
        return write_companions(path, self.recipe.kind, facts | {"command": command}, evaluation, curve)

    # -- generate --------------------------------------------------------------------------------------------------

    @property
    def documents(self) -> Path:
        return self.work / "documents.jsonl"

    def _documents(self) -> list[Document]:
        return list(read_documents(self.documents)) if self.documents.exists() else []

    def generate(self) -> None:
        """Let the target write until there are `recipe.tokens` tokens."""
        have = self._documents()
        count = sum(len(d.ids) for d in have)
        if count >= self.recipe.tokens:
            return
        _drop_torn_line(self.documents)
        self.report.begin(
            "generate",
            self.recipe.tokens,
            count,
            f"about {size(BYTES_PER_TOKEN * self.recipe.tokens)} in {self.documents}",
        )
        with ExitStack() as stack:
            unsaved: list[Document] = []
            for document in self._writer(stack, seed=self.recipe.seed + len(have)):
                unsaved.append(document)
                count += len(document.ids)
                self.report.advance(len(document.ids))
                if len(unsaved) == SAVE_DOCUMENTS or count >= self.recipe.tokens:
                    append_documents(self.documents, unsaved)
                    unsaved = []
                    self._look_at_the_clock()
                if count >= self.recipe.tokens:
                    break
        self.report.end()

    def _writer(self, stack: ExitStack, seed: int) -> Iterator[Document]:
        options = WritingOptions(seed=seed)
        by_torch = self.recipe.through == "torch" or (self.recipe.through == "auto" and self._torch_is_quick())
        rows = 1 if by_torch else 32
        context = ContextOptions(ctx=min(options.longest, self.n_ctx), n_seq=rows)
        target = stack.enter_context(LlamaCppTarget(self.target, context))
        frame, first_words = Frame.of(target), self._first_words(target, seed)
        if not by_torch:
            return EngineWriter(target, frame, first_words, options).documents()
        device = training_device()
        dtype = torch.bfloat16 if quick_bfloat16(device) else torch.float32
        model = load_gguf_model(self.target, dtype=dtype, device=device)
        on_cuda = device.type == "cuda"
        rows = rows_for(self.recipe.tokens, options.longest, ROWS_ON_ACCELERATOR if on_cuda else ROWS[1])
        if on_cuda:
            rows = fitting(Columns.bytes_per_row(model, options.longest), rows)
        return BatchWriter(model, frame, first_words, options, rows).documents()

    def _first_words(self, target: LlamaCppTarget, seed: int) -> Iterator[list[int]]:
        if not self.recipe.prompts:
            return openings(target, seed)
        lines = [t.strip() for t in Path(self.recipe.prompts).read_text(encoding="utf-8").splitlines() if t.strip()]
        if not lines:
            raise DsparkError(f"{self.recipe.prompts} has no prompts: one a line is needed")
        return _whole_prompts([target.tokenizer.encode(line) for line in lines], seed)

    def _torch_is_quick(self) -> bool:
        return not untranslated(self.target) and quick_bfloat16(training_device())

    # -- features --------------------------------------------------------------------------------------------------

    def _cache(self) -> FeatureCache:
        return FeatureCache(self.work / "features", target=self.target.name, layers=self.layers, width=self.width)

    @property
    def live(self) -> bool:
        """Whether features are computed along the way: where torch reads on an accelerator."""
        return self.recipe.through == "torch" and training_device().type != "cpu"

    def read(self) -> None:
        """Compute the features of every document that has none yet."""
        if self.live:
            return
        cache, documents = self._cache(), self._documents()
        total = sum(len(d.ids) for d in documents)
        if cache.tokens >= total:
            return
        disk = size(total * bytes_per_token(len(self.layers), self.width))
        self.report.begin("features", total, cache.tokens, f"{disk} in {cache.folder}")

        def done(tokens: int) -> None:
            self.report.advance(tokens)
            self._look_at_the_clock()

        with ExitStack() as stack:
            cache.append(self._reader(stack), documents, done)
        self.report.end()

    def _reader(self, stack: ExitStack) -> Reader:
        if self.recipe.through == "torch":
            dtype = torch.bfloat16 if quick_bfloat16(training_device()) else torch.float32
            return TorchReader(load_gguf_model(self.target, dtype=dtype))
        longest = max(len(d.ids) for d in self._documents())
        return LlamaCppReader(
            stack.enter_context(LlamaCppTarget(self.target, ContextOptions(ctx=min(max(512, longest), self.n_ctx))))
        )

    # -- train -----------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint.pt"

    def train(self, start: Path | None = None) -> tuple[Trainer, dict[str, Any]]:
        """Train to the end of the schedule; returns the trainer and what the recipe file should say."""
        corpus, held_out = self._corpora()
        if not corpus.stretches or not held_out.stretches:
            raise DsparkError(
                f"{len(corpus.stretches)} documents to train on and {len(held_out.stretches)} held out: too few",
                hint="more --tokens",
            )
        trainer, coverage = self._trainer(corpus, start)
        note = f"{corpus.positions:,} anchors; {coverage:.1%} of them in the draft vocabulary"
        self.report.begin("train", trainer.schedule, trainer.spent, note)
        self._curve(trainer, held_out)
        looked, spent = trainer.done, trainer.spent
        try:
            for p in trainer.run(corpus, self.checkpoint):
                self.report.advance(trainer.spent - spent, f"loss {p.loss:.3f}, first token accepted {p.accept:.0%}")
                spent = trainer.spent
                if trainer.done - looked > 1 / CURVE_POINTS:
                    looked = trainer.done
                    self._curve(trainer, held_out)
                self._look_at_the_clock()
        except (KeyboardInterrupt, OutOfTime):
            trainer.save(self.checkpoint)
            raise
        self._curve(trainer, held_out)
        self.report.end()
        # The first held-out documents are for `evaluate`.
        fit = fit_confidence(trainer, held_out, held_out.stretches[EVALUATED:], self.recipe.seed)
        facts = self._facts(trainer, corpus.tokens + held_out.tokens, coverage)
        return trainer, facts | ({"confidence": asdict(fit)} if fit else {})

    def _corpora(self) -> tuple[Corpus, Corpus]:
        """What is trained on, and what is held out."""
        device = training_device()
        if not self.live:
            cache = self._cache()
            trained_on = Corpus.stored(cache, held_out=False, device=device)
            return trained_on, Corpus.stored(cache, held_out=True, device=device)
        documents, model = self._documents(), load_gguf_model(self.target, device=device)
        longest = max(len(d.ids) for d in documents)
        vocabulary = min(self.recipe.vocabulary or model.config.vocab_size, model.config.vocab_size)
        together = fitting(longest * self.recipe.block * vocabulary * 4 * COPIES, TOGETHER_AT_MOST)
        trained_on = Corpus.live(documents, model, self.layers, held_out=False, together=together)
        return trained_on, Corpus.live(documents, model, self.layers, held_out=True, together=together)

    def _trainer(self, corpus: Corpus, start: Path | None) -> tuple[Trainer, float]:
        tables, norm = target_tables(self.target), target_norm(self.target)
        ids, coverage = self._vocabulary(corpus, len(tables.embed_tokens), start)
        d2t = torch.from_numpy(ids)
        head = (tables.embed_tokens if tables.lm_head is None else tables.lm_head)[d2t]
        model = build(self._config(len(ids), len(tables.embed_tokens)))
        if model.d2t is not None:
            model.d2t.copy_(d2t)
        begin(model, corpus, (tables.embed_tokens, head, norm), self.recipe.seed)
        if start is not None:
            _take_over(model, start, self.target)
        model.to(training_device())
        options = TrainOptions(self.recipe.hours, self.recipe.anchors, seed=self.recipe.seed)
        if corpus.together > 1:  # an accelerator: many documents a pass, each position an anchor, and rows cost little
            options = replace(options, documents=corpus.together, anchors=512, short_share=0.1)
        softcap = read_header(self.target).of_model("final_logit_softcapping")
        trainer = Trainer(model, TargetHead(head.to(training_device()), softcap), options)
        if self.checkpoint.exists():
            trainer.resume(self.checkpoint)
        return trainer, coverage

    def _vocabulary(self, corpus: Corpus, n_vocab: int, start: Path | None) -> tuple[np.ndarray[Any, Any], float]:
        """The draft vocabulary, chosen once: a resumed run, and one that starts from a drafter, keep theirs."""
        path = self.work / "vocabulary.json"
        if path.exists():
            ids = np.asarray(json.loads(path.read_text())["ids"], dtype=np.int64)
        elif start is not None:
            model = _load(start, self.target)
            ids = np.arange(n_vocab) if model.d2t is None else model.d2t.numpy()
        elif not self.recipe.vocabulary or self.recipe.vocabulary >= n_vocab:
            ids = np.arange(n_vocab)
        else:
            always = [int(read_header(self.target).metadata.get("tokenizer.ggml.eos_token_id", 0))]
            ids = draft_vocabulary(corpus, self.recipe.vocabulary, n_vocab, always)
        write_whole(path, json.dumps({"ids": ids.tolist()}))
        return ids, covered(corpus, ids)  # of the texts there are now: more may have come

    def _config(self, draft_vocab: int, n_vocab: int) -> DrafterConfig:
        header, r = read_header(self.target), self.recipe
        heads = int(header.of_model("attention.head_count"))
        dspark = r.kind == "dspark"
        return DrafterConfig(
            kind=r.kind,
            family="qwen3",
            hidden_size=self.width,
            target_hidden_size=self.width,
            intermediate_size=int(header.of_model("feed_forward_length")),
            num_layers=1 if r.kind == "eagle3" else r.layers,
            num_heads=heads,
            num_kv_heads=heads,  # the target's few KV heads would let through only a part of the features
            head_dim=self.width // heads,
            vocab_size=n_vocab,
            draft_vocab_size=draft_vocab,
            block_size=r.block,
            target_layer_ids=self.layers,
            mask_token_id=_mask_token(self.target),
            num_target_layers=self.n_layer,
            rope_theta=float(header.of_model("rope.freq_base", 10000.0)),
            max_position_embeddings=int(header.of_model("context_length", 4096)),
            markov_rank=r.rank if dspark else 0,
            markov_head_type=r.head_type,
            confidence_head=dspark,
            confidence_head_with_markov=dspark and r.rank > 0,
        )

    def _curve(self, trainer: Trainer, held_out: Corpus) -> None:
        rates = acceptance(trainer, held_out)
        p = trainer.progress
        row = {
            "hours": round(p.seconds / 3600, 4),
            "positions": p.positions,
            "loss": round(p.loss, 4),
            "acceptance": [round(x, 4) for x in rates],
            "expected_tau": round(1 + float(np.cumprod(rates).sum()), 4),
        }
        _drop_torn_line(self.work / "curve.jsonl")
        with (self.work / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _facts(self, trainer: Trainer, tokens: int, coverage: float) -> dict[str, Any]:
        config = trainer.model.config
        return {
            "target": self.target.name,
            "recipe": asdict(self.recipe),
            "shape": {
                "kind": config.kind,
                "layers": config.num_layers,
                "block": config.block_size,
                "rank": config.markov_rank,
                "vocabulary": config.draft_vocab_size,
                "target_layers": list(config.target_layer_ids),
            },
            "tokens": tokens,
            "coverage": round(coverage, 4),
            "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "train_hours": round(trainer.progress.seconds / 3600, 3),
            "positions": trainer.progress.positions,
            "steps": trainer.progress.steps,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": device_name(),
        }

    # -- evaluate --------------------------------------------------------------------------------------------------

    def evaluate(self, drafter: Path) -> dict[str, Any]:
        """Decode held-out prompts with the exported drafter and the very target; kept in WORK/evaluation.json."""
        model = _load(drafter, self.target)
        held_out = [d for d in self._documents() if d.held_out][:EVALUATED]
        with LlamaCppTarget(self.target, ContextOptions(ctx=min(1024, self.n_ctx))) as target:
            groups = {"self-written": [d.ids[: d.answer_start] for d in held_out]} | own_prompts(target)
            total = 2 * sum(map(len, groups.values()))
            self.report.begin("evaluate", total, 0, "held-out prompts, whole blocks verified")
            with make_drafter(model, name=drafter.name, n_vocab=target.info.n_vocab) as torch_drafter:
                found = evaluate(target, torch_drafter, groups, progress=lambda: self.report.advance(1))
        (self.work / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
        self.report.end()
        return found

    def _look_at_the_clock(self) -> None:
        if self.clock.over:
            raise OutOfTime


def spread_layers(n_layer: int, count: int = 5) -> tuple[int, ...]:
    """`count` layers from the second to the last that libllama can hand out (its inputs: the last layer's output is not)."""
    last = n_layer - 2
    return tuple(sorted({round(1 + i * (last - 1) / (count - 1)) for i in range(count)})) if last > 1 else (last,)


def own_prompts(target: LlamaCppTarget) -> dict[str, list[list[int]]]:
    """The built-in prompts of four kinds, through the target's template; none of them is ever trained on."""
    from dspark_cli.bench.prompts import KINDS

    encode, render = target.tokenizer.encode, target.render_chat
    return {
        kind: [encode(render([{"role": "user", "content": p.text}]), special=True, bos=True) for p in KINDS[kind]]
        for kind in ("question", "arithmetic", "code", "story")
    }


def _whole_prompts(prompts: Sequence[list[int]], seed: int) -> Iterator[list[int]]:
    """Prompts in random order, for ever."""
    generator = np.random.default_rng(seed)
    while True:
        for i in generator.permutation(len(prompts)):
            yield list(prompts[int(i)])


def _mask_token(target: Path) -> int:
    """A token that texts do not hold: a reserved one, else the padding token, else the last one."""
    import gguf

    metadata = {key: value.content for key, value in stored_metadata(target).items()}
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    ends = {metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "bos", "padding", "unknown")}
    special = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL and i not in ends]
    return special[-1] if special else int(metadata.get("tokenizer.ggml.padding_token_id", len(tokens) - 1))


def _load(path: Path, target: Path) -> DSpark | Eagle3:
    if path.is_dir():
        return load_drafter(path, tables=target_tables(target))
    return load_gguf_drafter(path, target)


def _take_over(model: DSpark | Eagle3, start: Path, target: Path) -> None:
    """Weights of an earlier drafter of the same shape. Raises DsparkError with the first difference."""
    old = _load(start, target)
    for field_name in (
        "kind",
        "num_layers",
        "block_size",
        "markov_rank",
        "markov_head_type",
        "confidence_head",
        "intermediate_size",
        "draft_vocab_size",
        "target_layer_ids",
        "num_kv_heads",
    ):
        mine, theirs = getattr(model.config, field_name), getattr(old.config, field_name)
        if mine != theirs:
            raise DsparkError(f"--from {start.name}: its {field_name} is {theirs}, asked for is {mine}")
    if model.d2t is not None and old.d2t is not None and not torch.equal(model.d2t, old.d2t):
        raise DsparkError(
            f"--from {start.name}: it drafts other tokens than this training", hint="another --work folder"
        )
    model.load_state_dict(old.state_dict())


def _drop_torn_line(path: Path) -> None:
    """A killed run may leave half a line behind."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


@contextmanager
def kept(work: Path) -> Iterator[None]:
    """Memory or disk that runs out in a stage, in one sentence: what the stages wrote is there for the next run."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DsparkError(
            f"{where}{error.strerror or error}; {work} is kept", hint="make room and run it again: it goes on"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines() or ["out of memory"]
        raise NotReady(
            f"training needs more memory than there is ({said[0]}); {work} is kept",
            hint="a smaller --vocab or --block with another --work folder and --documents of this one",
        ) from None


def rows_for(tokens: int, longest: int, most: int) -> int:
    """Texts to write at once for `tokens` in all: each row writes several, for what is finished first is short."""
    return min(most, max(ROWS[0], tokens // (4 * longest)))


def fitting(each: int, most: int) -> int:
    """How many pieces of `each` bytes a third of the accelerator's free memory holds: 1 to `most`."""
    if not torch.cuda.is_available():
        return min(8, most)
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(most, free // 3 // max(1, each)))


def import_documents(files: Iterable[Path], into: Path, n_vocab: int) -> int:
    """Copy documents of other files (same target, same tokenizer) to `into`, all or none; returns how many."""
    found: list[Document] = []
    for path in files:
        if not path.is_file():
            raise BadInput(f"{path} is no file")
        for number, document in enumerate(read_documents(path), start=1):
            if not all(isinstance(i, int) and 0 <= i < n_vocab for i in document.ids):
                raise BadInput(f"{path}, line {number}: ids that are none of the target's {n_vocab} tokens")
            if not 0 < document.answer_start <= len(document.ids):
                raise BadInput(
                    f"{path}, line {number}: answer_start {document.answer_start} of {len(document.ids)} ids"
                )
            found.append(document)
    part = into.with_name(into.name + ".part")
    part.unlink(missing_ok=True)
    append_documents(part, found)
    part.replace(into)
    return len(found)
