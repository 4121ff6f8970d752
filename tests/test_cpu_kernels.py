"""Products of the CPU: the same bits at every width, those of ggml's own dot products where sums are taken in their order,
and ggml's own products where these cannot be had.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_cli.backends.base import Row
from dspark_cli.backends.llamacpp import (
    model,
    native,  # noqa: F401  (loads libllama)
)
from dspark_cli.backends.llamacpp.attention import few_sequences
from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.header import Header, TensorInfo
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.bench.formats import requantize
from dspark_cli.kernels import cpu_kernels

pytestmark = pytest.mark.skipif(cpu_kernels.unfit() is not None, reason=f"no kernels here: {cpu_kernels.unfit()}")

#: ggml's numbers of the types, and of the columns they are multiplied with
TYPES = {word: number for number, word in cpu_kernels.TYPES.items()}
F32, Q8_0, Q8_1, Q8_K = 0, 8, 9, 15
COLUMNS = {
    "F32": F32,
    "F16": 1,
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), Q8_0),
    **dict.fromkeys(("Q4_1", "Q5_1"), Q8_1),
    **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), Q8_K),
}


#: summed in the order of ggml's dot product; the others block after block, which may round otherwise
SAME_ORDER = {"F32", "F16", "Q6_K"}


class Traits(ctypes.Structure):  # ggml-cpu.h
    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("dot", ctypes.c_void_p),
        ("column_type", ctypes.c_int),
        ("rows", ctypes.c_int64),
    )


class Params(ctypes.Structure):  # ggml-cpu-impl.h, the beginning
    _fields_ = (("thread", ctypes.c_int), ("threads", ctypes.c_int))


DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)
TO_COLUMN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def ggml() -> Any:
    library = ctypes.CDLL(str(cpu_kernels.library()))
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    for name in ("ggml_type_size", "ggml_row_size", "ggml_quantize_chunk"):
        getattr(library, name).restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    return library


def quantized(word: str, rows: np.ndarray) -> np.ndarray:
    """uint8 [n, bytes a row]: float32 rows as ggml keeps weights of that type."""
    library, number = ggml(), TYPES[word]
    n, k = rows.shape
    to = np.empty((n, library.ggml_row_size(number, ctypes.c_int64(k))), np.uint8)
    pointers = (ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(to.ctypes.data))
    sizes = (ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k))
    library.ggml_quantize_chunk(number, *pointers, *sizes, None)
    return to


def as_columns(word: str, rows: np.ndarray) -> np.ndarray:
    """uint8 [n, bytes a column]: float32 rows as ggml hands activations to the dot product of that type."""
    library, number = ggml(), COLUMNS[word]
    if number == F32:
        return rows.view(np.uint8)
    to = np.empty((len(rows), library.ggml_row_size(number, ctypes.c_int64(rows.shape[1]))), np.uint8)
    convert = TO_COLUMN(library.ggml_get_type_traits_cpu(number).contents.from_float)
    for source, made in zip(rows, to, strict=True):
        convert(source.ctypes.data, made.ctypes.data, rows.shape[1])
    return to


def by_dot(word: str, a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """float32 [n, m]: ggml's dot product of every row of `a` with every column of `b`."""
    dot = DOT(ggml().ggml_get_type_traits_cpu(TYPES[word]).contents.dot)
    c = np.empty((len(b), len(a)), np.float32)
    for j in range(len(b)):
        for i in range(len(a)):
            dot(k, c[j, i:].ctypes.data, 0, a[i].ctypes.data, 0, b[j].ctypes.data, 0, 1)
    return c


