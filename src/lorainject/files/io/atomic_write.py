"""Files and folders that change all at once or not at all, whenever the writer is killed and whoever else writes.

A single file is written under a temporary name, flushed to disk and renamed. Several files of one folder are one save:

    .adapter_model.safetensors.<random>.tmp    each file is first written and flushed to disk under a temporary name
    .lorainject-save.json                      the journal: {name: temporary name, or null for a file to delete};
                                               the rename to this name is the commit
    adapter_model.safetensors                  the temporary files are renamed; then the journal is deleted

Before the commit a reader finds the old files. After it, a reader that finds a journal takes the temporary files that
are still there, and the next writer finishes what a killed writer has left. Writers of one folder wait for each other
(flock). Readers do not wait: they read again if the files were replaced meanwhile.

Other libraries do not know the journal. Between two renames (microseconds, unless the writer is killed there) they see
files of both saves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...errors import FileError, system_errors
from .regular_file import is_plain_name, read_regular

JOURNAL = ".lorainject-save.json"
UNFINISHED = ".{}.lorainject-unfinished"
"""The temporary name of a folder, or of a large file of which a killed process may leave only one."""
MARK = ".lorainject-temporary"
"""The file in a temporary folder that says that all of it may be deleted."""
MAX_JOURNAL = 2**16  # bytes
MAX_PIECES, MAX_BYTES = 1024, 2**30  # that every system takes in one call: an adapter's tensors are many and small
LOCK_SECONDS = 60.0  # that a writer waits for another
READ_ATTEMPTS = 1000  # while other processes write
SPACE = "check the directory, its permissions and the free space"
T = TypeVar("T")
Locate = Callable[[str], "Path | None"]
"""Returns where the file of a name is read, or None if there is no such file."""


def write(files: Mapping[Path, Iterable[bytes | memoryview] | None]) -> None:
    """Write files so that all of them change or none does. Modes follow the umask.

    Args:
        files: For each path the contents in pieces, or None if the file is to be deleted. All are in one folder, which
            is created if it does not exist.

    Raises:
        FileError: If a file cannot be written. What was there before is then unchanged, or, if the error says so, the
            new files are in place, and only not yet flushed to disk or tidied up.
    """
    folder, *others = {path.parent for path in files}
    assert not others, "one save is for one folder"
    temporaries = {path: _temporary(path) for path, pieces in files.items() if pieces is not None}
    created, is_committed = set[Path](), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, LOCK_SECONDS) if len(files) > 1 else contextlib.nullcontext():
            if len(files) > 1:
                _finish(folder, [path.name for path in files])
            if blocked := next((path for path in files if path.is_dir()), None):
                raise IsADirectoryError(None, f"{blocked} is a directory")
            for path, temporary in temporaries.items():
                created.add(temporary)
                _write_pieces(temporary, files[path] or ())
            if len(files) > 1:
                journal = {path.name: temporaries[path].name if path in temporaries else None for path in files}
                created.add(draft := _temporary(folder / JOURNAL[1:]))
                _write_pieces(draft, [json.dumps(journal).encode()])
                os.replace(draft, folder / JOURNAL)
                is_committed = True
                created.clear()  # the temporary files belong to the save from here on
                sync_folder(folder)
                _finish(folder, [])
            else:
                for path, temporary in temporaries.items():
                    os.replace(temporary, path)
                    is_committed = True
                sync_folder(folder)
    except FileError:
        raise
    except (OSError, ValueError) as e:
        what = f"{', '.join(map(str, files))} cannot be written: {getattr(e, 'strerror', None) or e}"
        left = "what was there before is unchanged"
        if is_committed:
            left = "readers find the new files, but a power failure may bring back the old ones; save again"
        raise FileError(what, [left], SPACE) from e
    finally:
        for temporary in created:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink()


def read(folder: Path, names: Sequence[str], reader: Callable[[Locate], T]) -> T:
    """Read files of a folder so that all of them are of one save.

    Args:
        folder: The folder.
        names: The names of the files that the reader may want.
        reader: Reads the files. It is called again if one of them was replaced meanwhile.

    Returns:
        What the reader returns.
    """
    for _ in range(READ_ATTEMPTS):
        with contextlib.ExitStack() as handles:
            before = _located(folder, names, handles)
            try:
                value = reader(lambda name, before=before: before[name][0] if name in before else None)  # type: ignore[misc]
            except Exception:  # packages raise errors of all kinds when a file is replaced while they read it
                if _located(folder, names, handles) == before:
                    raise
                continue
            if _located(folder, names, handles) == before:
                return value
    raise FileError(f"{folder} is being written again and again", way_out="read it when no other process saves to it")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Create a file and yield its descriptor. The file is flushed to disk at the end, and deleted on an error."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield fd
        os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `path` at the end, and deleted on an error.

    It lies in a temporary folder beside `path`, next to the mark, which so is never in what is renamed. What a killed
    process has left in a temporary folder of this name is deleted first, if the mark says that it is one.

    Raises:
        FileError: A file, a link or somebody's folder has the name of the temporary folder, or the system refuses.
    """
    folder = path.with_name(UNFINISHED.format(path.name))
    mark, left = folder / MARK, ["nothing is left of it"]
    with system_errors(f"{path} cannot be written", left, SPACE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        is_ours = not folder.is_symlink() and folder.is_dir() and (mark.is_file() or not any(folder.iterdir()))
        if not is_ours:
            way_out = "move it away, or choose another directory to write"
            raise FileError(
                f"{folder} is not a temporary folder of lorainject, so nothing in it is deleted", way_out=way_out
            )
        with lock(folder, required=True):
            try:
                mark.touch()
                for stale in folder.iterdir():
                    if stale != mark:
                        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
                new = folder / path.name
                new.mkdir()
                yield new
                for inner in (new, *new.rglob("*")):
                    if inner.is_dir():
                        sync_folder(inner)
                os.replace(new, path)
                left[:] = ["it is complete, but a power failure may lose it"]
                sync_folder(path.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: Path, seconds: float = 0, *, required: bool = False) -> Iterator[None]:
    """Lock a folder against other processes and threads. The lock ends with the process if the process is killed.

    Args:
        folder: The folder.
        seconds: How long to wait for another writer.
        required: Raise if the file system has no locks. Otherwise go on without a lock.

    Raises:
        FileError: If another process or thread has the lock. On Windows nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fd, start = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start >= seconds:
                    what = f"another process is at work in {folder}" + f", for more than {seconds:g} s" * bool(seconds)
                    raise FileError(what, way_out="wait for it to end, or choose another directory") from None
                time.sleep(0.005)
            except OSError as e:  # a file system without locks
                if required:
                    way_out = "use a directory on a file system that has locks"
                    raise FileError(f"{folder} cannot be locked: {e.strerror}", way_out=way_out) from None
                break
        yield
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to disk, so that renames survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def _located(folder: Path, names: Sequence[str], handles: contextlib.ExitStack) -> dict[str, tuple[Path, int, int]]:
    """Return the path and identity of each file that exists.

    The files are held open in `handles`, because the system soon gives the number of a deleted file to a new one.
    """
    located, journal = {}, _journal(folder)
    for name in names:
        temporary = journal.get(name, name)
        for path in () if temporary is None else dict.fromkeys((folder / temporary, folder / name)):
            with contextlib.suppress(FileNotFoundError):
                located[name] = path, *_identity(path, handles)
                break
    return located


def _identity(path: Path, handles: contextlib.ExitStack) -> tuple[int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # without it, a pipe would block
    except FileNotFoundError:
        raise
    except OSError:  # the reader will report why the file cannot be read
        return 0, 0
    handles.callback(os.close, fd)
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def _journal(folder: Path) -> dict[str, str | None]:
    """Return the journal's entries, or none if there is no journal. Refuse foreign names, since they become paths."""
    path = folder / JOURNAL
    try:
        entries = json.loads(read_regular(path, MAX_JOURNAL))
        for name, temporary in entries.items():
            if not is_plain_name(name) or not (
                temporary is None or re.fullmatch(_temporary_pattern([name]), temporary)
            ):
                raise ValueError(f"{name!r}: {temporary!r}")
    except FileNotFoundError:
        return {}
    except (FileError, OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        way_out = f"delete {JOURNAL}, then check that the other files of the directory are complete"
        raise FileError(f"{path} is not the journal of a save: {e}", way_out=way_out) from e
    return dict(entries)


def _temporary_pattern(names: Sequence[str]) -> str:
    return rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{16}}\.tmp"


def _finish(folder: Path, names: Sequence[str]) -> None:
    """Finish the save that the journal describes, and delete the temporary files that killed writers have left."""
    for name, temporary in _journal(folder).items():
        if temporary is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # it was renamed before the writer was killed
                os.replace(folder / temporary, folder / name)
    if (folder / JOURNAL).exists():
        sync_folder(folder)
        (folder / JOURNAL).unlink()
    stale = _temporary_pattern([*names, JOURNAL[1:]])
    for path in folder.iterdir() if names else ():
        if re.fullmatch(stale, path.name):
            path.unlink()


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Create a file with these contents, flushed to disk."""
    pieces = list(pieces)
    with new_file(path) as fd:
        with contextlib.suppress(AttributeError, OSError):  # not every system can reserve the space, which saves time
            os.posix_fallocate(fd, 0, sum(map(len, pieces)))
        for i in range(0, len(pieces), MAX_PIECES):
            _write_all(fd, pieces[i : i + MAX_PIECES])


def _write_all(fd: int, pieces: list[bytes | memoryview]) -> None:
    """Write the pieces in as few calls as the system allows. The list is empty afterwards."""
    while pieces:
        together = hasattr(os, "writev") and sum(map(len, pieces)) <= MAX_BYTES  # Windows has no writev
        done = os.writev(fd, pieces) if together else os.write(fd, pieces[0])
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = memoryview(pieces[0])[done:]
