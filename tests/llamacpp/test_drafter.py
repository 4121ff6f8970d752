"""DSpark and DFlash drafters in libllama, against drafters whose answers are known or computed in numpy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drafters import BARE, LATER, NEAR_TIE, OPTIONS, OTHER, REDUCED, TEXT, features_of, opened, propose, same

import synthetic
from dspark_cli.backends.base import Draft, DraftRequest, FloatArray, IntArray, PairMismatch
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.drafter import LlamaCppDrafter
from dspark_cli.backends.llamacpp.export import DrafterSpec
from dspark_cli.backends.llamacpp.passes import KernelPass, LibllamaPass
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.engine.decode import Engine
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.schedule import Fixed, Off, Schedule
from synthetic import HIDDEN, SPEC
from tests_support import whole_row

pytestmark = pytest.mark.usefixtures("computed_by")

PASSES = {"libllama": LibllamaPass, "kernels": KernelPass}
#: how close confidences and logits are to those computed in F32: our kernels keep keys and values in F16
CLOSE = {"libllama": (1e-4, 1e-3), "kernels": (5e-4, 1e-2)}


def test_who_computes(target: LlamaCppTarget, known: Path, random: Path, reduced: Path, computed_by: str) -> None:
    for path in (known, random, reduced):
        with opened(path, target) as drafter:
            assert isinstance(drafter.passes, PASSES[computed_by])


# -- what is proposed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [0, 1000, 48999])
def test_known_sequence(target: LlamaCppTarget, known: Path, ids: list[int], features: FloatArray, anchor: int) -> None:
    with opened(known, target) as drafter:
        drafter.observe(0, ids, features)
        assert (drafter.kind, drafter.block_size, drafter.feature_layers) == ("dspark", 5, SPEC.target_layers)
        for block in (1, 3, 5, 9):
            assert propose(drafter, anchor, block).tokens.tolist() == synthetic.walk(anchor, min(block, 5))
        assert len(propose(drafter, anchor, 0)) == 0


def test_known_confidence(target: LlamaCppTarget, known: Path) -> None:
    """Hidden states are 0 there, so the head reads W1[previous] and its bias alone."""
    tensors = synthetic.known_tensors()
    weight = tensors["confidence_head.proj.weight"][0, HIDDEN:].astype(np.float64)
    with opened(known, target) as drafter:
        draft = propose(drafter, 321)
    previous = [321, *draft.tokens[:-1]]
    logits = tensors["markov_head.markov_w1.weight"][previous] @ weight + 0.3
    np.testing.assert_allclose(draft.confidence, 1 / (1 + np.exp(-logits)), atol=1e-4)


@pytest.mark.parametrize("length", [1, 20])
def test_base_logits_and_confidence_equal_the_reference(
    target: LlamaCppTarget, reduced: Path, ids: list[int], features: FloatArray, length: int, computed_by: str
) -> None:
    """The whole drafter in numpy: features, injection, positions, RoPE, block attention, reduced head, Markov chain."""
    tensors = synthetic.random_tensors(REDUCED)
    features = features[:length]
    base = synthetic.reference_base(tensors, REDUCED, features.astype(np.float64), 1000, 5)
    hidden = synthetic.reference_hidden(tensors, REDUCED, features.astype(np.float64), 1000, 5)
    with opened(reduced, target) as drafter:
        drafter.observe(0, ids[:length], features)
        draft = propose(drafter, 1000)
    previous, weight = 1000, tensors["confidence_head.proj.weight"][0]
    for k in range(5):
        row = base[k] + synthetic.reference_bias(tensors, previous)
        assert draft.tokens[k] == row.argmax()
        embedding = tensors["markov_head.markov_w1.weight"][previous]
        confidence = 1 / (1 + np.exp(-(weight @ np.concatenate([hidden[k], embedding]) + 0.3)))
        assert draft.confidence is not None
        assert draft.confidence[k] == pytest.approx(confidence, abs=CLOSE[computed_by][0])
        previous = int(draft.tokens[k])


def chosen_chain(drafter: LlamaCppDrafter, anchor: int, rank: int) -> tuple[Draft, list[FloatArray]]:
    """A sampled draft that takes the token of `rank` (0 = best) at every position, and the rows it was shown."""
    rows: list[FloatArray] = []

    def choose(row: FloatArray, drafted: list[int], ids: IntArray | None) -> tuple[int, FloatArray]:
        assert len(drafted) == len(rows)
        row = whole_row(row, ids, drafter.model.n_vocab)
        rows.append(row)
        probs = np.zeros_like(row)
        token = int(np.argsort(-row, kind="stable")[rank])
        probs[token] = 1.0
        return token, probs

    return drafter.propose([DraftRequest(0, anchor, 5, choose)])[0], rows


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("spec", [SPEC, REDUCED], ids=["full", "reduced"])
def test_sampled_rows_follow_the_sampled_chain(
    target: LlamaCppTarget,
    random: Path,
    reduced: Path,
    ids: list[int],
    features: FloatArray,
    spec: DrafterSpec,
    rank: int,
    computed_by: str,
) -> None:
    """Rows come corrected along the greedy chain; `choose` must see base + W2 W1[what was chosen before]."""
    tensors = synthetic.random_tensors(spec)
    base = synthetic.reference_base(tensors, spec, features.astype(np.float64), 1000, 5)
    hidden = synthetic.reference_hidden(tensors, spec, features.astype(np.float64), 1000, 5)
    with opened(random if spec is SPEC else reduced, target) as drafter:
        drafter.observe(0, ids, features)
        draft, rows = chosen_chain(drafter, 1000, rank)
    # The borrowed head is Q8_0: libllama rounds the hidden state to 8 bits, which moves logits by up to 0.1.
    tolerance = 0.15 if spec is SPEC else CLOSE[computed_by][1]
    previous, weight = 1000, tensors["confidence_head.proj.weight"][0]
    assert draft.confidence is not None
    for k in range(5):
        expected = base[k] + synthetic.reference_bias(tensors, previous)
        assert np.array_equal(np.isfinite(rows[k]), np.isfinite(expected))
        finite = np.isfinite(expected)
        np.testing.assert_allclose(rows[k][finite], expected[finite], atol=tolerance)
        embedding = tensors["markov_head.markov_w1.weight"][previous]
        logit = weight @ np.concatenate([hidden[k], embedding]) + 0.3
        assert draft.confidence[k] == pytest.approx(1 / (1 + np.exp(-logit)), abs=CLOSE[computed_by][0])
        previous = int(draft.tokens[k])
    assert draft.probs is not None
    assert draft.probs.argmax(axis=1).tolist() == draft.tokens.tolist()


def test_several_sequences_take_in_features_in_one_pass_as_one_by_one(
    target: LlamaCppTarget, random: Path, ids: list[int], features: FloatArray
) -> None:
    lengths = [3, len(ids), 9]
    requests = [DraftRequest(seq, 1000, 5) for seq in range(3)]
    drafts = []
    with LlamaCppDrafter(random, target, ContextOptions(ctx=256, n_seq=3, threads=1)) as drafter:
        for together in (False, True):
            committed = [(seq, ids[:n], features[:n]) for seq, n in enumerate(lengths)]
            if together:
                drafter.observe_all(committed)
            else:
                for part in committed:
                    drafter.observe(*part)
            assert [drafter.length(seq) for seq in range(3)] == lengths
            drafts.append(drafter.propose(requests))
            for seq in range(3):
                drafter.drop(seq)
        drafter.observe_all([])
    for one, other in zip(*drafts, strict=True):
        same(one, other)
    assert len({tuple(d.tokens.tolist()) for d in drafts[0]}) > 1, "the sequences would be told apart"


def test_reduced_vocabulary_gives_target_ids(target: LlamaCppTarget, folder: Path) -> None:
    spec = replace(REDUCED, draft_vocab=512)
    ids = synthetic.random_tensors(spec)["d2t"]

    def successor(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return ids[(np.asarray(tokens) * 7 + 3) % len(ids)]

    path = synthetic.write(folder, synthetic.known_tensors(spec, successor), spec, quant="Q8_0", name="known-d2t.gguf")
    with opened(path, target) as drafter:
        draft = propose(drafter, 40000)
    assert draft.tokens.tolist() == synthetic.walk(40000, 5, successor)
    assert draft.tokens.max() > 512  # absolute ids, not rows of the reduced head


def test_without_confidence_head(target: LlamaCppTarget, folder: Path, ids: list[int], features: FloatArray) -> None:
    """Then it is the probability the drafter gives its best token."""
    tensors = synthetic.random_tensors(BARE)
    base = synthetic.reference_base(tensors, BARE, features.astype(np.float64), 7, 5)
    with opened(synthetic.write(folder, tensors, BARE, name="bare.gguf"), target) as drafter:
        drafter.observe(0, ids, features)
        draft = propose(drafter, 7)
    assert draft.confidence is not None
    previous = 7
    for k in range(5):
        row = base[k] + synthetic.reference_bias(tensors, previous)
        probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert draft.confidence[k] == pytest.approx(probs[draft.tokens[k]], rel=0.1)  # Q8_0 head, see above
        previous = int(draft.tokens[k])


def test_bonus_anchor_is_skipped(target: LlamaCppTarget, folder: Path, features: FloatArray, ids: list[int]) -> None:
    """sample_from_anchor false: row 0 is the anchor's, the drafts are the rows after it."""
    spec = replace(LATER, draft_vocab=REDUCED.draft_vocab)
    tensors = synthetic.random_tensors(spec)
    base = synthetic.reference_base(tensors, spec, features.astype(np.float64), 1000, 6)
    with opened(synthetic.write(folder, tensors, spec, name="later.gguf"), target) as drafter:
        assert drafter.block_size == 5
        assert drafter.model.meta("dflash.block_size") == "6"  # llama.cpp counts the anchor's row
        drafter.observe(0, ids, features)
        draft = propose(drafter, 1000)
    previous = 1000
    for k in range(5):
        assert draft.tokens[k] == (base[k + 1] + synthetic.reference_bias(tensors, previous)).argmax()
        previous = int(draft.tokens[k])


