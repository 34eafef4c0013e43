"""The errors that are the user's to mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave is wrong: a config key, a file, a prompt, a checkpoint.

    The message is one line that says what is wrong, where (file, key, record) and what to do. The command line
    prints it alone, without a traceback, and exits with code 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean ...?" with the known word nearest to `word`, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
