"""Errors a user can act on. Each message names what was wrong and what would be right."""


class BitDanceError(ValueError):
    """Bad input: a prompt, a size, a setting or a file."""


class MissingFileError(BitDanceError, FileNotFoundError):
    """A file or a folder that should be there is not."""

    def __str__(self) -> str:  # OSError would print only its own fields
        return str(self.args[0])


class Cancelled(Exception):
    """The caller's `cancel` hook asked to stop. Nothing is kept."""
