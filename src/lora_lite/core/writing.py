"""Files and folders written whole or not at all, and on the disk when the call returns.

What is being written stands beside its place as `.lora_lite-*.tmp`, locked for as long as its writer lives: whoever writes next
to it takes away those that are locked by nobody, which writers left that were killed.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import LoraLiteError

try:
    import fcntl
except ImportError:  # Windows has no such locks: what killed writers left stays there
    fcntl = None

BEGIN, END = ".lora_lite-", ".tmp"
REASONS = {
    errno.ENOSPC: ("the disk is full", "df -h {folder}"),
    errno.EDQUOT: ("the quota of the disk is used up", "df -h {folder}"),
    errno.ENAMETOOLONG: ("the name is too long", '"adapter.safetensors"'),
    errno.EACCES: ("the folder is not yours to write to", "ls -ld {folder}"),
    errno.EPERM: ("the folder is not yours to write to", "ls -ld {folder}"),
    errno.EROFS: ("the disk is read-only", "ls -ld {folder}"),
    errno.ENOTEMPTY: ("it exists", "ls {path}"),
    errno.EEXIST: ("it exists", "ls {path}"),
    errno.ENOTDIR: ("it exists", "ls {path}"),
}


BEFORE, AFTER = "What was there before is untouched.", "The new content is there, and may be gone after a power failure."


@contextlib.contextmanager
def named_errors(path: Path, state: str = BEFORE, done: str = "written") -> Iterator[None]:
    """OSErrors of the block become LoraLiteErrors that name the place."""
    try:
        yield
    except OSError as error:
        reason, fix = REASONS.get(error.errno or 0, (error.strerror or str(error), "ls -ld {folder}"))
        fix = fix.format(path=path, folder=path.parent)
        raise LoraLiteError(f"{path} was not {done}: {reason}.", expected=state, fix=fix) from error


def target(path: str | Path) -> Path:
    """The place itself, behind links. Raises LoraLiteError for one that cannot hold what is written."""
    path = Path(path)
    try:
        place = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise LoraLiteError(f"{str(path)!r} is no path: {error}.", fix='"adapter.safetensors"') from error
    if not place.parent.is_dir():
        raise LoraLiteError(f"{path}: the folder does not exist.", fix=f'Path("{place.parent}").mkdir(parents=True)')
    return place


def write_atomically(path: str | Path, content: bytes) -> None:
    """`path` holds the old content or the new, never a part, also where the process is killed or the machine fails.

    A link is followed, and mode and owner of a file that is there are kept. Raises LoraLiteError for a folder, a device, a
    pipe, and where the system refuses.
    """
    path = Path(path)
    with named_errors(path):
        if path.is_dir():
            raise LoraLiteError(f"{path} is a folder.", expected="A file name.", fix=f'"{path / "adapter.safetensors"}"')
        place = target(path)
        before = place.stat() if place.exists() else None
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise LoraLiteError(f"{path} is no regular file.", expected="A file, or no file yet.", fix='"adapter.safetensors"')
        clean(place.parent)
        mode = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o777
        with claimed(place.parent, lambda new: os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)) as (
            temporary,
            descriptor,
        ):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            if before is not None:
                keep(descriptor, before)
            os.fsync(descriptor)
            os.replace(temporary, place)
    with named_errors(path, AFTER):
        sync(place.parent)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that takes its name, with all that the block writes to it, where the block succeeds and is removed where not.

    Of several that make the same one, one wins. Raises LoraLiteError where the name is taken by more than an empty folder.
    """
    folder = Path(folder)
    place = target(folder)

    def make(new: str) -> int:
        os.mkdir(new)
        return os.open(new, os.O_RDONLY)

    clean(place.parent)
    with named_errors(folder), claimed(place.parent, make) as (temporary, _):
        yield temporary
        for inside, _, files in os.walk(temporary):
            for name in files:
                sync(Path(inside, name))
            sync(Path(inside))
        if os.name == "nt" and place.is_dir():  # elsewhere an empty folder is replaced, with no moment without one
            place.rmdir()
        os.rename(temporary, place)
    with named_errors(folder, AFTER):
        sync(place.parent)


@contextlib.contextmanager
def claimed(folder: Path, make: Callable[[str], int]) -> Iterator[tuple[Path, int]]:
    """(path, descriptor) of something new in the folder that nobody else takes for left over; gone after the block."""
    while True:
        temporary = folder / f"{BEGIN}{secrets.token_hex(8)}{END}"
        descriptor = make(str(temporary))
        if lock(descriptor, wait=True) and same(descriptor, temporary):
            break
        os.close(descriptor)  # taken away between the two
    try:
        yield temporary, descriptor
    finally:
        remove(temporary)
        os.close(descriptor)


def lock(descriptor: int, wait: bool = False) -> bool:
    """Whether nobody else holds it; a file system without locks says so to a writer, never to one that cleans."""
    if fcntl is None:
        return wait
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True


def same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def clean(folder: Path) -> None:
    """Take away what killed writers left in a folder; what it cannot read or take away stays."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        found = [name for name in os.listdir(folder) if name.startswith(BEGIN) and name.endswith(END)]
    for name in found if fcntl else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if lock(descriptor) and same(descriptor, folder / name):
                    remove(folder / name)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Whatever is there, if anything is."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def keep(descriptor: int, before: os.stat_result) -> None:
    """Mode and owner of the file that is replaced; of an owner whom only root may give, as much as is allowed."""
    if hasattr(os, "fchown"):
        now = os.fstat(descriptor)
        for owner, group in ((before.st_uid, before.st_gid), (-1, before.st_gid)):
            if (now.st_uid, now.st_gid) == (before.st_uid, before.st_gid):
                break
            with contextlib.suppress(OSError):
                os.fchown(descriptor, owner, group)
                break
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk; a system that cannot open folders, or sync them, does so by itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
