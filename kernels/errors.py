"""The one exception that a command turns into a single line and exit code 2."""


class UserError(Exception):
    """Input, files or options of the user's are at fault; the message names the culprit."""
