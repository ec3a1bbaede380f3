"""MMHal-Bench with a judge on the loopback interface: rated, retried, resumed, and what a broken judge leads to."""

import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from trl_llava import cli
from trl_llava.tools.evaluate.judge import Judge, JudgeError
from trl_llava.tools.evaluate.mmhal import MMHalTask, judge_prompt, read_rating
from trl_llava.tools.evaluate.model import Generated

Reply = Callable[[str], tuple[int, str]]


class JudgeServer:
    """An OpenAI-compatible server; `reply` makes a status and the words of a prompt."""

    def __init__(self) -> None:
        self.reply: Reply = lambda prompt: (200, "Rating: 4")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append(body)
                    owner.headers.append(self.headers["Authorization"])
                    owner.at_once += 1
                    owner.most_at_once = max(owner.most_at_once, owner.at_once)
                status, words = owner.reply(body["messages"][0]["content"])
                with owner.lock:
                    owner.at_once -= 1
                answer = json.dumps({"choices": [{"message": {"content": words}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def served() -> Iterator[JudgeServer]:
    judge = JudgeServer()
    thread = threading.Thread(target=judge.server.serve_forever, daemon=True)
    thread.start()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()
    thread.join()


def record(number: int, kind: str = "attribute") -> dict[str, Any]:
    return {
        "question_type": kind,
        "question_topic": "outdoor",
        "image_id": f"{number:04x}",
        "image_src": f"https://example.org/5612/{number}_o.jpg",
        "image_content": ["dog", "red ball"],
        "question": f"What colour is ball {number}?",
        "gt_answer": "It is red.",
        "model_answer": "",
    }


def published(folder: Path, *, zipped: bool = False, count: int = 4) -> Path:
    """A copy of the Hub's repository, with fewer questions."""
    (folder / "mmhal" / "images").mkdir(parents=True)
    records = [record(number, ("attribute", "counting")[number % 2]) for number in range(count)]
    (folder / "mmhal" / "response_template.json").write_text(json.dumps(records))
    for number in range(count):
        tiny_models.image("red").save(folder / "mmhal" / "images" / f"{number}_o.jpg")
    if zipped:
        with zipfile.ZipFile(folder / "mmhal" / "test_data.zip", "w") as archive:
            for path in sorted((folder / "mmhal" / "images").iterdir()):
                archive.write(path, f"test_data/images/{path.name}")
                path.unlink()
    return folder


def judge_at(served: JudgeServer, tmp_path: Path, **changes: Any) -> Judge:
    return Judge(served.url, "judge-1", tmp_path / "verdicts.jsonl", **{"wait": 0.001, "tries": 3, **changes})


@pytest.mark.parametrize(
    ("verdict", "rating"),
    [
        ("Fine.\nRating: 6", 6),
        ("**Rating:** 2", 2),
        ("A rating of 3? No.\nRating: 1", 1),
        ("Rating: 7", None),
        ("On the rating 0 to 6 scale it is good", None),
        ("", None),
    ],
)
def test_a_rating_is_read(verdict: str, rating: int | None) -> None:
    assert read_rating(verdict) == rating


def test_the_judge_reads_what_is_known_and_what_was_answered() -> None:
    prompt = judge_prompt(record(0), "It is {blue}.")
    for part in ("dog, red ball", "What colour is ball 0?", "It is red.", "It is {blue}."):
        assert part in prompt


@pytest.mark.parametrize("zipped", [False, True])
def test_the_two_numbers(zipped: bool, served: JudgeServer, tmp_path: Path) -> None:
    task = MMHalTask(judge_at(served, tmp_path), published(tmp_path / "data", zipped=zipped) / "mmhal")
    assert task.rows[0]["images"][0].size == (40, 32)
    served.reply = lambda prompt: (200, f"Rating: {6 if 'good' in prompt.split('Answer to rate:')[1] else 2}")
    answers = [Generated(text, 1, True) for text in ("good", "bad", "bad", "bad")]
    result = task.judge(["m"], [answers])
    values = {measure.name: result.estimates(measure)[0].value for measure in result.measures}
    assert values == {
        "mmhal_score": 3.0,
        "hallucination_rate": 0.75,
        "score_attribute": 4.0,
        "score_counting": 2.0,
    }
    assert [outcome.wrong for outcome in result.outcomes[0]] == [False, True, True, True]
    assert all(measure.by == "judge-1" for measure in result.measures)


def test_verdicts_are_kept_and_not_asked_for_again(served: JudgeServer, tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    prompts[0] += "\u2028"  # which ends a line for some, not in JSON lines
    served.reply = lambda prompt: (200, "Rating: 4") if prompt != "prompt 3" else (400, "no")
    with pytest.raises(JudgeError, match="status 400"):
        judge_at(served, tmp_path, concurrency=1).ask(prompts, read_rating, prompts)
    lines = (tmp_path / "verdicts.jsonl").read_text().strip().split("\n")
    kept, first = len(lines), json.loads(lines[0])
    assert {"judge": "judge-1", "prompt": prompts[0], "verdict": "Rating: 4"}.items() <= first.items()
    assert 3 <= kept < 6
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    served.reply, before = lambda prompt: (200, "Rating: 5"), len(served.requests)
    found = judge_at(served, tmp_path).ask(prompts, read_rating, prompts)
    assert sorted(value for value, _ in found) == [4] * kept + [5] * (6 - kept)
    assert found[3][0] == 5
    assert len(served.requests) - before == 6 - kept
    # Another judge has not said anything yet.
    other = Judge(served.url, "judge-2", tmp_path / "verdicts.jsonl")
    assert [value for value, _ in other.ask(prompts[:1], read_rating, prompts[:1])] == [5]


def test_requests_wait_at_once_and_are_tried_again(served: JudgeServer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    barrier, failed = threading.Barrier(4, timeout=20), set()

    def reply(prompt: str) -> tuple[int, str]:
        if prompt not in failed:
            failed.add(prompt)
            barrier.wait()  # opens only if all four are under way
            return (503, "")
        return (200, "Rating: 3")

    served.reply = reply
    prompts = [f"prompt {number}" for number in range(4)]
    found = judge_at(served, tmp_path, concurrency=4, options={"temperature": 0, "seed": 1}).ask(
        prompts, read_rating, prompts
    )
    assert [value for value, _ in found] == [3] * 4
    assert served.most_at_once == 4 and len(served.requests) == 8
    assert served.requests[0] == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": served.requests[0]["messages"][0]["content"]}],
        "temperature": 0,
        "seed": 1,
    }
    assert set(served.headers) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("status", "words", "said"),
    [
        (200, "Nice!", "mmhal[1]: no verdict can be read in 3 replies of the judge judge-1, the last one 'Nice!'"),
        (500, "", "does not answer: status 500, 3 times"),
        (401, "", "status 401 (its key is read from JUDGE_API_KEY or OPENAI_API_KEY)"),
    ],
)
def test_a_judge_that_is_of_no_use(status: int, words: str, said: str, served: JudgeServer, tmp_path: Path) -> None:
    served.reply = lambda prompt: (status, words)
    with pytest.raises(JudgeError) as raised:
        judge_at(served, tmp_path).ask(["?"], read_rating, ["mmhal[1]"])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_eval_with_a_judge(served: JudgeServer, tiny_llava_dir: Path, tmp_path: Path, capsys: Any) -> None:
    data = published(tmp_path / "data")
    words = ["eval", "--model", str(tiny_llava_dir), "--tasks", "mmhal", "--data", str(data), "--max_new_tokens", "5"]
    words += ["--judge_base_url", served.url, "--judge_model", "judge-1", "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "mmhal_score (judge-1)" in out and "hallucination_rate (judge-1)" in out
    assert "by judge-1" in (tmp_path / "out" / "evaluation.html").read_text()
    assert len((tmp_path / "out" / "answers" / "mmhal.jsonl").read_text().splitlines()) == 4
    asked = len(served.requests)
    assert cli.main(words) == 0
    assert len(served.requests) == asked + 1  # whether the judge is there


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--judge_model": None}, "mmhal needs a judge"),
        ({"--judge_base_url": "http://127.0.0.1:9/v1"}, "does not answer"),
        ({"--judge_options": "{"}, "is not JSON"),
        ({"--data": "nowhere"}, "has no response_template.json"),
        ({"--data": None}, "is neither reachable on the Hub nor in the cache"),
        ({"image": "gone"}, "mmhal[0]: "),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_a_model_is_loaded(
    changes: dict[str, str | None], said: str, served: JudgeServer, tmp_path: Path, capsys: Any
) -> None:
    data = published(tmp_path / "data")
    if "image" in changes:
        (data / "mmhal" / "images" / "0_o.jpg").unlink()
    options: dict[str, str | None] = {"--data": str(data), "--judge_base_url": served.url, "--judge_model": "j"}
    options |= {name: value for name, value in changes.items() if name != "image"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = ["eval", "--model", str(tmp_path / "model"), "--tasks", "mmhal", "--output_dir", str(tmp_path / "out")]
    words += [word for name, value in options.items() if value is not None for word in (name, value)]
    assert cli.main(words) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
