"""A loaded pair, ready to answer: what the commands open."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

from dspark_cli.backends.base import BadInput, Drafter, DraftRequest, PairMismatch, Row, Target
from dspark_cli.backends.combined import CombinedDrafter
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.model import DRAFTER_ARCHITECTURE, Model, tokens_agree
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.lookup import LookupDrafter
from dspark_cli.backends.standalone import StandaloneDrafter
from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.beliefs import load_beliefs
from dspark_cli.engine.costs import CostModel
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.opening import drafter_beside_torch, open_target
from dspark_cli.engine.profile import Place, costs_of
from dspark_cli.engine.rounds import Request, Round, SamplingOptions
from dspark_cli.engine.runners import open_block_drafter
from dspark_cli.engine.schedule import Off, Schedule, parse_policy
from dspark_cli.engine.stats import ids_sha256
from dspark_cli.engine.widths import COMPARED, DEPTHS, widths_apart
from dspark_cli.engine.words import DEFAULT_POLICY, DRAFTER_WORDS

#: Two logits closer than this may swap between a pass of one row and a pass of many (other kernels, other rounding).
#: Measured on the embedded model in all formats, CPU: tests/test_greedy_identity.py.
NEAR_TIE = 0.2


@dataclass(frozen=True)
class OpenOptions:
    """What to load and how.

    model:        a GGUF file (llama.cpp) or a checkpoint folder (torch)
    drafter:      auto | dspark | dflash | eagle3 | small | lookup | none | PATH of a GGUF or a checkpoint folder
    drafter_path: the model drafter that belongs to the target, where one is known
    policy:       see `schedule.parse_policy`; None takes the default
    ctx:          positions per sequence; None = what the model was trained on, at most 4096
    device:       where a checkpoint folder goes: auto, or a kind with or without a number (cuda:1); GGUF: see gpu_layers
    drafter_backend: who runs a block drafter beside a GGUF: auto, llamacpp or torch (runners.py)
    spare:        bytes of memory that the plan leaves, where there is one: torch drafts only if it fits there
    notice:       is told, in one line, what the user may want to know
    progress:     is told how far loading is (stage, share done from 0 to 1); may raise to end it
    """

    model: Path
    name: str
    drafter: str = "auto"
    drafter_path: Path | None = None
    policy: str | None = None
    ctx: int | None = None
    n_seq: int = 1
    threads: int | None = None
    gpu_layers: int | None = None
    kv_type: str = "f16"
    flash_attn: str = "auto"
    device: str = "auto"
    drafter_backend: str = "auto"
    spare: int | None = None
    notice: Callable[[str], None] = lambda text: None
    progress: Callable[[str, float], None] | None = None

    @property
    def drafter_file(self) -> Path | None:
        """The file of the model drafter, if one is named or known."""
        return self.drafter_path if self.drafter in DRAFTER_WORDS else Path(self.drafter)

    def told(self, stage: str) -> Callable[[float], None] | None:
        """`progress` for one stage."""
        return None if self.progress is None else partial(self.progress, stage)

    def context(self) -> ContextOptions:
        return ContextOptions(
            ctx=self.ctx,
            n_seq=self.n_seq,
            threads=self.threads,
            gpu_layers=-1 if self.gpu_layers is None else self.gpu_layers,
            kv_type=self.kv_type,
            flash_attn=self.flash_attn,
        )


@dataclass(frozen=True)
class CheckReport:
    """Speculative against plain decoding of one request.

    first_difference: index of the first token that differs; None when identical
    margin:           first minus second logit of the plain pass at that index: a near-tie if it is small
    """

    identical: bool
    tokens: int
    first_difference: int | None
    margin: float | None
    ids_sha256: str
    plain_sha256: str


class Session:
    """Target, drafter and schedule with one engine. A context manager: leaving it frees everything native."""

    def __init__(self, target: Target, drafter: Drafter | None, schedule: Schedule) -> None:
        self.target = target
        self.drafter = drafter
        self.schedule = schedule
        self.profile: Place | None = None
        self._engine = Engine(target, drafter, schedule)

    @property
    def costs(self) -> CostModel:
        """What passes cost here, as of now; a guess unless the policy is `auto`."""
        return self.schedule.costs if isinstance(self.schedule, AutoSchedule) else CostModel.unmeasured()

    @property
    def policy(self) -> str:
        return self.schedule.name

    @classmethod
    def open(cls, options: OpenOptions, *, measure_anew: bool = False) -> Self:
        """Load the pair. `measure_anew`: do not use the cost profile of earlier sessions.

        Raises DsparkError for files that cannot be loaded, PairMismatch for a wrong drafter.
        """
        schedule = parse_policy(options.policy or DEFAULT_POLICY)
        if options.drafter == "none":
            schedule = _no_drafter(options)
        with ExitStack() as stack:
            target = stack.enter_context(open_target(options))
            session = cls(target, _drafter_of(options, target, schedule, stack), schedule)
            if isinstance(schedule, AutoSchedule):
                session._prepare(schedule, options, measure_anew)
            stack.pop_all()
            gc.freeze()  # looking through all that was imported takes 0.1-0.2 s with torch, in the middle of an answer
            return session

    def switch(self, options: OpenOptions) -> None:
        """Another drafter or policy beside the loaded target; call it between answers. Raises with everything as it was.

        The next answer computes its whole prompt again, as the new drafter has not seen it.
        """
        schedule = parse_policy(options.policy or DEFAULT_POLICY)
        if options.drafter == "none":
            schedule = _no_drafter(options)
        self._engine.forget()  # measuring empties the caches
        with ExitStack() as stack:
            new = Session(self.target, _drafter_of(options, self.target, schedule, stack), schedule)
            if isinstance(schedule, AutoSchedule):
                new._prepare(schedule, options, False)
            stack.pop_all()
        self._end_drafting()
        new._engine.on_prefill = self._engine.on_prefill
        self.drafter, self.schedule, self.profile, self._engine = new.drafter, schedule, new.profile, new._engine

    def _prepare(self, schedule: AutoSchedule, options: OpenOptions, measure_anew: bool) -> None:
        """Give the schedule what is known of this pair on this machine, measuring it if need be."""
        file = options.drafter_file if self.drafter is not None and self.drafter.has_pass else None
        self.profile = Place.of(self.target, self.drafter, file)
        if measure_anew:
            self.profile.forget()
        told = options.told("measuring what passes cost here (once)")
        schedule.costs = costs_of(self.target, self.drafter, self.profile, options.notice, told)
        if self.drafter is not None and self.drafter.has_pass:
            _warm_up(self.target, self.drafter)
        schedule.beliefs = load_beliefs(file, options.notice)
        schedule.label = self.target.info.format
        schedule.cap = self.target.max_rows

    def chat_request(
        self,
        messages: list[dict[str, str]],
        *,
        max_tokens: int | None,
        sampling: SamplingOptions,
        stop: tuple[str, ...] = (),
        thinking: bool | None = None,
    ) -> Request:
        """A request that answers the last of `messages` (`role`, `content`) through the model's chat template."""
        text = self.target.render_chat(messages, thinking=thinking)
        return self.prompt_request(text, chat=True, max_tokens=max_tokens, sampling=sampling, stop=stop)

    def text_request(
        self, text: str, *, max_tokens: int | None, sampling: SamplingOptions, stop: tuple[str, ...] = ()
    ) -> Request:
        """A request that continues `text` as it is, without a template."""
        return self.prompt_request(text, chat=False, max_tokens=max_tokens, sampling=sampling, stop=stop)

    def prompt_request(
        self, text: str, *, chat: bool, max_tokens: int | None, sampling: SamplingOptions, stop: tuple[str, ...] = ()
    ) -> Request:
        """A request for a prompt's text; `chat`: a template made it, so its markers are control tokens."""
        tokenizer = self.target.tokenizer
        ids = tokenizer.encode(text, special=chat, bos=True)
        return Request(ids, max_tokens, sampling, tokenizer.eog_ids, stop)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / longest_token tokens."""
        tokenizer = self.target.tokenizer
        # 32: control tokens have no bytes of their own, but are written out in a template's text.
        return max(32, *(len(tokenizer.token_bytes(token)) for token in range(tokenizer.n_vocab)))

    def on_prefill(self, told: Callable[[int, int], None]) -> None:
        """Before each pass over a prompt, `told` hears the tokens computed and those of the prompt; it may raise to stop."""
        self._engine.on_prefill = told

    def run(self, request: Request, *, plain: bool = False, margins: bool = False) -> Iterator[Round]:
        """Decode one request; `plain` without drafting. What the cache already has of the prompt is not computed again."""
        return self.run_all([request], plain=plain, margins=margins)

    def run_all(
        self, requests: Iterable[Request], *, plain: bool = False, margins: bool = False, isolate: bool = False
    ) -> Iterator[Round]:
        """Decode many requests, as many at once as the session has sequences; `isolate`: see Engine.run."""
        engine = self._engine
        engine.schedule = Off() if plain else self.schedule
        engine.margins = margins
        return engine.run(requests, isolate=isolate)

    def widths_apart(self, widths: Sequence[int]) -> dict[int, dict[int, float]]:
        """By depth of the context, as far as it reaches, what `widths.widths_apart` says.

        The next answer computes its whole prompt again.
        """
        self._engine.forget()
        depths = [depth for depth in DEPTHS if depth + COMPARED <= self.target.info.n_ctx]
        return {depth: widths_apart(self.target, widths, depth) for depth in depths}

    def check(self, request: Request) -> CheckReport:
        """Decode `request` twice, with and without drafting, and compare token by token."""
        speculative = [token for item in self.run(request) for token in item.tokens]
        plain_rounds = list(self.run(request, plain=True, margins=True))
        plain = [token for item in plain_rounds for token in item.tokens]
        margins = [margin for item in plain_rounds for margin in item.margins or ()]
        first = first_difference(speculative, plain)
        return CheckReport(
            identical=first is None,
            tokens=len(plain),
            first_difference=first,
            margin=margins[first] if first is not None and first < len(margins) else None,
            ids_sha256=ids_sha256(speculative),
            plain_sha256=ids_sha256(plain),
        )

    def close(self) -> None:
        self._end_drafting()
        self.target.close()
        gc.unfreeze()

    def _end_drafting(self) -> None:
        if self.profile is not None and isinstance(self.schedule, AutoSchedule) and self.schedule.costs.disagrees:
            self.profile.forget()  # rounds refuted it: measured again next time
        if self.drafter is not None:
            self.drafter.close()  # it borrows from the target: it goes first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def first_difference(first: list[int], second: list[int]) -> int | None:
    """Index of the first token that differs; None for equal lists."""
    if first == second:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _warm_up(target: Target, drafter: Drafter) -> None:
    """A pass of each: the first ones read weights and allocate, and would be the dearest of the first answer."""
    token = target.tokenizer.bos_id or 0
    drafter.observe(0, [token], target.step([Row(0, [token])])[0].features)
    drafter.propose([DraftRequest(0, token, drafter.pass_block)])
    for keeper in (target, drafter):
        keeper.drop(0)


def _no_drafter(options: OpenOptions) -> Schedule:
    if options.policy not in (None, "off"):
        raise BadInput(f"--policy {options.policy} needs a drafter, and --drafter none asks for no drafter")
    return Off()


def _drafter_of(options: OpenOptions, target: Target, schedule: Schedule, stack: ExitStack) -> Drafter | None:
    """The drafter that goes with `schedule`, checked against the target; `stack` closes it."""
    drafter = None if isinstance(schedule, Off) else open_drafter(options, target)
    if drafter is None:
        return None
    if drafter.has_pass:
        drafter = CombinedDrafter(drafter, LookupDrafter() if options.drafter == "auto" else None)
    stack.enter_context(drafter)
    # Check now what the drafter wants to read, not at the first answer.
    target.request_features(drafter.feature_layers)
    return drafter


def open_drafter(options: OpenOptions, target: Target) -> Drafter | None:
    """The drafter that `options.drafter` asks for. `auto`: the target's own model drafter if there is one, else lookup."""
    word = options.drafter
    if word == "lookup" or (word == "auto" and options.drafter_path is None):
        return LookupDrafter()
    if word in DRAFTER_WORDS and options.drafter_path is None:
        raise BadInput(
            f"no {word} drafter is known for {options.name}", hint="--drafter lookup, or --drafter PATH.gguf"
        )
    path = options.drafter_path if word in DRAFTER_WORDS else Path(word)
    assert path is not None
    drafter = _open_model_drafter(path, options, target)
    if word in ("dspark", "dflash", "eagle3", "small") and drafter.kind != word:
        drafter.close()
        raise BadInput(f"{path.name} is a {drafter.kind} drafter, not {word}", hint=f"--drafter {drafter.kind}")
    return drafter


def _open_model_drafter(path: Path, options: OpenOptions, target: Target) -> Drafter:
    if not isinstance(target, LlamaCppTarget):
        return drafter_beside_torch(path, options, target)
    open_block = partial(
        open_block_drafter, path, target, options.context(), options.drafter_backend, options.notice, options.spare
    )
    if path.is_dir():
        return open_block()
    probe = Model(path, vocab_only=True)
    try:
        if probe.architecture == DRAFTER_ARCHITECTURE:
            return open_block()
        agree, difference = tokens_agree(target.model, probe)
    finally:
        probe.close()
    if not agree:
        raise PairMismatch(
            f"{path.name} cannot draft for {options.name}: {difference}",
            hint="--drafter lookup, or a small model of the same family",
        )
    # One position more than the target: the drafter continues past the anchor.
    small = LlamaCppTarget(path, options.context().drafting())
    return StandaloneDrafter(small, n_vocab=target.info.n_vocab)
