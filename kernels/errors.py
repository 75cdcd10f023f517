"""The one exception that a command turns into a single line and exit code 2, and errors put into one line."""


class UserError(Exception):
    """Input, files or options of the user's are at fault; the message names the culprit."""


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows below its first line; of a list that it announces, the first."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.rstrip().endswith(":") and more:
        return f"{first.rstrip()} {more[0].strip().rstrip(',')}{', ...' if len(more) > 1 else ''}"
    return first