def product(
    word: str, a: np.ndarray, b: np.ndarray, k: int, *, threads: int, apart: int = 0, by: Any = None
) -> np.ndarray | None:
    """float32 [n, m] as our function computes it, thread after thread; None if it leaves it to ggml. apart: floats between
    the columns of the result, which must stay as they are; by: another build of our library.
    """
    library = ggml()
    m, n, type_ = len(a), len(b), TYPES[word]
    blocks = k // library.ggml_blck_size(type_)
    c = np.full((n, m + apart), 7.0, np.float32)
    long = ctypes.c_int64
    for thread in range(threads):
        done = (by or cpu_kernels._loaded).llamafile_sgemm(
            ctypes.byref(Params(thread, threads)),
            *(long(m), long(n), long(blocks)),
            *(ctypes.c_void_p(a.ctypes.data), long(a.strides[0] // library.ggml_type_size(type_))),
            *(ctypes.c_void_p(b.ctypes.data), long(b.strides[0] // library.ggml_type_size(COLUMNS[word]))),
            *(ctypes.c_void_p(c.ctypes.data), long(m + apart)),
            *(type_, COLUMNS[word], F32),
        )
        if not done & 0xFF:
            return None
    assert (c[:, m:] == 7.0).all()
    return c[:, :m]


def test_they_are_used_here() -> None:
    assert cpu_kernels.state().problem is None
    assert set(cpu_kernels.state().types) <= set(COLUMNS)
    assert len(cpu_kernels.state().types) > 0


def built(to: Path, *flags: str) -> Path:
    command = [*(cpu_kernels.compiler() or []), *cpu_kernels.FLAGS, *flags]
    sources = map(str, cpu_kernels.SOURCES)
    subprocess.run([*command, "-o", str(to), *sources, "-lm"], check=True, capture_output=True, timeout=120)
    return to


def test_the_way_of_processors_without_avx_512(tmp_path: Path) -> None:
    """Quantized formats say the same bits with and without it; ggml's floats do not, where ggml was built with it."""
    narrow = ctypes.CDLL(str(built(tmp_path / "narrow.so", "-mno-avx512f", "-mno-avxvnni")))
    narrow.dspark_kernels_start.restype = ctypes.c_uint64
    bits = narrow.dspark_kernels_start(ctypes.cast(ggml().ggml_get_type_traits_cpu, ctypes.c_void_p))
    taken = {word for word, number in TYPES.items() if bits >> number & 1}
    assert taken >= set(cpu_kernels.state().types) - {"F16", "F32"}
    rng = np.random.default_rng(1)
    for word in taken - {"F16", "F32"}:
        a = quantized(word, rng.normal(size=(13, 512)).astype(np.float32))
        b = as_columns(word, rng.normal(size=(9, 512)).astype(np.float32))
        both = [product(word, a, b, 512, threads=2, by=library) for library in (None, narrow)]
        assert np.array_equal(*both), word


def test_the_way_of_processors_with_avx_vnni_compiles(tmp_path: Path) -> None:
    """Where it cannot be run: clients of Intel since 2021 have it without AVX-512."""
    try:
        built(tmp_path / "vnni.so", "-march=alderlake")
    except subprocess.CalledProcessError as error:
        if b"alderlake" in error.stderr:
            pytest.skip("this compiler does not know such processors")
        raise


@pytest.mark.parametrize("word", list(COLUMNS))
def test_products(word: str) -> None:
    """Of real weights and activations those of ggml's dot product, bit by bit where sums are taken in its order; the same bits
    at any width, with more threads than rows, with rows and results further apart than they are long.
    """
    if word not in cpu_kernels.state().types:
        pytest.skip(f"ggml's dot product of {word} is another on this machine")
    rng = np.random.default_rng(TYPES[word])
    k = 512
    a = quantized(word, rng.normal(size=(37, k)).astype(np.float32))
    b = as_columns(word, rng.normal(size=(33, k)).astype(np.float32))
    theirs = by_dot(word, a, b, k)
    alone = np.concatenate([product(word, a, b[j : j + 1], k, threads=1) for j in range(len(b))])
    if word in SAME_ORDER:
        assert np.array_equal(alone, theirs)
    else:
        assert np.abs(alone - theirs).max() < 1e-6 * np.abs(theirs).max()
    for n in (*range(1, 20), 24, 32):
        assert np.array_equal(product(word, a, b[:n], k, threads=2), alone[:n]), n
    for threads in (1, 2, 5):  # eight rows and more, fewer
        assert np.array_equal(product(word, a[5:32], b[:5], k, threads=threads), alone[:5, 5:32]), threads
    assert np.array_equal(product(word, a[:2], b[:5], k, threads=7, apart=3), alone[:5, :2])
    assert np.array_equal(product(word, a[::3], b[:32:2], k, threads=3), alone[:32:2, ::3])


@pytest.mark.parametrize(
    ("tensors", "stay"),
    [
        ({"blk.0.attn_q.weight": "Q4_0"}, True),
        ({"blk.0.attn_q.weight": "Q4_K", "output.weight": "Q6_K"}, True),
        ({"blk.0.attn_q.weight": "Q8_0"}, False),
        ({"blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_up_exps.weight": "Q4_0"}, False),
        ({"blk.0.attn_q.weight": "Q4_0", "blk.0.ffn_up_exps.weight": "Q8_0"}, True),
    ],
)
def test_which_weights_stay_as_they_lie(
    tensors: dict[str, str], stay: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that ggml would interleave and we compute; experts are computed by ggml."""
    header = Header({}, {}, {name: TensorInfo((8, 256), TYPES[word], 0) for name, word in tensors.items()})
    monkeypatch.setattr(model, "read_header", lambda path: header)
    monkeypatch.setattr(cpu_kernels, "complete", lambda: True)
    assert model._laid_out_for_ours(tmp_path) is stay
    monkeypatch.setattr(cpu_kernels, "complete", lambda: False)
    assert not model._laid_out_for_ours(tmp_path)


def test_rows_of_halves_need_not_be_whole_steps() -> None:
    """Attention without flash multiplies F16 keys and values, as long as heads and contexts are."""
    rng = np.random.default_rng(3)
    for k in (1, 15, 65, 199, 576):
        rows, columns = (rng.normal(size=(n, k)).astype(np.float32) for n in (9, 5))
        a, b = quantized("F16", rows), as_columns("F16", columns)
        assert np.array_equal(product("F16", a, b, k, threads=2), by_dot("F16", a, b, k)), k


def test_what_is_left_to_ggml() -> None:
    """Wide products of floats, where ggml's own kernels are as quick, and rows longer than the scratch of a thread."""

    def covered(word: str, n: int, k: int) -> bool:
        asked = cpu_kernels._loaded.dspark_kernels_covers
        asked.restype = ctypes.c_bool
        return bool(asked(ctypes.c_int64(n), ctypes.c_int64(k), TYPES[word], COLUMNS[word], F32))

    for word, k, n in (("F16", 64, 33), ("F32", 64, 33), ("F32", 65, 2), ("F16", 100000, 2), ("Q4_K", 400, 2)):
        assert not covered(word, n, k), (word, k, n)
    assert covered("F16", 32, 64)
    assert covered("F32", 32, 64)


def test_a_dot_product_that_says_otherwise_is_not_taken(tmp_path: Path) -> None:
    """The comparison at the start can fail: by one bit where the order of sums is the same, else by a hundredth percent."""
    copy = shutil.copy(cpu_kernels._cached(), tmp_path / "copy.so")  # with its own state
    library, real = ctypes.CDLL(str(copy)), ggml()
    library.dspark_kernels_start.restype = ctypes.c_uint64

    def spoiled(word: str, spoil: Callable[[int], None]) -> Any:
        dot = DOT(real.ggml_get_type_traits_cpu(TYPES[word]).contents.dot)

        @DOT
        def nearly(n: int, to: int, bs: int, x: int, bx: int, y: int, by: int, rows: int) -> None:
            dot(n, to, bs, x, bx, y, by, rows)
            if n > 200:
                spoil(to)

        return nearly

    def one_bit(at: int) -> None:
        ctypes.c_uint32.from_address(at).value ^= 1

    def a_bit_more(at: int) -> None:
        ctypes.c_float.from_address(at).value *= 1.0001

    dots = {"Q6_K": spoiled("Q6_K", one_bit), "Q8_0": spoiled("Q8_0", a_bit_more)}
    known = {number: real.ggml_get_type_traits_cpu(number).contents for number in {*TYPES.values(), *COLUMNS.values()}}
    for word, dot in dots.items():
        known[TYPES[word]] = Traits(None, ctypes.cast(dot, ctypes.c_void_p), COLUMNS[word], 1)
    # Columns of another type than ours: ggml has changed what it multiplies with.
    known[TYPES["Q4_1"]] = Traits(None, known[TYPES["Q4_1"]].dot, COLUMNS["Q4_0"], 1)

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)
    def traits(number: int) -> int:
        return ctypes.addressof(known[number])

    bits = library.dspark_kernels_start(traits)
    taken = {word for word, number in TYPES.items() if bits >> number & 1}
    assert taken == set(cpu_kernels.state().types) - {"Q6_K", "Q8_0", "Q4_1"}


class Graph:
    """A ggml graph of float32 tensors, computed by two threads. Shapes as ggml has them: the row first."""

    def __init__(self) -> None:
        self.ggml = ggml()
        params = cpu_kernels.InitParams(1 << 24, None, False)
        self.context = self.call("ggml_init", params)

    def call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self.ggml, name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))

    def tensor(self, *shape: int) -> Any:
        sizes = (ctypes.c_int64 * 4)(*shape, *[1] * (4 - len(shape)))
        return self.call("ggml_new_tensor", self.context, F32, 4, sizes)

    def floats(self, tensor: Any, size: int) -> np.ndarray:
        data = self.call("ggml_get_data_f32", tensor)
        return np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), shape=(size,))

    def compute(self, result: Any) -> None:
        graph = self.call("ggml_new_graph", self.context)
        self.call("ggml_build_forward_expand", graph, result)
        self.call("ggml_graph_compute_with_ctx", self.context, graph, 2)


