"""Which devices the tests compute on."""

import argparse
import os
from collections.abc import Sequence


def hidden(words: Sequence[str]) -> dict[str, str]:
    """The environment that hides GPUs from tests: all, or all but the first if pytest's command line is `-m gpu`.

    The default tests compare with numbers of the CPU, and a trainer shares its batches out over all GPUs that it sees.
    Workers and subprocesses inherit what their parent sees.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    wants_gpu = parser.parse_known_args(words)[0].m == "gpu"
    if "PYTEST_XDIST_WORKER" in os.environ:
        return {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": first if wants_gpu else ""}
