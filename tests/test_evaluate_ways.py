"""Evaluation commands on models in 4 bit, from the Hub and merged; stopped half-way; and what they refuse."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny_models
import tiny_trainers
from datasets import Dataset, Features, Image, Value
from transformers import AutoProcessor, pipeline

from trl_llava import cli
from trl_llava.configs.stages import LlavaModelConfig
from trl_llava.data.load import load_rows
from trl_llava.models.load import load_sequence_classifier
from trl_llava.prompts import JudgingPrompt
from trl_llava.rewards.factual_reward import FactualReward
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel, Generated

ROW = {"image": "red.png", "question": "What is in the picture?"}


def write_rows(folder: Path, count: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    tiny_models.image("red").save(folder / "red.png")
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps({**ROW, "answer": "a square"}) + "\n" for _ in range(count)))
    return path


def completions(path: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def adapter(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_trainers.make_adapter(tiny_llava_dir, tmp_path_factory.mktemp("run"))
    AutoProcessor.from_pretrained(tiny_llava_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reward"
    model = load_sequence_classifier(str(tiny_llava_dir), LlavaModelConfig(dtype="float32"), seed=1)
    prompt = JudgingPrompt(with_captions=False)
    FactualReward(model, AutoProcessor.from_pretrained(tiny_llava_dir), prompt).save_pretrained(folder)
    return folder


def test_all_commands_run_in_4_bit(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    data, more = write_rows(tmp_path), ["--load_in_4bit", "--max_new_tokens", "5"]
    model = EvaluationModel.load(str(adapter), load_in_4bit=True)
    small = [name for name, part in model.model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert small and all("language_model" in name for name in small)
    expected = [generated.text for generated in model.complete(load_rows(data, "prompt"), Decoding(5))]
    output = tmp_path / "out.jsonl"
    assert cli.main(["generate", "--model", str(adapter), "--data", str(data), "--output", str(output), *more]) == 0
    assert completions(output) == expected
    words = ["eval", "--model", str(adapter), "--tasks", str(data), "--output_dir", str(tmp_path / "eval")]
    assert cli.main([*words, *more]) == 0
    lines = (tmp_path / "eval" / "answers" / "own.jsonl").read_text().splitlines()
    assert [json.loads(line)["answers"][adapter.name]["text"] for line in lines] == expected
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ROW['question']}\n"))
    assert cli.main(["chat", "--model", str(adapter), "--image", str(tmp_path / "red.png"), *more]) == 0
    assert capsys.readouterr().out.strip() == expected[0]


def test_a_merged_model_answers_in_transformers_pipeline(adapter: Path, tmp_path: Path) -> None:
    """The line of docs/evaluation.md."""
    assert cli.main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    ask = pipeline("image-text-to-text", model=str(tmp_path / "merged"))
    question = [{"type": "image", "image": tiny_models.image("red")}, {"type": "text", "text": ROW["question"]}]
    (said,) = ask(text=[{"role": "user", "content": question}], max_new_tokens=5, do_sample=False)
    answer = said["generated_text"][-1]["content"]
    model = EvaluationModel.load(str(tmp_path / "merged"))
    (expected,) = model.complete(load_rows(write_rows(tmp_path, 1), "prompt"), Decoding(5))
    assert answer.strip() == expected.text


# --- the Hub -------------------------------------------------------------------------------------------------------


def test_generate_with_a_revision_of_a_model_on_the_hub(
    hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    repo = hub.add("org/tiny", tiny_llava_dir)
    repo.tags["v1"] = repo.branches["main"]
    repo.commit({"config.json": b"broken"}, title="newer")
    data, output = write_rows(tmp_path), tmp_path / "out.jsonl"
    words = ["generate", "--data", str(data), "--output", str(output), "--max_new_tokens", "5", "--model"]
    assert cli.main([*words, "org/tiny@v1"]) == 0
    model = EvaluationModel.load(str(tiny_llava_dir))
    expected = [generated.text for generated in model.complete(load_rows(data, "prompt"), Decoding(5))]
    assert completions(output) == expected


def test_generate_says_in_one_line_that_the_hub_has_no_such_model(
    hub: hub_server.Hub, tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/tiny", tiny_llava_dir)
    for name in ("org/none", "org/tiny@v9"):
        words = ["generate", "--model", name, "--data", str(write_rows(tmp_path)), "--output", f"{tmp_path}/out.jsonl"]
        assert cli.main(words) == 1
        error = capsys.readouterr().err
        assert f"cannot load '{name.partition('@')[0]}'" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out.jsonl*"))


def test_eval_reward_reads_a_benchmark_from_the_hub(
    hub: hub_server.Hub, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    texts = dict.fromkeys(("ID", "Category", "Text", "Output1", "Output2", "Better"), Value("string"))
    one = {"Text": "What?", "Output1": "A dog.", "Output2": "A cat.", "Image": tiny_models.image("red")}
    rows = [
        {**one, "ID": "pairs_1", "Category": "safety", "Better": "Output1"},
        {**one, "ID": "math_2", "Category": "reasoning", "Better": "Output2"},
    ]
    file = io.BytesIO()
    Dataset.from_list(rows, features=Features({**texts, "Image": Image()})).to_parquet(file)
    files = {"data/test-00000-of-00001.parquet": file.getvalue()}
    hub.add("syhuggingface/multimodal_rewardbench", files, kind="datasets")
    words = ["eval-reward", "--reward_model", str(reward), "--benchmark", "multimodal-rewardbench"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["multimodal-rewardbench"]
    assert {"accuracy_safety/bias", "accuracy_reasoning/math"} < set(found["measures"])
    assert found["measures"]["accuracy"]["questions"] == 2
    assert found["measures"]["accuracy_safety/bias"]["questions"] == 1


# --- stopped half-way ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_generate_leaves_no_half_file(
    signum: signal.Signals, tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_rows(tmp_path, 5000), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.unfinished"
    words = ["generate", "--model", str(tiny_llava_dir), "--data", str(data), "--output", str(output)]
    command = [sys.executable, "-m", "trl_llava.cli", *words, "--batch_size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert not output.exists() and part.stat().st_size
    if signum == signal.SIGINT:
        (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: stopped: {output} is not written") and "Traceback" not in error
    assert cli.main([*words, "--limit", "2", "--max_new_tokens", "2"]) == 0
    assert f"{part} is of a run that did not end" in capsys.readouterr().err
    assert len(completions(output)) == 2 and not part.exists()


def test_ctrl_c_is_one_line(
    tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = EvaluationModel.complete

    def stopped(model: EvaluationModel, rows: Any, decoding: Decoding) -> Iterator[Generated]:
        yield from complete(model, [rows[0]], decoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationModel, "complete", stopped)
    data, output = write_rows(tmp_path), tmp_path / "out.jsonl"
    model = ["--model", str(tiny_llava_dir), "--max_new_tokens", "2"]
    for words, said in (
        (["generate", "--data", str(data), "--output", str(output)], f"error: stopped: {output} is not written"),
        (["eval", "--tasks", str(data), "--output_dir", f"{tmp_path}/eval"], "error: stopped: no result is written"),
    ):
        capsys.readouterr()
        assert cli.main([words[0], *model, *words[1:]]) == 130
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert line.startswith(said)
    assert not output.exists() and not (tmp_path / "eval").exists()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "--model", "REWARD", "--data", "DATA"], "is a reward model"),
        (["chat", "--model", "REWARD"], "is a reward model"),
        (["generate", "--model", "SILENT", "--data", "DATA"], "has no chat template"),
        (["chat", "--model", "SILENT"], "has no chat template"),
        (["chat", "--model", "MODEL", "--image", "nowhere.png"], "--image: the image file nowhere.png does not exist"),
        (["score", "--reward_model", "MODEL", "--data", "PAIRS"], "has no score head"),
        (["score", "--reward_model", "ADAPTER", "--data", "PAIRS"], "factual_reward.json"),
        (["eval-reward", "--reward_model", "ADAPTER", "--benchmark", "PAIRS"], "factual_reward.json"),
        (["eval", "--model", "MODEL", "--tasks", "GONE"], "own.jsonl[0]: the image file"),
        (["generate", "--model", "MODEL", "--data", "nowhere.jsonl"], "The data set nowhere.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_line(
    command: list[str], said: str, tiny_llava_dir: Path, adapter: Path, reward: Path, tmp_path: Path, capsys: Any
) -> None:
    pairs, gone = tmp_path / "pairs.jsonl", write_rows(tmp_path / "gone")
    data = write_rows(tmp_path)
    (tmp_path / "gone" / "red.png").unlink()
    pairs.write_text(json.dumps({"image": "red.png", "prompt": "What?", "chosen": "Red.", "rejected": "Blue."}) + "\n")
    silent = tmp_path / "silent"
    shutil.copytree(tiny_llava_dir, silent, ignore=shutil.ignore_patterns("chat_template.jinja"))
    places = {"MODEL": tiny_llava_dir, "ADAPTER": adapter, "REWARD": reward, "SILENT": silent}
    places |= {"DATA": data, "PAIRS": pairs, "GONE": gone}
    output = {"generate": ["--output", "OUT"], "score": ["--output", "OUT"], "chat": []}
    words = [*command, *output.get(command[0], ["--output_dir", "OUT"])]
    places["OUT"] = tmp_path / "out"
    assert cli.main([str(places.get(word, word)) for word in words]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_page_without_images(tiny_llava_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "words.jsonl"
    data.write_text(json.dumps({"question": "Is ice cold?", "answer": "yes"}) + "\n")
    words = ["eval", "--model", str(tiny_llava_dir), "--tasks", str(data), "--max_new_tokens", "2"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "<small>no image</small>" in page and "<img" not in page
