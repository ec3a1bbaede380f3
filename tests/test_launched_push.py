"""A run of two processes goes to the Hub once, from its first process; the other neither pushes nor waits for ever."""

import json
from pathlib import Path

import hub_server
import pytest
from stage_runs import BACKENDS, end_of, run_words, start, write_rows

pytestmark = pytest.mark.xdist_group("launched")


def test_two_processes_push_as_one(tiny_llava_dir: Path, tmp_path: Path, hub: hub_server.Hub) -> None:
    """Twice: to a Hub that works, then to one that takes no commit."""
    write_rows(tmp_path)
    hub.fail("POST", r"/api/models/tester/lost/commit/", times=10_000, status=403)
    plan = []
    for name in ("kept", "lost"):
        push = ["--push_to_hub", "--hub_model_id", name, "--hub_always_push"]
        plan.append(("sft", run_words(tmp_path, tiny_llava_dir, tmp_path / name, "sft", 2, *push)))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    online = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": hub_server.WRITE_TOKEN, "HF_HOME": str(tmp_path / "home")}
    process = start(
        tmp_path, BACKENDS["ddp"], 2, "launched_stages.py", str(tmp_path / "plan.json"), environment=online
    )
    status, _, errors, seconds = end_of(process, since="but tester/lost did not take it")

    kept = hub.repos["models", "tester/kept"]
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert kept.titles == ["added", *steps, "End of training"]
    assert sorted(kept.tags) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert "adapter_model.safetensors" in kept.at("main")[1]

    assert status == 1 and seconds < 20, errors[-3000:]
    assert errors.count("Pushing to tester/lost failed") == 1
    said = errors.index("error (process 0 of 2): the run is whole in")
    assert "Traceback" not in errors[:said]
    assert (tmp_path / "lost" / "sft" / "adapter_model.safetensors").is_file()