@pytest.mark.parametrize("shape", [(1, 1001, 3), (7, 5), (1,), (2, 3, 5, 7)])
def test_fills(shape: tuple[int, ...]) -> None:
    """Rows of one number, as libllama fills the logits of a reduced vocabulary, and any others."""
    graph = Graph()
    for number in (0.0, -np.inf, 1.5):
        filled = graph.call("ggml_fill", graph.context, graph.tensor(*shape), ctypes.c_float(number))
        graph.compute(filled)
        assert (graph.floats(filled, int(np.prod(shape))) == number).all()


@pytest.mark.parametrize("shape", [(1001, 1, 1), (33, 3, 1), (5, 4, 3)])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_concatenations(shape: tuple[int, int, int], along: int) -> None:
    """One after the other where that is all there is to it, else by ggml."""
    graph = Graph()
    longer = tuple(size + 2 if axis == along else size for axis, size in enumerate(shape))
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=sizes[::-1]).astype(np.float32) for sizes in (shape, longer)]
    tensors = [graph.tensor(*sizes) for sizes in (shape, longer)]
    for tensor, array in zip(tensors, arrays, strict=True):
        graph.floats(tensor, array.size)[:] = array.ravel()
    both = graph.call("ggml_concat", graph.context, *tensors, along)
    graph.compute(both)
    wanted = np.concatenate(arrays, axis=2 - along)
    assert np.array_equal(graph.floats(both, wanted.size), wanted.ravel())