@pytest.mark.parametrize("from_anchor", [True, False])
def test_dflash(
    target: LlamaCppTarget, folder: Path, features: FloatArray, ids: list[int], from_anchor: bool, computed_by: str
) -> None:
    """No Markov head: each row on its own."""
    spec = synthetic.dflash(REDUCED, from_anchor=from_anchor)
    tensors = synthetic.random_tensors(spec)
    base = synthetic.reference_base(tensors, spec, features.astype(np.float64), 1000, 6)
    with opened(synthetic.write(folder, tensors, spec, name=f"dflash-{from_anchor}.gguf"), target) as drafter:
        assert drafter.kind == "dflash"
        assert isinstance(drafter.passes, PASSES[computed_by])
        drafter.observe(0, ids, features)
        draft = propose(drafter, 1000)
    first = 0 if from_anchor else 1
    if from_anchor:  # a block of 5 rows: the mask rows see one row less
        base = synthetic.reference_base(tensors, spec, features.astype(np.float64), 1000, 5)
    assert draft.tokens.tolist() == base[first : first + 5].argmax(axis=1).tolist()


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_formats_load_and_draft(target: LlamaCppTarget, folder: Path, quant: str, computed_by: str) -> None:
    path = synthetic.write(folder, synthetic.known_tensors(), quant=quant, name=f"known-{quant}.gguf")
    with opened(path, target) as drafter:
        assert drafter.model.format == quant
        assert isinstance(drafter.passes, LibllamaPass if quant == "BF16" else PASSES[computed_by])
        assert propose(drafter, 5).tokens.tolist() == synthetic.walk(5, 5)


