"""Text files of other programs, a record a line."""


def lines(text: str) -> list[str]:
    r"""The lines of `text`, which end at \n or \r\n and nowhere else; the last one needs no end.

    `str.splitlines` also ends them at \x0b, \x0c, \x1c to \x1e, \x85, U+2028 and U+2029, which JSON and prose may hold.
    """
    found = text.replace("\r\n", "\n").split("\n")
    return found if found[-1] else found[:-1]
