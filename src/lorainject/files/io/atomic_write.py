"""Several files as one: whoever reads a folder finds all of the old or all of the new, whenever the writer is killed and whoever else writes.

    .adapter_model.safetensors.<random>.tmp, ...    all are written and on disk for good under temporary names
    .lorainject-save.json                           {name: temporary name, or null for a file that must go}: its rename is the commit
    adapter_model.safetensors, ...                  the temporaries take their places, one by one; the journal goes last

Before the commit the old files are there, after it the new ones: a reader that finds a journal takes a temporary where there still is one. A
journal that a killed writer has left is finished by the next. Writers of one folder wait for each other (flock); readers for nobody: they
look whether the files are still those that they began with, and else read again. A single file needs none of this: its rename is the commit.

Other libraries know nothing of the journal: between two renames, microseconds unless the writer is killed there, they see files of both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...errors import FileError, system_errors

JOURNAL = ".lorainject-save.json"
LONGEST = 2**16  # bytes of a journal
MANY, MOST = 1024, 2**30  # pieces and bytes that every system takes at once: an adapter's tensors are many and small
SECONDS = 60.0  # that a writer waits for another
TRIES = 1000  # of a reader, while others write
T = TypeVar("T")
Where = Callable[[str], "Path | None"]
"""Where the file of this name is read; None if there is none."""


def write(files: Mapping[Path, Iterable[bytes | memoryview] | None]) -> None:
    """Write these files, all of one folder if there are several; None: there must be none of this name. Modes follow the umask.

    Raises FileError if that can't be done; what was there is then untouched.
    """
    folder, *others = {path.parent for path in files}
    assert not others, "a commit is one folder's"
    temporaries = {
        path: path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        for path, pieces in files.items()
        if pieces is not None
    }
    made: set[Path] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) if len(files) > 1 else contextlib.nullcontext():
            if len(files) > 1:
                _finish(folder, [path.name for path in files])
            if there := next((path for path in files if path.is_dir()), None):
                raise IsADirectoryError(None, f"{there} is a directory")
            for path, temporary in temporaries.items():
                made.add(temporary)
                _put(temporary, files[path] or ())
            if len(files) > 1:
                journal = {path.name: temporaries[path].name if path in temporaries else None for path in files}
                made.add(draft := folder / f"{JOURNAL}.{os.urandom(8).hex()}.tmp")
                _put(draft, [json.dumps(journal).encode()])
                os.replace(draft, folder / JOURNAL)
                made.clear()  # from here on they are the files
                _sync(folder)
                _finish(folder, [])
            else:
                for path, temporary in temporaries.items():
                    os.replace(temporary, path)
                _sync(folder)
    except FileError:
        raise
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise FileError(f"{', '.join(map(str, files))} can't be written: {reason}", ["what was there before is untouched"],
                        "check the place, its permissions and the free space") from e  # fmt: skip
    finally:
        for temporary in made:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink()


def read(folder: Path, names: Sequence[str], reader: Callable[[Where], T]) -> T:
    """What `reader` makes of the files of these names, all of them of one save: while others save, it is called again."""
    for _ in range(TRIES):
        with contextlib.ExitStack() as held:
            seen = _seen(folder, names, held)
            try:
                value = reader(lambda name, seen=seen: seen[name][0] if name in seen else None)  # type: ignore[misc]
            except Exception:  # of a file that was renamed under it, packages raise all sorts
                if _seen(folder, names, held) == seen:
                    raise
                continue
            if _seen(folder, names, held) == seen:
                return value
    raise FileError(f"{folder} is being written again and again", way_out="read it when nobody saves to it")


def _seen(folder: Path, names: Sequence[str], held: contextlib.ExitStack) -> dict[str, tuple[Path, int, int]]:
    """Path and identity of each file that there is. They are held open, since a number that is free is soon another file's."""
    found, journal = {}, _journal(folder)
    for name in names:
        temporary = journal.get(name, "")
        for path in () if temporary is None else (folder / temporary, folder / name) if temporary else (folder / name,):
            with contextlib.suppress(FileNotFoundError):
                found[name] = path, *_identity(path, held)
                break
    return found


def _identity(path: Path, held: contextlib.ExitStack) -> tuple[int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would keep us waiting
    except FileNotFoundError:
        raise
    except OSError:  # there is one, which whoever reads it will say can't be read
        return 0, 0
    held.callback(os.close, fd)
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


def _journal(folder: Path) -> dict[str, str | None]:
    """The journal's entries; none, if there is no journal. Raises FileError for one that is none of ours: its names become paths."""
    try:
        with (folder / JOURNAL).open("rb") as f:
            entries = json.loads(f.read(LONGEST))
        for name, temporary in entries.items():
            if Path(name).name != name or not (
                temporary is None or re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp", temporary)
            ):
                raise ValueError(f"{name!r}: {temporary!r}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        raise FileError(
            f"{folder / JOURNAL} is no journal of a save: {e}",
            way_out="remove it, and look whether the files beside it are whole",
        ) from e
    return dict(entries)


def _finish(folder: Path, names: Sequence[str]) -> None:
    """Do what the journal says, if there is one; and clear away what killed writers of these names have left."""
    for name, temporary in _journal(folder).items():
        if temporary is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # it was renamed before the kill
                os.replace(folder / temporary, folder / name)
    if (folder / JOURNAL).exists():
        _sync(folder)
        (folder / JOURNAL).unlink()
    left = re.compile(rf"(\.({'|'.join(map(re.escape, names))})|{re.escape(JOURNAL)})\.[0-9a-f]{{16}}\.tmp")
    for path in folder.iterdir() if names else ():
        if left.fullmatch(path.name):
            path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other writer is at work in the folder, threads of this process included; a dead one's lock is gone with it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fd, start = os.open(folder, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - start > SECONDS:
                    raise FileError(
                        f"another process has been saving to {folder} for {SECONDS:g} s",
                        way_out="end it, or choose another place",
                    ) from None
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
    finally:
        os.close(fd)


def _put(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A new file, on disk for good."""
    pieces = list(pieces)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0) as f:
        with contextlib.suppress(
            AttributeError, OSError
        ):  # where there is such a call: its room at once takes less than piece by piece
            os.posix_fallocate(f.fileno(), 0, sum(map(len, pieces)))
        for i in range(0, len(pieces), MANY):
            _write(f.fileno(), pieces[i : i + MANY])
        os.fsync(f.fileno())


def _write(fd: int, pieces: list[bytes | memoryview]) -> None:
    """All of these, in as few calls as the system lets us; empties the list."""
    while pieces:
        at_once = hasattr(os, "writev") and sum(map(len, pieces)) <= MOST  # Windows has no such call
        done = os.writev(fd, pieces) if at_once else os.write(fd, pieces[0])
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = memoryview(pieces[0])[done:]


def _sync(folder: Path) -> None:
    """The renames in this folder are on disk for good."""
    with system_errors(f"{folder} can't be written"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