# -- state -------------------------------------------------------------------------------------------------------------


def test_sequences_together_equal_each_alone(
    target: LlamaCppTarget, random: Path, ids: list[int], features: FloatArray
) -> None:
    other = target.tokenizer.encode(OTHER)
    contexts = [(ids, features), (other, features_of(target, other)), (ids[:3], features[:3])]
    anchors = [11, 2000, 300]
    with opened(random, target) as drafter:
        alone = []
        for (tokens, feats), anchor in zip(contexts, anchors, strict=True):
            drafter.observe(0, tokens, feats)
            alone.append(propose(drafter, anchor))
            drafter.drop(0)
        for seq, (tokens, feats) in enumerate(contexts):
            drafter.observe(seq, tokens, feats)
        for order in ([0, 1, 2], [2, 0, 1], [1]):
            together = drafter.propose([DraftRequest(seq, anchors[seq], 5) for seq in order])
            for seq, draft in zip(order, together, strict=True):
                same(draft, alone[seq])
        uneven = drafter.propose([DraftRequest(0, 11, 2), DraftRequest(1, 2000, 5), DraftRequest(2, 300, 0)])
        assert [len(d) for d in uneven] == [2, 5, 0]
    assert alone[0].tokens.tolist() != alone[1].tokens.tolist()


