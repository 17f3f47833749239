"""Make text of unknown origin, such as names of files and classes, fit to be shown."""

from collections.abc import Iterable
from difflib import get_close_matches


def plain(text: object) -> str:
    """``text`` on one line of printable characters; others are escaped as in Python.

    So no name can move a terminal's cursor or break a table. A byte of a file name that is not
    UTF-8 is shown as ``\\xff``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    undecodable = "\udc80" <= character <= "\udcff"  # os.fsdecode's form of such a byte
    text = chr(ord(character) - 0xDC00) if undecodable else character
    return text.encode("unicode_escape").decode()


def lines(text: str) -> str:
    """``plain`` of each line of ``text``."""
    return "\n".join(map(plain, text.split("\n")))


def caption(text: object) -> str:
    """``plain`` of each line of a text, in a form that matplotlib draws literally.

    matplotlib would read a formula between dollars, and omit a legend entry that begins with _.
    """
    shown = lines(str(text)).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: similar known words, if there are any."""
    close = get_close_matches(word, known)
    return f": did you mean {' or '.join(close)}?" if close else ""