@pytest.mark.parametrize("form", ["F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0"])
def test_a_target_says_the_same_bits_in_passes_of_any_width(form: str, embedded_gguf: Path, tmp_path: Path) -> None:
    """Why greedy output with drafts is that of plain decoding: logits of one token a pass and of up to 17 are equal, also
    beyond 256 tokens of context, where flash attention adds up in another order.
    """
    if not cpu_kernels.complete():
        pytest.skip(f"ggml's dot products are others on this machine; those of {cpu_kernels.state().types} do not")
    assert few_sequences(form) >= 1
    tokens = [int(token) for token in np.random.default_rng(5).integers(1000, 40000, 320)]
    path = requantize(embedded_gguf, form, tmp_path)
    with LlamaCppTarget(path, ContextOptions(ctx=512, threads=2)) as target:
        for depth in (20, 290):
            target.rewind(0, 0)
            target.step([Row(0, tokens[:depth], 1)])
            alone = [target.step([Row(0, [token], 1)])[0].logits[0].copy() for token in tokens[depth : depth + 17]]
            for width in (2, 3, 4, 5, 8, 9, 17):
                target.rewind(0, depth)
                together = target.step([Row(0, tokens[depth : depth + width])])[0].logits
                assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=False)), (depth, width)


def test_several_sequences_in_a_pass_change_no_bit_of_each_other(embedded_gguf: Path) -> None:
    if not cpu_kernels.complete():
        pytest.skip("ggml's dot products are others on this machine")
    rng = np.random.default_rng(6)
    with LlamaCppTarget(embedded_gguf, ContextOptions(ctx=256, n_seq=3, flash_attn="off")) as target:
        for seq in range(3):
            target.step([Row(seq, [int(token) for token in rng.integers(1000, 40000, 20 + seq)], 1)])
        rows = [Row(seq, [int(token) for token in rng.integers(1000, 40000, 1 + 2 * seq)]) for seq in range(3)]
        alone = []
        for row in rows:
            length = target.length(row.seq)
            alone.append(target.step([row])[0].logits.copy())
            target.rewind(row.seq, length)
        together = target.step(rows)
        assert all(np.array_equal(a, b.logits) for a, b in zip(alone, together, strict=True))


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