def test_more_sequences_than_one_pass_takes(known: Path) -> None:
    """14 blocks of 5 fit neither a ubatch of 32 tokens nor our kernels' 64, and a block may not be cut in two."""
    options = ContextOptions(ctx=64, n_seq=14, ubatch=32)
    with LlamaCppTarget(synthetic.target_path(), options) as target, opened(known, target, options) as drafter:
        drafts = drafter.propose([DraftRequest(seq, 100 + seq, 5) for seq in range(14)])
    assert [d.tokens.tolist() for d in drafts] == [synthetic.walk(100 + seq, 5) for seq in range(14)]


def test_rewind_equals_never_having_seen(
    target: LlamaCppTarget, random: Path, ids: list[int], features: FloatArray
) -> None:
    with opened(random, target) as drafter:
        drafter.observe(0, ids[:10], features[:10])
        fresh = propose(drafter, 42)
        drafter.observe(0, ids[10:], features[10:])
        full = propose(drafter, 42)
        drafter.rewind(0, 10)
        same(propose(drafter, 42), fresh)
        same(propose(drafter, 42), fresh)  # and a proposal leaves nothing behind
        drafter.observe(0, ids[10:], features[10:])
        same(propose(drafter, 42), full)
        drafter.drop(0)
        drafter.observe(0, ids[:10], features[:10])
        same(propose(drafter, 42), fresh)
    assert full.confidence is not None
    assert fresh.confidence is not None
    assert np.abs(full.confidence - fresh.confidence).max() > 0.01  # the context does matter to this drafter


def test_fork_shares_the_prefix(target: LlamaCppTarget, random: Path, ids: list[int], features: FloatArray) -> None:
    with opened(random, target) as drafter:
        drafter.observe(0, ids, features)
        full = propose(drafter, 42)
        drafter.fork(0, 1)
        drafter.fork(0, 2, 10)
        same(propose(drafter, 42, seq=1), full)
        drafter.drop(0)
        same(propose(drafter, 42, seq=1), full)
        short = propose(drafter, 42, seq=2)
        drafter.observe(0, ids[:10], features[:10])
        same(propose(drafter, 42), short)


def test_context_longer_than_a_ubatch(target: LlamaCppTarget, random: Path) -> None:
    tokens = target.tokenizer.encode((TEXT + "\n" + OTHER) * 30)[:1200]
    assert len(tokens) == 1200
    features = features_of(target, tokens)
    with opened(random, target) as drafter:
        drafter.observe(0, tokens, features)
        for begin in range(0, 1200, 100):
            drafter.observe(1, tokens[begin : begin + 100], features[begin : begin + 100])
        drafter.observe(2, tokens[:500], features[:500])
        at_once, bit_by_bit, cut = (propose(drafter, 42, seq=seq) for seq in range(3))
    same(at_once, bit_by_bit)
    assert cut.confidence is not None
    assert np.abs(cut.confidence - at_once.confidence).max() > 1e-3  # what lies beyond one ubatch counts


def test_no_features_is_an_error(target: LlamaCppTarget, known: Path) -> None:
    with opened(known, target) as drafter, pytest.raises(PairMismatch, match="no target features"):
        drafter.observe(0, [1, 2], None)


# -- with the engine ---------------------------------------------------------------------------------------------------

