"""Downloads from a local server that cuts the line, ignores ranges, changes its file or sends a wrong one."""

import errno
import hashlib
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minigated.data import data_root, describe, fetch, load_text
from minigated.data import download as download_module
from minigated.data import sources as sources_module
from minigated.data.folders import one_at_a_time
from minigated.data.sources import Download, Source, by_bytes, by_part, held_out_halved
from minigated.errors import InputError

BODY = bytes((7 * i + i // 251) % 251 for i in range(300_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server:
    """A server of `bodies` (path -> bytes) with the faults that are switched on; it notes what it was asked."""

    def __init__(self):
        self.bodies = {"/file.bin": BODY}
        self.cuts: list[int] = []  # the next answers stop after that many bytes
        self.codes: list[int] = []  # the next answers are these errors
        self.ranges = True  # whether Range is honoured
        self.conditions = True  # whether If-Range is
        self.tags = True  # whether an ETag is sent
        self.length = True  # whether Content-Length is
        self.on_cut = None
        self.requests: list[dict] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path="/file.bin"):
        return self.address + path

    def answer(self, handler):
        self.requests.append(dict(handler.headers))
        if self.codes:
            return handler.send_error(self.codes.pop(0))
        body = self.bodies.get(handler.path)
        if body is None:
            return handler.send_error(404)
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        wanted = re.match(r"bytes=(\d+)-$", handler.headers.get("Range", ""))
        current = not self.conditions or handler.headers.get("If-Range") in (None, tag)
        start = int(wanted[1]) if wanted and self.ranges and current else 0
        if start >= len(body):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.tags:
            handler.send_header("ETag", tag)
        if self.length:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        sent = body[start:][:cut]
        self.sent += len(sent)  # before the write: the client may be done before this thread wakes again
        handler.wfile.write(sent)
        if cut is not None and self.on_cut:
            self.on_cut()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def get(server, destination, sha256=None, **options):
    return fetch(options.pop("url", server.url()), destination, sha256, **({"pause": 0.0, "timeout": 5} | options))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download(server, tmp_path):
    path = get(server, tmp_path / "deep" / "file.bin", SHA256)
    assert path.read_bytes() == BODY and names(path.parent) == ["file.bin"]
    assert len(server.requests) == 1 and server.requests[0]["User-Agent"].startswith("minigated")
    get(server, path, SHA256)
    assert len(server.requests) == 1  # there already


def test_a_cut_line_is_resumed_where_it_was_cut(server, tmp_path):
    server.cuts = [100_000, 50_000]
    path = get(server, tmp_path / "file.bin", SHA256)
    assert path.read_bytes() == BODY and names(tmp_path) == ["file.bin"]
    assert [r.get("Range") for r in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert all("If-Range" in r for r in server.requests[1:])
    assert server.sent == len(BODY)  # no byte was sent twice


def test_a_later_run_goes_on_where_the_first_gave_up(server, tmp_path):
    server.cuts = [120_000, 0, 0]
    with pytest.raises(InputError, match="line was cut at 120,000 of 300,000 bytes"):
        get(server, tmp_path / "file.bin", SHA256, attempts=2)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    server.cuts = []
    assert get(server, tmp_path / "file.bin", SHA256).read_bytes() == BODY
    assert server.sent == len(BODY) and names(tmp_path) == ["file.bin"]


def test_a_line_that_keeps_failing_but_moves_on_is_followed_to_the_end(server, tmp_path):
    server.cuts = [30_000] * 9
    assert get(server, tmp_path / "file.bin", SHA256, attempts=2).read_bytes() == BODY


def test_a_server_that_ignores_ranges_begins_anew(server, tmp_path):
    server.ranges, server.cuts = False, [100_000]
    assert get(server, tmp_path / "file.bin", SHA256).read_bytes() == BODY
    assert "Range" in server.requests[1] and server.sent == len(BODY) + 100_000


def test_a_server_without_validators_begins_anew(server, tmp_path):
    server.tags, server.cuts = False, [100_000]
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Range honoured", "If-Range ignored"])
@pytest.mark.parametrize("size", [300_000, 200_000, 90_000])
def test_a_file_that_changes_between_tries_is_never_mixed(server, tmp_path, conditions, size):
    new = bytes(reversed(BODY))[:size]
    server.conditions, server.cuts = conditions, [100_000]
    server.on_cut = lambda: server.bodies.update({"/file.bin": new})
    assert get(server, tmp_path / "file.bin").read_bytes() == new
    assert json.loads((tmp_path / "file.bin.sha256").read_text())["sha256"] == hashlib.sha256(new).hexdigest()


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(InputError, match=f"sha256 {SHA256}, expected {wrong}"):
        get(server, tmp_path / "file.bin", wrong)
    assert names(tmp_path) == []


def test_a_hash_is_recorded_at_the_first_download_and_held(server, tmp_path):
    path = get(server, tmp_path / "file.bin")
    note = json.loads((tmp_path / "file.bin.sha256").read_text())
    assert note["sha256"] == SHA256 and note["bytes"] == len(BODY) and note["url"] == server.url()
    path.unlink()
    assert get(server, path).read_bytes() == BODY  # the same file again
    path.unlink()
    server.bodies["/file.bin"] = BODY[:-1] + b"!"
    with pytest.raises(InputError, match=f"expected {SHA256}, recorded at the first download in file.bin.sha256"):
        get(server, path)
    assert names(tmp_path) == ["file.bin.sha256"]
    (tmp_path / "file.bin.sha256").unlink()
    assert get(server, path).read_bytes().endswith(b"!")  # accepted once the reader says so


def test_a_file_that_is_there_is_checked(server, tmp_path):
    path = get(server, tmp_path / "file.bin")
    path.write_bytes(BODY[:-5])
    with pytest.raises(InputError, match="delete the file to download it again"):
        get(server, path)
    with pytest.raises(InputError, match=f"expected {SHA256}"):
        get(server, path, SHA256)
    (tmp_path / "file.bin.sha256").write_text("{")
    with pytest.raises(InputError, match="file.bin.sha256 is damaged"):
        get(server, path)


def test_a_file_put_there_by_hand_is_taken(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    get(server, tmp_path / "file.bin")
    assert server.requests == [] and names(tmp_path) == ["file.bin", "file.bin.sha256"]


def test_a_whole_part_needs_only_its_name(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the process ends before the file gets its name
        patch.setattr(download_module.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            get(server, tmp_path / "file.bin", SHA256)
    assert not (tmp_path / "file.bin").exists()
    assert get(server, tmp_path / "file.bin", SHA256).read_bytes() == BODY and len(server.requests) == 1


def test_busy_servers_are_asked_again_and_others_not(server, tmp_path):
    server.codes = [503, 429]
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY
    server.requests.clear()
    with pytest.raises(InputError, match="404") as caught:
        get(server, tmp_path / "other", url=server.url("/other"))
    assert len(server.requests) == 1 and str(tmp_path / "other") in str(caught.value)


def test_the_waits_grow(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download_module.time, "sleep", waits.append)
    server.codes = [503] * 4
    with pytest.raises(InputError, match="503"):
        get(server, tmp_path / "file.bin", pause=1.0)
    assert waits == [1, 2, 4] and len(server.requests) == 4


def test_a_mirror_stands_in(server, tmp_path):
    server.bodies["/wrong"] = b"something else"
    urls = [server.url("/gone"), server.url("/wrong"), server.url()]
    assert get(server, tmp_path / "file.bin", SHA256, url=urls).read_bytes() == BODY


def test_no_network_gives_one_line_with_the_way_out(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(InputError) as caught:
        get(server, tmp_path / "file.bin", attempts=2)
    line = str(caught.value)
    assert f"download {server.url()} yourself and put it at {tmp_path / 'file.bin'}" in line and "\n" not in line
    assert names(tmp_path) == []


def test_a_file_of_unknown_length_is_not_trusted(server, tmp_path):
    server.length, server.cuts = False, [100_000]
    with pytest.raises(InputError, match="does not say how long"):
        get(server, tmp_path / "file.bin")
    assert names(tmp_path) == []


def test_other_kinds_of_address_are_refused(server, tmp_path):
    (tmp_path / "secret").write_text("x")
    with pytest.raises(InputError, match="not an http"):
        get(server, tmp_path / "file.bin", url=f"file://{tmp_path}/secret")


def test_a_full_disk_is_told_apart_from_a_cut_line(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download_module.os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*file.bin.part: No space left"):
        get(server, tmp_path / "file.bin")
    assert len(server.requests) == 1 and "file.bin" not in names(tmp_path)


def test_the_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("minigated.data.folders.sys.platform", "linux")
    monkeypatch.delenv("MINIGATED_DATA", raising=False)
    assert data_root() == tmp_path / "cache" / "minigated"
    monkeypatch.setenv("MINIGATED_DATA", str(tmp_path / "mine"))
    assert data_root() == tmp_path / "mine" and not data_root().exists()
    assert data_root(tmp_path / "other") == tmp_path / "other"
    assert data_root(create=True).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to the data folder .*file/x .*MINIGATED_DATA"):
        data_root(tmp_path / "file" / "x", create=True)


def test_processes_take_turns(tmp_path):
    pytest.importorskip("fcntl")
    order = []

    def second():
        with one_at_a_time(tmp_path):
            order.append("second")

    with one_at_a_time(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def zipped(members: dict[str, bytes], pack: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", pack) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return file.getvalue()


STORIES = [b"Once there was story %d.\n" % i for i in range(40)]
TRAIN, HELD_OUT = (b"<|endoftext|>\n".join(part) + b"<|endoftext|>\n" for part in (STORIES[:30], STORIES[30:]))


@pytest.fixture
def small_sources(server, monkeypatch):
    """The three sources with small files on the local server."""
    server.bodies |= {
        "/e.zip": zipped({"enwik8": b"<page>" * 100}),
        "/t.txt": TRAIN,
        "/v.txt": HELD_OUT,
        "/w.zip": zipped({f"w/{part}": part.encode() * 9 for part in ("train", "valid", "test")}),
    }

    def download(path, *members):
        body = server.bodies[path]
        return Download(path[1:], (server.url(path),), len(body), hashlib.sha256(body).hexdigest(), members)

    facts = ("title", "home", "licence", "citation", "splits")
    for name, downloads, split in (
        ("enwik8", (download("/e.zip", "enwik8"),), by_bytes(540, 570)),
        ("tinystories", (download("/t.txt"), download("/v.txt")), held_out_halved),
        ("wikitext2", (download("/w.zip", "w/train", "w/valid", "w/test"),), by_part),
    ):
        monkeypatch.setitem(sources_module.SOURCES, name, Source(name, *facts, downloads, split))
    return server


def splits(corpus):
    return [bytes(part.tolist()) for part in (corpus.train, corpus.validation, corpus.test)]


def test_enwik8(small_sources, tmp_path):
    corpus = load_text("enwik8", tmp_path)
    assert corpus.name == "enwik8" and corpus.bytes == 600
    assert splits(corpus) == [b"<page>" * 90, b"<page>" * 5, b"<page>" * 5]
    assert corpus.sha256 == hashlib.sha256(b"<page>" * 100).hexdigest()


def test_wikitext2(small_sources, tmp_path):
    corpus = load_text("wikitext2", tmp_path)
    assert splits(corpus) == [b"train" * 9, b"valid" * 9, b"test" * 9]
    assert corpus.sha256 == hashlib.sha256(b"train" * 9 + b"valid" * 9 + b"test" * 9).hexdigest()


def test_tinystories(small_sources, tmp_path):
    corpus = load_text("tinystories", tmp_path)
    expected = (STORIES[:30], STORIES[30:35], STORIES[35:])
    assert splits(corpus) == [b"".join(story + b"\xfe" for story in part) for part in expected]
    assert corpus.sha256 == hashlib.sha256(TRAIN + HELD_OUT).hexdigest() and corpus.bytes == len(TRAIN + HELD_OUT)


def test_the_second_start_needs_neither_network_nor_download(small_sources, tmp_path):
    first = splits(load_text("enwik8", tmp_path))
    small_sources.requests.clear()
    (tmp_path / "enwik8" / "e.zip").unlink()
    assert splits(load_text("enwik8", tmp_path)) == first and small_sources.requests == []


def test_a_damaged_token_file_is_made_again(small_sources, tmp_path):
    first = splits(load_text("enwik8", tmp_path))
    (tmp_path / "enwik8" / "tokens.bin").write_bytes(b"short")
    assert splits(load_text("enwik8", tmp_path)) == first and len(small_sources.requests) == 1
    (tmp_path / "enwik8" / "tokens.json").write_text("{")
    assert splits(load_text("enwik8", tmp_path)) == first


def test_an_interrupted_preparation_leaves_nothing_that_looks_ready(small_sources, tmp_path, monkeypatch):
    small_sources.bodies["/v.txt"] = bad = HELD_OUT + b"\xff"
    source = sources_module.SOURCES["tinystories"]
    wrong = Download("v.txt", source.downloads[1].urls, len(bad), hashlib.sha256(bad).hexdigest())
    with monkeypatch.context() as patch:
        held = Source("tinystories", "", "", "", "", "", (source.downloads[0], wrong), held_out_halved)
        patch.setitem(sources_module.SOURCES, "tinystories", held)
        with pytest.raises(InputError, match="v.txt: byte 0xFF at offset"):
            load_text("tinystories", tmp_path)
    assert not [name for name in names(tmp_path / "tinystories") if name.startswith("tokens")]


@pytest.mark.parametrize("fault", ["compressed bytes", "stored bytes", "no zip file", "no such member"])
def test_a_broken_archive_is_named(small_sources, tmp_path, monkeypatch, fault):
    member = "w/train" if fault != "no such member" else "w/other"
    pack = zipfile.ZIP_STORED if fault == "stored bytes" else zipfile.ZIP_DEFLATED
    body = bytearray(zipped({member: b"train" * 9}, pack))
    if fault.endswith("bytes"):
        body[40] ^= 0xFF  # in the first member's content
    small_sources.bodies["/w.zip"] = b"<html>" if fault == "no zip file" else bytes(body)
    download = Download("w.zip", (small_sources.url("/w.zip"),), 0, None, ("w/train",))
    monkeypatch.setitem(sources_module.SOURCES, "wikitext2", Source("wikitext2", *"-----", (download,), by_part))
    with pytest.raises(InputError, match="w.zip is no zip file with a sound 'w/train'"):
        load_text("wikitext2", tmp_path)


def test_of_two_processes_one_prepares_the_data(small_sources, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    folder, build, built = tmp_path / "enwik8", sources_module._build, []
    monkeypatch.setattr(sources_module, "_build", lambda *a: built.append(1) or build(*a))
    folder.mkdir()
    with one_at_a_time(folder):
        other = threading.Thread(target=load_text, args=("enwik8", tmp_path))
        other.start()
        other.join(0.2)
        assert other.is_alive() and not built  # waits its turn
        build(sources_module.SOURCES["enwik8"], folder)
    other.join(5)
    assert not other.is_alive() and not built  # and finds the work done


def test_describe_downloads_and_names_the_place(small_sources, tmp_path):
    page = describe("enwik8", tmp_path)
    assert str(tmp_path / "enwik8" / "tokens.bin") in page and "540 / 30 / 30" in page


def test_the_real_sources_are_pinned():
    for source in sources_module.SOURCES.values():
        assert source.licence and source.citation and source.home.startswith("https://")
        for file in source.downloads:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.bytes > 1_000_000
            for url in file.urls:
                assert url.endswith(file.file)
                assert "huggingface" not in url or re.search("/resolve/[0-9a-f]{40}/", url)  # a revision, no branch
