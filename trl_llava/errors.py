"""The errors that explain themselves: an entry point prints their message, and no traceback.

Each is raised for something that a user can change: a recipe, a model, a file, a row. Anything else is a fault, and
keeps its traceback.
"""


class ExplainedError(Exception):
    """An error whose message says what was expected, what was found, and what to do.

    Attributes:
        exit_status: That of the entry point: 1, or 2 if the recipe or command line cannot be used.
    """

    exit_status = 1

    def __str__(self) -> str:
        return own_words(type(self), super().__str__())


def own_words(kind: type[Exception], message: str) -> str:
    """An error's own message, also where a `DataLoader` has raised it anew from the text of its worker's traceback."""
    last_line = f"\n{kind.__module__}.{kind.__qualname__}: "
    if message.startswith(f"Caught {kind.__name__} in DataLoader worker process") and last_line in message:
        return message.rpartition(last_line)[2].rstrip()
    return message


class InputError(ExplainedError, ValueError):
    """A model, adapter, file or setting that cannot be used, or parts that do not fit together."""


class NotFoundError(ExplainedError, FileNotFoundError):
    """A model, data set or file that is neither here nor on the Hub."""


class OccupiedError(ExplainedError, FileExistsError):
    """A place to write to that already holds something."""


class MissingPackageError(ExplainedError, ImportError):
    """An optional package that this needs."""


class RecipeError(InputError):
    """A recipe, or a command line, that cannot be used as it is."""

    exit_status = 2
