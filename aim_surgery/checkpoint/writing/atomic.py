"""Files that appear whole or not at all.

A file is written under a temporary name in the same folder, synced, and renamed: whoever reads sees
the old content or the new, whatever happens on the way, and of two writers the later one wins. What
a killed process leaves under a temporary name is removed by the next one that writes the same file:
a process holds a lock on what it writes, and the system lets go of it when it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aim_surgery.checkpoint.reading.kinds import files_of
from aim_surgery.errors import CheckpointError

_STALE_SECONDS = 60  # between being made and being locked, a file may look left behind


def check_target(path: str | Path) -> None:
    """Make sure, before long work, that a file can be written where its result will go.

    Args:
        path: The file to be written; it is not touched.

    Raises:
        CheckpointError: The folder is missing or can't be written, or `path` is no regular file.
    """
    _temporary_beside(_target(Path(path))).unlink()


def refuse_itself(checkpoint: str | Path, output: str | Path) -> None:
    """Make sure that a result does not take the place of a file that it is made of.

    Args:
        checkpoint: What is read: a file, an index of shards, a folder.
        output: What is to be written.

    Raises:
        CheckpointError: It is one of the checkpoint's files, by whatever name.
    """
    if _are_one(Path(checkpoint), Path(output)):
        raise CheckpointError(f"{output}: is the checkpoint itself: name another file")
    if any(_are_one(file, Path(output)) for file in files_of(Path(checkpoint))):
        raise CheckpointError(f"{output}: is a file of the checkpoint: name another")


def _are_one(first: Path, second: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return first.resolve() == second.resolve() or first.samefile(second)
    return False


@contextlib.contextmanager
def replacing(path: str | Path, nbytes: int = 0) -> Iterator[Path]:
    """Write a file atomically: under a temporary name in the same folder, then renamed.

    Args:
        path: The file to write or replace.
        nbytes: Room to set aside at once, so that a disk that is too full is known before the work.

    Yields:
        The temporary file to write to. It takes the place of `path` if the block ends well, and is
        removed if it doesn't.

    Raises:
        CheckpointError: The folder is missing or can't be written, or the disk is full.
    """
    target = _target(Path(path))
    _remove_stale(target)
    temporary = _temporary_beside(target)
    try:
        with _locked(temporary) as handle:
            if nbytes:
                _set_aside(handle, nbytes)
            yield temporary
            temporary.chmod(_mode_for(target))
            sync(temporary)
            temporary.replace(target)
    except OSError as err:
        raise CheckpointError(
            f"{path}: could not be written: {err.strerror or err}; the old file, if any, is still "
            f"there"
        ) from err
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the file is there; not every system can sync a folder
        sync(target.parent)


@contextlib.contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """A temporary folder next to a file, for several files that are then moved to their places.

    Args:
        path: The file.

    Yields:
        The folder; it is removed in any case.

    Raises:
        CheckpointError: It can't be made, or the disk is full.
    """
    target = _target(Path(path))
    _remove_stale(target)
    temporary = _temporary_beside(target, folder=True)
    try:
        with _locked(temporary):
            yield temporary
    except OSError as err:
        raise CheckpointError(
            f"{path}: could not be written: {err.strerror or err}; the old files, if any, are "
            f"still there"
        ) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _target(path: Path) -> Path:
    try:
        target = path.resolve()  # the file behind a link, not the link
        if target.exists() and not target.is_file():
            what = "a folder" if target.is_dir() else "no regular file"
            raise CheckpointError(f"{path}: is {what} already, and not replaced: name another")
    except (OSError, RuntimeError, ValueError) as err:
        raise CheckpointError(f"{path}: cannot be written: {err}") from err
    return target


def _temporary_beside(target: Path, *, folder: bool = False) -> Path:
    options = {"prefix": _prefix(target), "suffix": ".tmp", "dir": target.parent}
    try:
        if folder:
            return Path(tempfile.mkdtemp(**options))
        handle, name = tempfile.mkstemp(**options)
    except FileNotFoundError as err:
        raise CheckpointError(f"{target}: there is no folder {target.parent}; make it") from err
    except OSError as err:
        raise CheckpointError(
            f"{target}: folder {target.parent} cannot be written: {err.strerror or err}"
        ) from err
    os.close(handle)
    return Path(name)


def _prefix(target: Path) -> str:
    return f".{target.name[:80]}."


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # some file systems know no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    finally:
        os.close(handle)


def _remove_stale(target: Path) -> None:
    """Remove what killed processes left of this file."""
    with contextlib.suppress(OSError):
        for left in target.parent.iterdir():
            named = left.name.startswith(_prefix(target)) and left.name.endswith(".tmp")
            if named and _is_stale(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    if time.time() - path.stat().st_mtime < _STALE_SECONDS:
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # somebody is at it
    finally:
        os.close(handle)
    return True


def _set_aside(handle: int, nbytes: int) -> None:
    """Take the room for a file; where a system can't, writing will tell."""
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise


def _mode_for(target: Path) -> int:
    """Permissions of the old file, or of any new one; temporary files are for the owner alone."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask
