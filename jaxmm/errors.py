"""The errors that are the user's to mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave is wrong: a config key, a file, a prompt, a checkpoint.

    The message is one line that says what is wrong, where (file, key, record) and what to do. The command line
    prints it alone, without a traceback, and exits with code 2.
    """

    exit_code = 2


class RunError(RuntimeError):
    """A run that was rightly asked for cannot go on: its numbers are none, or its disk is full.

    The command line prints the message alone and exits with code 3.
    """

    exit_code = 3


class Stopped(Exception):
    """A run was asked to stop, has saved its step and ends; the same command resumes it."""

    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean ...?" with the known word nearest to `word`, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
