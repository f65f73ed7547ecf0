"""Splitting text files into lines, with one record per line."""


def lines(text: str) -> list[str]:
    r"""The lines of `text`. Only \n and \r\n end a line; the last line may lack its end.

    `str.splitlines` would also split at \x0b, \x0c, \x1c to \x1e, \x85, U+2028 and U+2029, which may occur inside a
    record.
    """
    found = text.replace("\r\n", "\n").split("\n")
    return found if found[-1] else found[:-1]
