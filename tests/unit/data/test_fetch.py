"""Public sets from a server on this machine: whole, cut off, changed, wrong, redirected."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mltfr_dist.cli import main
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources import download as module
from mltfr_dist.data.sources import fetch, public_sets
from mltfr_dist.data.sources.fetch import RECORD, fetch_set, sets_text, use_set
from mltfr_dist.data.sources.public_sets import PUBLIC_SETS, PublicSet
from mltfr_dist.errors import DataError
from mltfr_dist.presets import PRESETS
from mltfr_dist.training.inputs import load_inputs

CONTENT = "".join(f"u{user} " + " ".join(f"i{n}" for n in range(9)) + "\n" for user in range(9999))
BYTES = CONTENT.encode()
SHA256 = "sha256:" + hashlib.sha256(BYTES).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves :attr:`Server.content` as its attributes say."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            self.send_error(status)
            return
        content, start = server.content, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", server.tag) == server.tag
        if asked and server.has_ranges and unchanged:
            start = int(asked[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        end = server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    """What it does, and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.has_ranges, self.says_length = BYTES, '"one"', True, True
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.redirects: dict[str, str] = {}
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/Mini.txt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        mini = PublicSet(
            "A set", running.url, "Do not sell it.", SHA256, "", {"format": "sequences"}
        )
        monkeypatch.setitem(public_sets.PUBLIC_SETS, "mini", mini)
        yield running
        running.shutdown()
        thread.join()


def get(folder: Path, log: list[str] | None = None) -> Path:
    lines: list[str] = [] if log is None else log
    return fetch_set("mini", folder, log=lines.append, allow_loopback=True)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        get(folder)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not (folder / "mini" / "Mini.txt").exists()
    return str(caught.value)


def without_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(PUBLIC_SETS["mini"], checksum="")
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "mini", changed)


def test_a_set_is_fetched_once_after_its_terms_were_shown(tmp_path, server):
    log: list[str] = []
    path = get(tmp_path, log)
    assert path.read_bytes() == BYTES
    assert sorted(file.name for file in path.parent.iterdir()) == ["Mini.txt", RECORD]
    assert log[1] == "Terms: Do not sell it."
    assert log[-1] == f"Prepare it: `mltfr prepare {path} OUTPUT --format sequences`"
    assert get(tmp_path) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("known", [True, False])
def test_what_is_cut_off_goes_on_where_it_was(tmp_path, server, monkeypatch, known):
    if not known:
        without_checksum(monkeypatch)
    server.cuts = [100_000, 250_000, 250_001]
    log: list[str] = []
    assert get(tmp_path, log).read_bytes() == BYTES
    ranges = [request.get("Range") for request in server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=250000-", "bytes=250001-"]
    assert {request.get("If-Range") for request in server.requests[1:]} == {'"one"'}
    assert any("Going on behind 0.2 MB" in line for line in log)
    assert any("100,000 of" in line for line in log)


def test_another_call_goes_on_too(tmp_path, server):
    server.cuts = [100_000] * 9
    message = refusal(tmp_path)
    assert "cannot be fetched: 100,000 of" in message
    assert "0.1 MB are kept" in message
    server.cuts = []
    server.requests.clear()
    assert get(tmp_path).read_bytes() == BYTES
    assert [request["Range"] for request in server.requests] == ["bytes=100000-"]


@pytest.mark.parametrize("kind", ["no ranges", "changed", "longer part", "other part", "no tag"])
def test_two_files_are_never_mixed(tmp_path, server, monkeypatch, kind):
    without_checksum(monkeypatch)
    server.cuts = [100_000] * 5
    refusal(tmp_path)
    server.cuts, server.requests = [], []
    other = BYTES[::-1]
    if kind == "no ranges":
        server.has_ranges = False
    elif kind == "changed":
        server.content, server.tag = other, '"two"'
    elif kind == "longer part":
        server.content = other[:50_000]
    elif kind == "other part":
        original = Handler.send_header

        def lie(self: Handler, key: str, value: str) -> None:
            first = key == "Content-Range" and len(server.requests) == 1
            original(self, key, value.replace("bytes 1", "bytes 2") if first else value)

        monkeypatch.setattr(Handler, "send_header", lie)
    else:
        state = tmp_path / "mini" / ".Mini.txt.part.json"
        state.write_text(json.dumps({"url": server.url, "validator": ""}))
        server.content, server.tag = other, ""
    assert get(tmp_path).read_bytes() == server.content


def test_what_is_not_the_known_set_is_refused_and_kept_apart(tmp_path, server):
    server.content = BYTES + b"u7 more\n"
    message = refusal(tmp_path)
    assert SHA256 in message
    assert (tmp_path / "mini" / "Mini.txt.rejected").read_bytes() == server.content
    server.content = BYTES
    assert get(tmp_path).read_bytes() == BYTES


def test_a_checksum_that_is_not_known_is_recorded_and_compared(tmp_path, server, monkeypatch):
    without_checksum(monkeypatch)
    log: list[str] = []
    path = get(tmp_path, log)
    assert any("no checksum of it is known" in line for line in log)
    assert f"sha256:{json.loads((path.parent / RECORD).read_text())['sha256']}" == SHA256
    path.unlink()
    server.content = BYTES + b"u7 more\n"
    assert "or remove" in refusal(tmp_path)
    server.content = BYTES
    path = get(tmp_path)
    path.write_bytes(BYTES[:-1])
    with pytest.raises(DataError, match="is not the set that is known"):
        use_set("mini", tmp_path, PrepareConfig(), log=lambda _: None)
    assert path.exists(), "what the user has is not moved"


def test_md5_serves_where_no_sha256_is_published(tmp_path, server, monkeypatch):
    md5 = hashlib.md5(BYTES, usedforsecurity=False).hexdigest()
    changed = replace(PUBLIC_SETS["mini"], checksum=f"md5:{md5}")
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "mini", changed)
    assert get(tmp_path).read_bytes() == BYTES
    server.content = BYTES[:-1]
    assert f"md5:{md5} was expected" in refusal(tmp_path / "other")