STATE = "from dspark_cli.backends.llamacpp import native; s = native.cpu_kernels.state(); print(s.problem or s.types)"


def test_switched_off() -> None:
    assert in_a_process(STATE, DSPARK_CPU_KERNELS="off") == "DSPARK_CPU_KERNELS=off"


def test_without_a_compiler_everything_works(tmp_path: Path) -> None:
    where = {"DSPARK_CPU_KERNELS_DIR": str(tmp_path)}
    assert in_a_process(STATE, CC="no-such-compiler", **where) == "no C compiler (cc, gcc or clang)"
    assert in_a_process(STATE, CC="false", **where).startswith("could not be compiled: ")
    read_only = tmp_path / "file"
    read_only.write_text("a file where the folder should be")
    assert in_a_process(STATE, DSPARK_CPU_KERNELS_DIR=str(read_only)).startswith("could not be built: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("left", [0, 1000, -1])
def test_a_library_cut_short_is_built_again(left: int, tmp_path: Path) -> None:
    """Loading it would kill the process."""
    name = cpu_kernels._cached().name
    (tmp_path / name).write_bytes(cpu_kernels._cached().read_bytes()[:left])
    assert "Q8_0" in in_a_process(STATE, DSPARK_CPU_KERNELS_DIR=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 1000


def test_two_processes_that_build_at_once(tmp_path: Path) -> None:
    where = os.environ | {"DSPARK_CPU_KERNELS_DIR": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", STATE], env=where, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert all("Q8_0" in text for text in said)
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_whoever_loaded_ggml_first_is_told() -> None:
    """Another part of the process used llama-cpp-python before: its products are bound, and ours are never asked for."""
    assert in_a_process("import llama_cpp; " + STATE, LD_BIND_NOW="1").startswith("ggml does not ask for them")
    assert "Q8_0" in in_a_process(STATE, LD_BIND_NOW="1")
