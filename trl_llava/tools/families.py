"""`trl-llava families`: the models that the stages know, and what runs on the fast path for each."""

import argparse
from collections.abc import Sequence

from trl_llava.models.families import table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; `argv` is the command line without the program's name."""
    parser = argparse.ArgumentParser(prog="trl-llava families", description="The models that the stages know.")
    parser.parse_args(argv)
    print(table())


if __name__ == "__main__":
    main()
