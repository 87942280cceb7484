"""The one exception users see: a clear line and exit code 2."""


class UserError(ValueError):
    """The request can't be met; the message names what is wrong and what would be right, in one line."""
