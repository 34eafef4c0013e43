"""Disks that run full: a small tmpfs where it can be mounted, and otherwise a quota on the size of a file."""

import contextlib
import ctypes
import os
import resource
import subprocess


class Quota:
    """No file may grow beyond a size. The limit is this process's, so that it works for every user."""

    cause = "File too large"

    def __init__(self, folder):
        self.folder = folder
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left):
        """From now on a file has at most `left` bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, self._before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class Tmpfs:
    """A file system of 4 MiB."""

    cause = "No space left on device"

    def __init__(self, folder):
        self.folder = folder / "disk"
        self.folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=4m", "none", self.folder)

    def fill(self, left):
        """Leave `left` bytes."""
        status = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - left))

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(kind, folder):
    """A disk that can be filled; where tmpfs cannot be mounted, the quota."""
    try:
        disk = kind(folder)
    except OSError:
        disk = Quota(folder)
    try:
        yield disk
    finally:
        disk.free()
        if isinstance(disk, Tmpfs):
            subprocess.run(["umount", "--lazy", disk.folder], check=True)


def mount(*arguments):
    """Raises OSError where that is not allowed."""
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.decode()) from error


def without_override():
    """For a process to be started: permission bits hold for it as for any user, also if it is root's."""
    drop, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)
