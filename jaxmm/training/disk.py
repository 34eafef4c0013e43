"""The workdir of a run: one run at a time writes to it, and what the disk refuses is told in one line."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxmm.checkpoints import saved_steps
from jaxmm.errors import InputError, RunError

_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENODEV", "ESTALE")
_CAUSES = {getattr(errno, name): os.strerror(getattr(errno, name)) for name in _REFUSALS}


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Make the workdir and hold it for this run; the system lets it go when the process ends, however it ends.

    Raises:
      InputError: if another process trains there, or it cannot be written to.
    """
    if jax.process_index() > 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise InputError(f"cannot write to {workdir}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process trains in {workdir}: end it, or take another --workdir") from error
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Translate what the disk refuses: full, read-only, no permission.

    Such an error comes as an OSError, as the cause of another one, or, from TensorStore, as the text of a ValueError;
    at the call that failed, or at the next save or wait if it befell the thread that writes.

    Raises:
      RunError: one line with the workdir, the cause and the step from which the run goes on.
    """
    try:
        yield
    except Exception as error:
        cause = _refusal(error, workdir)
        if cause is None:
            if isinstance(error, (InputError, RunError)) or str(workdir.absolute()) not in str(error):
                raise
            cause = _ask(workdir) or str(error).splitlines()[0][:200]
        steps = saved_steps(workdir)
        last = f"step {steps[-1]} is intact and the same command goes on from there" if steps else "no step is saved"
        raise RunError(f"cannot write to {workdir}: {cause}; {last}") from error


def _refusal(error: BaseException, workdir: Path) -> str | None:
    """What the disk said, or None if the error is another one."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in _CAUSES:
            return _CAUSES[error.errno] if _within(error.filename, workdir) else None
        for cause in _CAUSES.values():
            if not isinstance(error, OSError) and cause in str(error):
                return cause
        error = error.__cause__ or error.__context__
    return None


def _ask(workdir: Path) -> str | None:
    """What the disk says to another file, of 1 MiB; TensorStore may raise but a consequence of what it said before."""
    path = workdir / f".probe.{os.getpid()}"
    try:
        path.write_bytes(bytes(2**20))
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _within(filename: str | bytes | int | None, workdir: Path) -> bool:
    """A write to an open file has no name; then it is one of ours: what a run reads is reported where it is read."""
    if not isinstance(filename, (str, bytes, os.PathLike)):
        return True
    return Path(os.fsdecode(filename)).absolute().is_relative_to(workdir.absolute())
