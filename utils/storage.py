"""Files that are replaced in one step, put aside, or held: what a kill, a full disk or a second run may not break."""

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

log = logging.getLogger(__name__)

# What crashed runs, editors, desktops and network file systems leave behind: nobody's results.
LEFTOVERS = (".*", "*.tmp", "*~", "Thumbs.db", "desktop.ini", "slurm-*.out")


def expanded(path: Path | str) -> Path:
    """With "~" as the home it names. Raises UserError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}': there is no such home folder. Write the path out") from None


def replace_file(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Replace a file by what `content(file)` writes, in one step: a kill leaves the old one or the new one.

    The temporary name is new and no link is followed; it goes away where the disk is full.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # temporary files are private otherwise
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a renaming last, where the platform can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def put_aside(path: Path, why: str) -> None:
    """Rename a damaged file, and say so: name.damaged, name.damaged2, ..."""
    for number in range(1, 1000):
        other = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not os.path.lexists(other):
            path.rename(other)
            log.warning("'%s' is damaged (%s): put aside as %s", path, why, other.name)
            return


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process's while the block runs; the kernel lets go of it, however the process ends.

    Raises UserError naming who holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on every platform
        yield
        return
    # Not truncated: it names the holder. Locks of this kind are not handed on to loader processes.
    with open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them depends on the system
            raise UserError(
                f"'{folder}' is in use by {_holder(file.read())}. Wait for it, stop it, or choose another folder with "
                "--output DIR"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("'%s' cannot be locked (%s): do not start a second run in it", folder, error.strerror)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        found: Any = json.loads(text)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
