"""Damage to a checkpoint is found and named."""

import json
from pathlib import Path

import pytest

from trl_llava.run.manifest import MANIFEST, DamagedCheckpointError, check_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "value_model").mkdir()
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "value_model" / "weights").write_bytes(bytes(3_000_000))
    write_manifest(tmp_path)
    return tmp_path


def test_the_manifest_has_size_and_hash_of_every_file(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted(files) == ["value_model/weights", "weights"]
    assert files["weights"] == {
        "size": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    (checkpoint / "notes.txt").write_text("a file of the user's")
    check_manifest(checkpoint)


def test_each_kind_of_damage_is_named(checkpoint: Path) -> None:
    inner, manifest = checkpoint / "value_model" / "weights", (checkpoint / MANIFEST).read_text()

    def problem() -> str:
        with pytest.raises(DamagedCheckpointError) as error:
            check_manifest(checkpoint)
        return str(error.value).removeprefix(f"checkpoint {checkpoint} is damaged: ")

    inner.write_bytes(bytes(2_999_999))
    assert problem() == "value_model/weights: expected 3000000 bytes, found 2999999"
    inner.write_bytes(bytes(2_999_999) + b"x")
    assert problem().startswith("value_model/weights: expected SHA-256 ")
    inner.unlink()
    assert problem() == "value_model/weights: expected 3000000 bytes, found no such file"
    inner.write_bytes(bytes(3_000_000))
    check_manifest(checkpoint)
    for text in (manifest[:50], "{}", '{"files": {"weights": 3}}', '{"files": []}'):
        (checkpoint / MANIFEST).write_text(text)
        assert problem().startswith("manifest.json: expected the hashes of its files, found something unreadable")
    (checkpoint / MANIFEST).unlink()
    assert problem().startswith("manifest.json: expected the hashes of its files, found no such file")
