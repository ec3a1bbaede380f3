"""Damage to a checkpoint is found and named."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trl_llava.run.manifest import MANIFEST, DamagedCheckpointError, check_manifest, write_manifest

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "value_model").mkdir()
    (tmp_path / "weights").write_bytes(b"abc")
    save_file({"score.weight": torch.zeros(750_000)}, tmp_path / "value_model" / "model.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(bytes(3_000_000))
    write_manifest(tmp_path)
    return tmp_path


def problem(checkpoint: Path) -> str:
    with pytest.raises(DamagedCheckpointError) as error:
        check_manifest(checkpoint)
    return str(error.value).removeprefix(f"checkpoint {checkpoint} is damaged: ")


def test_the_manifest_has_every_size_and_reads_no_large_file_whole(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    large = checkpoint / "value_model" / "model.safetensors"
    header = large.read_bytes()[: -4 * 750_000]
    assert files == {
        "optimizer.pt": {"size": 3_000_000},
        "value_model/model.safetensors": {
            "size": large.stat().st_size,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        },
        "weights": {"size": 3, "sha256": ABC},
    }
    (checkpoint / "notes.txt").write_text("a file of the user's")
    check_manifest(checkpoint)


def test_each_kind_of_damage_is_named(checkpoint: Path) -> None:
    inner, manifest = checkpoint / "value_model" / "model.safetensors", (checkpoint / MANIFEST).read_text()
    content = inner.read_bytes()
    name, size = "value_model/model.safetensors", len(content)
    inner.write_bytes(content[:-1])
    assert problem(checkpoint) == f"{name}: expected {size} bytes, found {size - 1}"
    inner.write_bytes(content.replace(b"score", b"scare", 1))
    assert problem(checkpoint).startswith(f"{name}: expected its header with SHA-256 ")
    inner.write_bytes(bytes(size))
    assert problem(checkpoint).startswith(f"{name}: expected its header with SHA-256 ")
    inner.unlink()
    assert problem(checkpoint) == f"{name}: expected {size} bytes, found no such file"
    inner.write_bytes(content)
    check_manifest(checkpoint)
    (checkpoint / "weights").write_bytes(b"abd")
    assert problem(checkpoint).startswith(f"weights: expected SHA-256 {ABC[:16]}..., found ")
    for text in (manifest[:50], "{}", '{"files": {"weights": 3}}', '{"files": []}'):
        (checkpoint / MANIFEST).write_text(text)
        assert problem(checkpoint).startswith("manifest.json: expected a description of its files, found something")
    (checkpoint / MANIFEST).unlink()
    assert problem(checkpoint).startswith("manifest.json: expected a description of its files, found no such file")


def test_a_manifest_of_an_earlier_version_with_the_hash_of_every_file(checkpoint: Path) -> None:
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}))
    check_manifest(checkpoint)
    (checkpoint / "weights").write_bytes(b"abd")
    assert problem(checkpoint).startswith("weights: expected SHA-256")
    (checkpoint / "weights").write_bytes(b"abc")
    (checkpoint / "optimizer.pt").write_bytes(bytes(2_999_999))
    assert problem(checkpoint) == "optimizer.pt: expected 3000000 bytes, found 2999999"
