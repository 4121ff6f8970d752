"""What a Hub repository holds, and the Hub's failures in our words. All requests go through huggingface-hub.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE and proxy variables are read by that library.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.registry.quants import BITS, is_target_file, part_of, parts_of, quant_of, rank, whole_name

T = TypeVar("T")
ONLINE = "without --offline, and with HF_HUB_OFFLINE unset"
#: answers that may be different in a moment
PASSING = (408, 425, 429, 500, 502, 503, 504)
#: tries without any progress before giving up (fewer for a server that was never reached), first and longest wait (seconds)
TRIES, TRIES_UNREACHED, FIRST_WAIT_S, LONGEST_WAIT_S = 5, 3, 1.0, 30.0
#: of a commit or a content; they become names of files and folders
_HASH = re.compile(r"^(?:[0-9a-f]{40}|[0-9a-f]{64})$")
#: what a checkpoint needs beside its weights
_CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class RemoteFile:
    """size: bytes; sha256: of large files (None for those that git itself holds); blob: what the Hub's cache names it."""

    name: str
    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class Listing:
    """Files of a repository at one commit. requested: the branch, tag or commit asked for."""

    repository: str
    revision: str
    requested: str
    files: dict[str, RemoteFile]


def endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable(timeout_s: float = 5.0) -> str | None:
    """None when the Hub answers anything, else why not. One request, no second try."""
    from huggingface_hub.utils import get_session

    try:
        get_session().get(f"{endpoint()}/api/models?limit=1", timeout=timeout_s)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return None


def list_files(repository: str, revision: str = "main") -> Listing:
    """Every file with size and hash, in one request. Raises DsparkError or NotReady that says what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError

    try:
        info = patiently(
            lambda: HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=15.0),
            what=repository,
        )
    except HFValidationError as error:
        raise BadInput(f"{repository!r} is not the name of a Hub repository: {error}") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # what a network that wants a log-in answers to everything
        raise _no_hub(repository, "answers with something that is no list of files") from None
    found = {}
    for sibling in info.siblings or []:
        if sibling.rfilename.startswith("/") or ".." in sibling.rfilename.split("/") or "\\" in sibling.rfilename:
            raise DsparkError(f"{repository} lists a file outside its folder: {sibling.rfilename!r}")
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        blob = sha256 or sibling.blob_id
        if blob and not _HASH.match(blob):
            raise _no_hub(repository, f"states no usable hash for {sibling.rfilename}")
        if blob and sibling.size is not None:
            found[sibling.rfilename] = RemoteFile(sibling.rfilename, int(sibling.size), sha256, blob)
    if not _HASH.match(info.sha or ""):
        raise _no_hub(repository, "names no commit")
    return Listing(repository, str(info.sha), revision, found)


def _no_hub(repository: str, answer: str) -> DsparkError:
    return DsparkError(
        f"{repository}: {endpoint()} {answer}: it does not seem to be a Hub",
        hint="HF_ENDPOINT, and whether this network wants you to log in first",
    )


def quants_in(listing: Listing) -> dict[str, list[RemoteFile]]:
    """GGUF targets of a repository: quant -> all parts, best quant first. A file that lacks parts is left out."""
    found: dict[str, list[RemoteFile]] = {}
    for name in sorted(listing.files, key=len):
        quant = quant_of(name) if is_target_file(name) else None
        first = quant is not None and name == parts_of(name)[0]
        if quant and first and quant not in found and all(part in listing.files for part in parts_of(name)):
            found[quant] = [listing.files[part] for part in parts_of(name)]
    return dict(sorted(found.items(), key=lambda item: rank(item[0])))


def gguf_parts(listing: Listing, name: str | None, quant: str | None) -> list[RemoteFile]:
    """The file `name` (without part numbers) or the one of `quant`, all its parts. Raises DsparkError when missing."""
    if name is not None:
        parts = sorted(f for f in listing.files if whole_name(f) == whole_name(name))
        if parts and parts == parts_of(parts[0]):
            return [listing.files[part] for part in parts]
        if parts:
            missing = [part for part in parts_of(parts[0]) if part not in listing.files]
            raise DsparkError(f"{listing.repository} lacks {', '.join(missing)} of {part_of(parts[0])[1]} parts")  # type: ignore[index]
    found = quants_in(listing)
    if quant is not None and quant in found:
        return found[quant]
    wanted = name if quant is None else f"no {quant} file ({name})" if name else f"no {quant} file"
    have = ", ".join(found) or "none that could be recognised"
    text = f"{listing.repository} has {wanted}" if quant else f"{listing.repository} has no file {wanted}"
    raise DsparkError(f"{text}; formats there: {have}", hint=f"--quant {next(iter(found))}" if found else None)


def checkpoint_files(listing: Listing) -> list[RemoteFile]:
    """What a safetensors checkpoint needs: weights, config, tokenizer; no pickles, no copies in other formats."""
    weights = [f for f in listing.files if f.endswith(".safetensors") and "/" not in f]
    if len(weights) > 1:
        weights = [f for f in weights if not f.startswith("consolidated")]
    if not weights:
        pickled = [f for f in listing.files if f.endswith((".bin", ".pt", ".pth"))]
        kind = f"pickled weights only ({', '.join(pickled[:3])}), which could run code" if pickled else "no safetensors"
        raise DsparkError(f"{listing.repository} has {kind}")
    if "config.json" not in listing.files:
        raise DsparkError(f"{listing.repository} has no config.json")
    return [listing.files[f] for f in (*(f for f in _CHECKPOINT_FILES if f in listing.files), *sorted(weights))]


def patiently(ask: Callable[[], T], *, what: str, progress: Callable[[], int] | None = None) -> T:
    """`ask()`, again with growing waits while the failure may pass; else raise it in our words.

    progress: a number that grows as bytes arrive: tries are counted from the last time it grew.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    network = network_errors()
    tries, before = 0, progress() if progress else 0
    while True:
        last: Exception
        try:
            return ask()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in PASSING:
                raise explain(error, what) from None
            last, wait, reached = error, _retry_after(error), True
        except OfflineModeIsEnabled as error:  # a ConnectionError, but no second try will change it
            raise explain(error, what) from None
        except network as error:
            last, wait, reached = error, None, "Connect" not in type(error).__name__
        except Exception as error:
            raise explain(error, what) from None
        now = progress() if progress else 0
        tries = 1 if now > before else tries + 1
        before = now
        if tries >= (TRIES if reached else TRIES_UNREACHED):
            raise explain(last, what) from None
        growing = min(FIRST_WAIT_S * 2 ** (tries - 1), LONGEST_WAIT_S) * random.uniform(0.8, 1.2)
        time.sleep(min(wait, 2 * LONGEST_WAIT_S) if wait is not None else growing)


