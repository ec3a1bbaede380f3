"""The errors that explain themselves: an entry point prints their message, and no traceback.

Each is raised for something that a user can change: a recipe, a model, a file, a row. Anything else is a fault, and
keeps its traceback.
"""


class ExplainedError(Exception):
    """An error whose message says what was expected, what was found, and what to do.

    Attributes:
        exit_status: With what an entry point ends: 1, or 2 if the recipe or command line cannot be used.
    """

    exit_status = 1


class InputError(ExplainedError, ValueError):
    """A model, adapter, file or setting that cannot be used, or parts that do not fit together."""


class NotFoundError(ExplainedError, FileNotFoundError):
    """A model, data set or file that is neither here nor on the Hub."""


class OccupiedError(ExplainedError, FileExistsError):
    """A place to write to that already holds something."""


class MissingPackageError(ExplainedError, ImportError):
    """An optional package that this needs."""