def test_answers_that_are_no_file(tmp_path, server):
    server.statuses = [404]
    assert "cannot be fetched: it answers 404 (Not Found)" in refusal(tmp_path)
    assert len(server.requests) == 1, "asking again would not help"
    server.statuses = [503, 429, 200]
    assert get(tmp_path).read_bytes() == BYTES
    assert not list((tmp_path / "mini").glob(".Mini*.json"))


def test_redirects_are_followed_to_places_that_may_be_fetched_only(tmp_path, server, monkeypatch):
    base = server.url.rpartition("/")[0]
    server.redirects = {"/Mini.txt": f"{base}/moved.txt"}
    assert get(tmp_path).read_bytes() == BYTES
    for place in ("http://example.com/x", "file:///etc/passwd", "ftp://example.com/x"):
        server.redirects = {"/Mini.txt": place}
        message = refusal(tmp_path / "other")
        assert "is not fetched" in message or "not allowed" in message
    with pytest.raises(DataError, match="come over https"):  # what a user would have
        fetch_set("mini", tmp_path / "third", log=lambda _: None)


def test_no_length_is_said_and_nobody_there_too(tmp_path, server):
    server.says_length = False
    log: list[str] = []
    assert get(tmp_path, log).read_bytes() == BYTES
    assert any("does not say how long" in line for line in log)
    server.cuts = [100_000]
    assert "was expected" in refusal(tmp_path / "cut")
    server.shutdown()
    server.server_close()
    assert "refused" in refusal(tmp_path / "other")
    assert not (tmp_path / "other").exists(), "nothing empty stays"


def test_a_name_that_nobody_knows_is_not_asked_for_again(tmp_path, server, monkeypatch):
    changed = replace(PUBLIC_SETS["mini"], url="https://no.such.host.invalid/Mini.txt")
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "mini", changed)
    monkeypatch.setattr(module, "_FIRST_WAIT", 1000.0)
    assert "https_proxy" in refusal(tmp_path / "sets")
    assert not (tmp_path / "sets").exists()


def test_two_at_once_are_refused(tmp_path, server):
    (tmp_path / "mini").mkdir()
    with module._exclusive(tmp_path / "mini" / ".Mini.txt.part"):
        assert "Another process is fetching Mini.txt" in refusal(tmp_path)


def test_progress_says_rate_and_what_is_left(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    log: list[str] = []
    get(tmp_path, log)
    assert any(
        re.fullmatch(r"  [\d.]+ of [\d.]+ MB, [\d.]+ MB/s, about \d+ s left", x) for x in log
    )


def test_prepare_takes_a_set_by_its_name(tmp_path, server, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "mini", "out"]) == 2
    message = capsys.readouterr().err
    assert "The public set `mini` is not here (data/sets/mini/Mini.txt). Do not sell it." in message
    assert "--download" in message
    real = fetch.download
    monkeypatch.setattr(
        fetch, "download", lambda *a, **k: real(*a, **(k | {"allow_loopback": True}))
    )
    assert main(["prepare", "mini", "out", "--download"]) == 0
    output = capsys.readouterr().out
    assert output.index("Terms: Do not sell it.") < output.index("From http")
    assert "mini: prepared with --format sequences" in output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["num_users"] == 9999
    # Without --download the cached file serves; what the user gives goes before the set's options.
    assert main(["prepare", "mini", "again", "--item-core", "7"]) == 0
    (tmp_path / "mini").mkdir()
    assert main(["prepare", "mini", "third"]) == 2
    assert "`./mini`" in capsys.readouterr().err
    assert main(["prepare", "none.csv", "third", "--download"]) == 2
    assert "is no public set" in capsys.readouterr().err
    assert main(["fetch", "nothing"]) == 2
    assert "There is no public set `nothing`" in capsys.readouterr().err


def test_a_set_that_no_program_can_fetch_says_where_it_is(tmp_path, capsys):
    assert main(["fetch", "pantry", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "https://github.com/ccwwhhh/MLTFR" in message
    assert "mltfr prepare FILE OUTPUT --format sequences --user-core 1 --item-core 1" in message


def test_the_registry(capsys):
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out.strip() == sets_text()
    for name, result in PUBLIC_SETS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert not result.url or result.url.startswith("https://")
        assert re.fullmatch(r"(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})?", result.checksum)
        assert result.terms.endswith(".")
        assert result.options["format"]
        assert set(result.options) <= set(PrepareConfig.model_fields)
        assert "/" not in result.file
        assert ".." not in result.member


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_whose_data_is_missing_says_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is not here") as caught:
        load_inputs(PRESETS[name]())
    assert "mltfr prepare" in caught.value.remedy
    assert str(PRESETS[name]().data.path) in caught.value.remedy