def network_errors() -> tuple[type[Exception], ...]:
    """Failures of the connection. huggingface-hub has changed its HTTP library (httpx, httpx2): ask its own session."""
    from huggingface_hub.utils import get_session

    if offline():
        return (ConnectionError, TimeoutError)
    library: Any = sys.modules[type(get_session()).__mro__[-3].__module__.partition(".")[0]]
    return (library.TransportError, ConnectionError, TimeoutError)


def _retry_after(error: Any) -> float | None:
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdigit() else None


def explain(error: Exception, what: str) -> Exception:
    """`error` as one clear line with what to do; programming errors stay what they are."""
    from huggingface_hub import errors as e

    repository = what.partition(": ")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, DsparkError):
        return error
    if isinstance(error, e.OfflineModeIsEnabled):
        return NotReady(f"{what} cannot be looked up: the network is switched off", hint=ONLINE)
    if isinstance(error, e.GatedRepoError):
        return NotReady(
            f"{repository} is gated: its owner wants you to accept terms first",
            hint=f"open {endpoint()}/{repository}, accept, then `hf auth login` (or set HF_TOKEN) and repeat the command",
        )
    if isinstance(error, e.RevisionNotFoundError):
        return DsparkError(f"{what} has no such revision")
    if isinstance(error, e.EntryNotFoundError):
        return DsparkError(f"{what} is not in the repository (404)")
    if isinstance(error, e.RepositoryNotFoundError):
        return DsparkError(
            f"{repository} is not on {endpoint()}, or private", hint="check the name; for a private one `hf auth login`"
        )
    if status in (401, 403):
        return DsparkError(
            f"{what}: the Hub refuses access ({status})", hint="`hf auth login` with a token that may read it"
        )
    if status is not None:
        busy = (
            " after several tries; it asks for patience"
            if status == 429
            else " after several tries"
            if status in PASSING
            else ""
        )
        return DsparkError(f"{what}: {endpoint()} answered {status}{busy}", hint="the same command later; it continues")
    if isinstance(error, network_errors()):
        kind = type(error).__name__
        return NotReady(
            f"{what}: {endpoint()} cannot be reached ({kind}: {error})"
            if str(error)
            else f"{what}: {endpoint()} cannot be reached ({kind})",
            hint="the same command later (it continues), or --offline with what is here",
        )
    return error


def switched_off(what: str) -> NotReady:
    return NotReady(
        f"{what} is not on this machine, and the network is switched off",
        hint=ONLINE,
    )


def known_quant(quant: str) -> str:
    """`quant` in capitals. Raises BadInput for a format nobody knows."""
    if quant.upper() not in BITS:
        raise BadInput(f"unknown format {quant!r}: one of {', '.join(BITS)}")
    return quant.upper()
