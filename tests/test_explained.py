"""Bad input at an entry point: one message that says what to do, exit status 1 (2: the recipe), and no traceback."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from test_entry_points import QUESTION, QUICK, Work, answer
from tqdm import tqdm

from trl_llava import train_sft
from trl_llava.data.contract import RowError
from trl_llava.errors import ExplainedError, InputError, MissingPackageError, NotFoundError, OccupiedError, RecipeError
from trl_llava.health import UnhealthyRunError
from trl_llava.models import load as models
from trl_llava.run.console import run_as_program
from trl_llava.run.output_dir import OutputDirError


@pytest.fixture(scope="module")
def work(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("explained"), tiny_llava_dir)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], Any]], tuple[int, str]]:
    """Runs an entry point as a program; gives its exit status and last words."""

    def run(main: Callable[[], Any]) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_as_program(main)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return int(ended.value.code or 0), line

    return run


def not_a_number(completions: list[Any], **columns: Any) -> list[float]:
    """A reward function that divides by zero."""
    return [float("nan")] * len(completions)


def test_each_explained_error_is_still_what_it_was() -> None:
    for kind in (InputError, RecipeError, OutputDirError, RowError):
        assert issubclass(kind, ExplainedError) and issubclass(kind, ValueError)
    assert issubclass(NotFoundError, ExplainedError) and issubclass(NotFoundError, OSError)
    assert issubclass(OccupiedError, ExplainedError) and issubclass(OccupiedError, FileExistsError)
    assert issubclass(MissingPackageError, ExplainedError) and issubclass(MissingPackageError, ImportError)
    assert issubclass(UnhealthyRunError, ExplainedError) and issubclass(UnhealthyRunError, RuntimeError)


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError("a fault"), ImportError("a fault"), KeyError("x")])
def test_a_fault_keeps_its_traceback(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_as_program(fail)


def test_it_has_a_line_of_its_own_behind_a_progress_bar(said: Any) -> None:
    bars = []

    def fail() -> None:
        bars.append(tqdm(total=4, disable=False))
        bars[0].update(1)
        raise InputError("no room")

    assert said(fail) == (1, "error: no room") and bars[0].n == 1


def test_text_only_model(work: Work, tiny_llama_dir: Path, said: Any) -> None:
    status, line = said(lambda: work.sft("none", "--model_name_or_path", str(tiny_llama_dir)))
    assert status == 1
    assert "is a text-only model. Choose an image-text model" in line


def test_model_that_does_not_exist(work: Work, said: Any) -> None:
    status, line = said(lambda: work.sft("none", "--model_name_or_path", "nobody/no-such-model"))
    assert status == 1
    assert line.startswith("error: model_name_or_path: cannot load 'nobody/no-such-model' (revision main). Expected")
    assert not list((work.folder / "none").iterdir())  # the next try finds an empty folder


def without_network(*words: str, home: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs Python where the Hub is a port that nobody listens at, and nothing says that this is offline mode."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "NO_PROXY": "*"}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return result, time.monotonic() - start


def test_without_network_a_model_is_asked_for_once(tmp_path: Path) -> None:
    """Five retries for each file, as the libraries do by themselves, take 23 seconds here."""
    call = "from trl_llava.hub.lookup import check_there; check_there('sft_model_path', 'nobody/no-such-model')"
    result, seconds = without_network("-c", call, home=tmp_path)
    message = result.stderr.splitlines()[-1]
    assert "NotFoundError: sft_model_path: cannot load 'nobody/no-such-model'" in message
    assert "Connection refused" in message and "Retrying" not in result.stderr
    assert seconds < 15


@pytest.mark.slow
def test_without_network_the_program_ends_soon(work: Work, tmp_path: Path) -> None:
    words = work.words("sft", "offline", "--model_name_or_path", "nobody/no-such-model")
    result, seconds = without_network("-m", "trl_llava.train_sft", *words, home=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "Retrying" not in result.stderr
    assert "error: model_name_or_path: cannot load 'nobody/no-such-model'" in result.stderr
    assert seconds < 60


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_adapter_that_does_not_exist(work: Work, said: Any, stage: str) -> None:
    status, line = said(lambda: getattr(work, stage)("none", "--adapter_name_or_path", "nobody/no-such-adapter"))
    assert status == 1
    assert ": cannot load 'nobody/no-such-adapter'" in line


@pytest.mark.parametrize("field", ["sft_model_path", "reward_model_path", "value_model_path"])
def test_role_of_ppo_that_does_not_exist(work: Work, said: Any, field: str) -> None:
    start = ["--model_name_or_path", str(work.base), "--length_coef", "-1", f"--{field}", "nobody/no-such-model"]
    status, line = said(lambda: work.ppo("none", *start))
    assert status == 1
    assert line.startswith(f"error: {field}: cannot load 'nobody/no-such-model'")


@pytest.mark.parametrize("name", ["nobody/no-such-data", "no/such/file.json", "/no/such/folder"])
def test_data_set_that_does_not_exist(work: Work, said: Any, name: str) -> None:
    status, line = said(lambda: work.sft("none", "--dataset_name", name))
    assert status == 1
    assert name in line and "Expected a Hub ID, a file or a folder" in line


def test_adapter_for_another_base(work: Work, said: Any, tmp_path: Path) -> None:
    work.sft("policy", "--use_peft", "--lora_r", "2", "--max_steps", "1")
    policy = work.folder / "policy"
    other = tiny_models.tiny_llava_next(tmp_path / "next")
    config = json.loads((policy / "adapter_config.json").read_text())
    (policy / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    status, line = said(
        lambda: work.sft("none", "--adapter_name_or_path", str(policy), "--model_name_or_path", str(other))
    )
    assert status == 1
    assert "does not fit model" in line and "Load it on that base" in line


def test_reward_model_without_prompt(work: Work, said: Any) -> None:
    start = ["--model_name_or_path", str(work.base), "--reward_model_path", str(work.base)]
    status, line = said(lambda: work.ppo("none", *start))
    assert status == 1
    assert "has no factual_reward.json" in line


def test_reward_model_without_head(work: Work, said: Any, tmp_path: Path) -> None:
    headless = tiny_models.tiny_llava(tmp_path / "headless")
    settings = {"format_version": 1, "judging_prompt": None, "base_model_revision": None}
    (headless / "factual_reward.json").write_text(json.dumps(settings))
    start = ["--model_name_or_path", str(work.base), "--reward_model_path", str(headless)]
    status, line = said(lambda: work.ppo("none", *start))
    assert status == 1
    assert "has no score head" in line


def test_value_model_of_another_family(work: Work, said: Any, tmp_path: Path) -> None:
    other = tiny_models.tiny_llava_next(tmp_path / "next", vocab_size=640)
    start = ["--model_name_or_path", str(work.base), "--value_model_path", str(other), "--length_coef", "-1"]
    status, line = said(lambda: work.ppo("none", *start))
    assert status == 1
    assert "policy and value model (value_model_path) do not fit together" in line


def test_missing_bitsandbytes(work: Work, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a)
    )
    status, line = said(lambda: work.sft("none", "--load_in_8bit", "--use_peft", "--dtype", "bfloat16"))
    assert status == 1
    assert "load_in_8bit needs bitsandbytes" in line


def test_missing_torchvision(work: Work, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_it(*args: Any, **kwargs: Any) -> None:
        raise ImportError("LlavaOnevisionVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", needs_it)
    status, line = said(lambda: work.sft("none"))
    assert status == 1
    assert "trl-llava[vlm]" in line


def test_fewer_rows_than_a_batch(work: Work, said: Any) -> None:
    start = ["--model_name_or_path", str(work.base), "--value_init", "policy", "--length_coef", "-1"]
    status, line = said(lambda: work.ppo("none", *start, "--per_device_train_batch_size", "8"))
    assert status == 2
    assert "a step takes 8 prompts, and there are 6: lower" in line


def test_reward_that_is_no_number(work: Work, said: Any, tmp_path: Path) -> None:
    start = ["--model_name_or_path", str(work.base), "--value_init", "policy", "--use_peft", "--lora_r", "2"]
    function = "test_explained:not_a_number"
    status, line = said(lambda: work.ppo("nan", *start, "--reward_funcs", function))
    assert status == 1
    assert "not_a_number" in line and "is not finite at step 1" in line


def test_missing_caption_and_missing_image(work: Work, said: Any) -> None:
    status, line = said(lambda: work.reward("none", rows="plain"))
    assert status == 1 and "plain.json[0]" in line and "caption" in line
    work.write("gone", [{"images": ["gone.png"], "prompt": QUESTION, "completion": answer("a square")}])
    status, line = said(lambda: train_sft.main(work.words("gone", "none", "--model_name_or_path", str(work.base))))
    assert status == 1 and "gone.json[0]" in line and "gone.png" in line


@pytest.mark.parametrize("workers", ["0", "1"])
def test_picture_found_damaged_when_its_batch_is_made(work: Work, said: Any, workers: str) -> None:
    """With on_bad_row `error` the headers are read before training, and the pictures with their batches."""
    tiny_models.image().save(work.folder / "cut.jpg")
    (work.folder / "cut.jpg").write_bytes((work.folder / "cut.jpg").read_bytes()[:-24])
    work.write("cut", [{"images": ["cut.jpg"], "prompt": QUESTION, "completion": answer("a square")}])
    words = work.words("cut", f"cut{workers}", "--model_name_or_path", str(work.base))
    status, line = said(lambda: train_sft.main([*words, "--dataloader_num_workers", workers]))
    assert status == 1
    assert line.startswith("error: cut.json[0]: the image ") and "cut.jpg cannot be read (" in line
    assert line.endswith("Replace the file; on_bad_row `skip` leaves such rows out.")


def test_what_a_library_finds_wrong_with_a_field_names_it(work: Work, said: Any) -> None:
    wrong = ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"nonsense": 1}']
    status, line = said(lambda: work.sft("kwargs", *wrong))
    assert status == 1
    assert "`gradient_checkpointing_kwargs: " in line and "ValueError: Unexpected keyword arguments: nonsense" in line


def test_the_recipe_itself_is_status_2(work: Work, said: Any) -> None:
    assert said(lambda: work.sft("none", "--max_length", "0"))[0] == 2
    assert said(lambda: train_sft.main([*QUICK, "--learning_rte", "1"]))[0] == 2
    (work.folder / "taken").mkdir()
    (work.folder / "taken" / "thesis.txt").write_text("precious")
    status, line = said(lambda: work.sft("taken"))
    assert status == 2 and "is not empty and no run of trl_llava" in line
