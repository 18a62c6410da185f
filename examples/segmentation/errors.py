"""What a user can put right: ``train.py`` prints the message and no traceback."""


class UserError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


class DataError(UserError):
    """A data set, picture or label that is not as expected."""


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


class DamagedError(CheckpointError):
    """A file that is no complete checkpoint."""
