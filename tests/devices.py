"""Which devices the tests compute on."""

import argparse
import os
from collections.abc import Sequence


def hidden(words: Sequence[str]) -> dict[str, str]:
    """The environment that hides the GPUs from tests, unless pytest's command line is `-m gpu`.

    The default tests compare with numbers of the CPU. Workers and subprocesses inherit what their parent sees.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    wants_gpu = parser.parse_known_args(words)[0].m == "gpu"
    return {} if wants_gpu or "PYTEST_XDIST_WORKER" in os.environ else {"CUDA_VISIBLE_DEVICES": ""}