PROMPTS = (TEXT, OTHER, "Question: what is the capital of France?\nAnswer:", "1, 2, 3, 4, 5, 6,")


def decode(
    target: LlamaCppTarget, drafter: LlamaCppDrafter | None, schedule: Schedule, sampling: SamplingOptions
) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens and top-2 margins per prompt, three at a time, and how many drafts were accepted."""
    engine = Engine(target, drafter, schedule, margins=sampling.greedy)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    margins: list[list[float]] = [[] for _ in PROMPTS]
    requests = [Request(target.tokenizer.encode(text), 40, sampling, id=i) for i, text in enumerate(PROMPTS)]
    accepted = 0
    for item in engine.run(requests):
        tokens[item.request] += item.tokens
        margins[item.request] += item.margins or ()
        accepted += item.accepted
    for seq in range(OPTIONS.n_seq):
        target.drop(seq)
    return tokens, margins, accepted


def assert_equal_but_for_near_ties(plain: list[int], margins: list[float], speculative: list[int]) -> None:
    for i, (mine, theirs) in enumerate(zip(plain, speculative, strict=True)):
        if mine != theirs:
            assert margins[i] < NEAR_TIE, f"token {i} differs where the top-2 margin is {margins[i]:.3f}"
            return


@pytest.mark.parametrize("which", ["known", "random", "reduced"])
def test_greedy_output_is_that_of_plain_decoding(which: str, request: pytest.FixtureRequest) -> None:
    """With the attention that several sequences get: without flash, bits depend on where in the cache a token lies."""
    sampling, options = SamplingOptions(), replace(OPTIONS, kv_type="f16", flash_attn="auto")
    with LlamaCppTarget(synthetic.target_path(), options) as target:
        plain, margins, _ = decode(target, None, Off(), sampling)
        with opened(request.getfixturevalue(which), target, options) as drafter:
            speculative, _, _ = decode(target, drafter, Fixed(5), sampling)
    for i in range(len(PROMPTS)):
        assert_equal_but_for_near_ties(plain[i], margins[i], speculative[i])


def test_a_drafter_that_knows_the_answer_is_accepted(target: LlamaCppTarget, folder: Path) -> None:
    """Successors taken from the plain output: a token that always follows the same token is accepted."""
    prompt = target.tokenizer.encode(PROMPTS[3])
    plain = [t for r in Engine(target).run([Request(prompt, 40)]) for t in r.tokens]
    target.drop(0)
    follows = dict(zip(plain[-2::-1], plain[:0:-1], strict=True))  # the first place of a token wins

    def successor(tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.asarray([follows.get(int(t), 0) for t in tokens])

    path = synthetic.write(folder, synthetic.known_tensors(SPEC, successor), quant="F16", name="oracle.gguf")
    with opened(path, target) as drafter:
        rounds = list(Engine(target, drafter, Fixed(5)).run([Request(prompt, 40)]))
    target.drop(0)
    expected = sum(follows.get(a) == b for a, b in pairwise(plain))
    tokens = [t for r in rounds for t in r.tokens]
    assert tokens == plain
    # Bonus tokens are not drafted: of `expected` predictable tokens, at most one a round is the target's own.
    assert sum(r.accepted for r in rounds) >= expected - len(rounds)
    assert sum(r.accepted for r in rounds) > 5


@pytest.mark.parametrize("accept", ["exact", "residual"])
def test_sampled_decoding_runs(target: LlamaCppTarget, random: Path, accept: str) -> None:
    """(The law of the output is tests/test_exactness.py's business.) With a seed, `exact` gives the plain text."""
    sampling = SamplingOptions(temperature=0.8, top_k=50, seed=7, accept=accept)  # type: ignore[arg-type]
    plain, _, _ = decode(target, None, Off(), sampling)
    with opened(random, target) as drafter:
        speculative, _, _ = decode(target, drafter, Fixed(4), sampling)
    assert [len(t) for t in speculative] == [40] * len(PROMPTS)
    if accept == "exact":
        assert [t[:5] for t in speculative] == [t[:5] for t in plain]
    target.request_features(SPEC.target_layers)
