"""The one exception that a command turns into a single line and exit code 2, and errors put into one line."""

import re

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(Exception):
    """Input, files or options of the user's are at fault; the message names the culprit."""


def printable(text: str) -> str:
    """A text that stays in its line and does nothing to a terminal, as names in files of others may: their control
    characters are written as Python escapes them."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """The same of a text whose lines are its own."""
    return "\n".join(map(printable, text.split("\n")))


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows below its first line; of a list that it announces, the first."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.rstrip().endswith(":") and more:
        return f"{first.rstrip()} {more[0].strip().rstrip(',')}{', ...' if len(more) > 1 else ''}"
    return first
