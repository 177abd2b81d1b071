"""Downloads that survive a cut line: resumed, held to a hash, and whole before they get their name."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from minigated.data.folders import make_folder
from minigated.errors import InputError

BLOCK = 1 << 16
HEADERS = {"User-Agent": "minigated/0.1", "Accept-Encoding": "identity"}  # some homes turn away urllib's name
PASSING = {408, 425, 429, 500, 502, 503, 504}  # status codes worth another try


class _Passing(Exception):
    """Trouble that another try may overcome."""


class _Final(Exception):
    """Trouble that it will not."""


def fetch(
    url: str | Sequence[str],
    destination: str | os.PathLike,
    sha256: str | None = None,
    *,
    attempts: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Downloads a file once; a file that is there already is only checked.

    Bytes go to ``NAME.part`` (with ``NAME.part.json`` on what the server said of the file), from which a
    later try or a later run goes on if the server still has the same file. The whole file gets its name in
    one step, after its hash was found right: `sha256`, or without one the hash in ``NAME.sha256``, which the
    first download writes.

    Args:
        url: where from (http or https), or several places in order of preference.
        destination: path of the file.
        sha256: the official hash where one is known.
        attempts: tries in a row that bring nothing new before a place is given up.
        pause: seconds before the second try; doubled for each one after it.
        timeout: seconds without a byte that count as a cut line.
        progress: whether to show a bar, on a terminal.

    Returns:
        `destination` as a `Path`.

    Raises:
        InputError: no place could deliver (the message says what to download by hand and where to put it), a
            wrong hash, or a folder that cannot be written.
    """
    destination, urls = Path(destination), (url,) if isinstance(url, str) else tuple(url)
    part = _Part(make_folder(destination.parent) / f"{destination.name}.part")
    patience, troubles = _Patience(attempts, pause, timeout), []
    try:
        if destination.exists():
            if trouble := _hash_trouble(destination, destination, sha256, urls[0]):
                raise InputError(f"{destination} {trouble}; delete the file to download it again")
            return destination
        for address in urls:
            try:
                _download(address, part, patience, progress)
                if trouble := _hash_trouble(part.path, destination, sha256, address):
                    part.clear()
                    raise _Final(trouble)
            except _Final as failure:
                troubles.append(f"{address}: {failure}")
                continue
            os.replace(part.path, destination)
            part.clear()
            return destination
    except OSError as error:
        raise InputError(f"cannot write {error.filename or part.path}: {error.strerror or error}") from None
    raise InputError(
        f"could not get {destination.name} ({'; '.join(troubles)}); "
        f"or download {urls[0]} yourself and put it at {destination}"
    )


@dataclass
class _Patience:
    attempts: int
    pause: float
    timeout: float


@dataclass
class _Origin:
    """What a server said of the file that a part belongs to."""

    url: str
    total: int | None
    validator: str | None  # a strong ETag, else the date of the last change


class _Part:
    """``NAME.part`` and the note beside it."""

    def __init__(self, path: Path):
        self.path, self.note = path, path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def origin(self) -> _Origin | None:
        try:
            return _Origin(**json.loads(self.note.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # none, or damaged: the part is begun anew
            return None

    def begin(self, origin: _Origin) -> None:
        self.clear()
        self.path.touch()
        self.note.write_text(json.dumps(asdict(origin)))

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _download(url: str, part: _Part, patience: _Patience, progress: bool) -> None:
    """Fills `part` with the whole file, in as many connections as it takes."""
    from tqdm import tqdm

    if urlsplit(url).scheme not in ("http", "https"):
        raise _Final("not an http or https address")
    vain, furthest = 0, 0
    with tqdm(desc=part.path.stem, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        while True:
            try:
                return _connect(url, part, patience.timeout, bar)
            except _Passing as trouble:
                vain = 1 if part.size > furthest else vain + 1
                furthest = max(furthest, part.size)
                if vain >= patience.attempts:
                    raise _Final(str(trouble)) from None
                time.sleep(patience.pause * 2 ** (vain - 1))


def _connect(url: str, part: _Part, timeout: float, bar) -> None:
    """One connection: goes on where `part` ends if the server has the same file, else begins anew."""
    known = part.origin()
    offset = part.size if known and known.url == url and known.validator else 0
    if offset and offset == known.total:
        return
    resume = {"Range": f"bytes={offset}-", "If-Range": known.validator} if offset else {}
    with _open(url, resume, timeout, part) as response:
        total, start = _extent(response)
        origin = _Origin(url, total, _validator(response))
        if total is None and not response.chunked:
            raise _Final("the server does not say how long the file is")
        if start == 0:  # asked for all, or the server ignores ranges, or its file is another one by now
            part.begin(origin)
        elif start != offset or origin != known:
            part.clear()
            raise _Passing("the file changed between two tries")
        bar.total, bar.n = total, start
        with open(part.path, "ab") as file:
            for block in _blocks(response):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.size != total:
        raise _Passing(f"the line was cut at {part.size:,} of {total:,} bytes")


def _open(url: str, headers: dict, timeout: float, part: _Part):
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        return urlopen(Request(url, headers=HEADERS | headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416:  # the server's file is shorter than the part
            part.clear()
            raise _Passing("the file changed between two tries") from None
        kind = _Passing if error.code in PASSING else _Final
        raise kind(f"HTTP status {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise _Passing(_line(getattr(error, "reason", error))) from None


def _blocks(response) -> Iterator[bytes]:
    from http.client import HTTPException

    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, HTTPException) as error:
            raise _Passing(_line(error)) from None
        if not block:
            return
        yield block


def _extent(response) -> tuple[int | None, int]:
    """Length of the whole file, and where in it this answer begins."""
    field = "Content-Range" if response.status == 206 else "Content-Length"
    value = response.headers.get(field)
    try:
        if field == "Content-Length":
            return (int(value) if value else None), 0
        bounds, total = value.removeprefix("bytes ").split("/")
        return int(total), int(bounds.split("-")[0])
    except (AttributeError, ValueError):
        raise _Final(f"{field} {value!r} makes no sense") from None


def _validator(response) -> str | None:
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_trouble(path: Path, destination: Path, sha256: str | None, url: str) -> str | None:
    """Says what is wrong with the hash of `path`, or records it for `destination` where none is known."""
    found, record = file_sha256(path), destination.with_name(destination.name + ".sha256")
    source = ""
    if sha256 is None and not record.exists():
        today = time.strftime("%Y-%m-%d")
        note = {"sha256": found, "bytes": path.stat().st_size, "url": url, "recorded": today}
        temporary = record.with_name(record.name + ".part")
        temporary.write_text(json.dumps(note, indent=1) + "\n")
        os.replace(temporary, record)
        return None
    if sha256 is None:
        try:
            sha256 = json.loads(record.read_text())["sha256"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{record} is damaged; delete it to record the hash anew") from None
        source = f", recorded at the first download in {record.name} (delete that file to accept another)"
    if found == sha256:
        return None
    return f"has sha256 {found}, expected {sha256}{source}"
