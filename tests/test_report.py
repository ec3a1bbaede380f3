"""`trl-llava report`: the page of real runs, of several, of unfinished ones, and what is said of the rest."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models
from PIL import Image
from tiny_trainers import make_adapter

from trl_llava import cli, train_grpo, train_ppo, train_sft
from trl_llava.tools.report import charts

WORDS = [
    *("--use_cpu", "--disable_tqdm", "--bf16", "false", "--report_to", "none", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "0.01"),
]
CHROMIUM = shutil.which("chromium")


def even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward function that a recipe can name."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Page(HTMLParser):
    """What a browser would load, which tags stay open, and the texts that stand for charts and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.told: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [given[name] or "" for name in ("src", "href") if name in given]
        self.told += [given[name] or "" for name in ("alt", "aria-label") if name in given]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tiny_llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three stages by their entry points: `sft`, `ppo` with checkpoints and alarms, `grpo`."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_models.image("red").save(folder / "red.png")
    question = {"images": ["red.png"], "prompt": [{"role": "user", "content": "what is it?"}]}
    said = {"completion": [{"role": "assistant", "content": "a square"}]}
    (folder / "sft.json").write_text(json.dumps([{**question, **said}] * 4))
    (folder / "ppo.json").write_text(json.dumps([{**question, "captions": [f"red {i}"]} for i in range(8)]))
    adapter = make_adapter(tiny_llava_dir, folder / "adapter")

    def words(rows: str, out: str, *more: str) -> list[str]:
        return [*WORDS, "--dataset_name", f"{folder}/{rows}.json", "--output_dir", f"{folder}/{out}", *more]

    base = ["--model_name_or_path", str(tiny_llava_dir), "--max_steps", "2"]
    held_out = ["--test_split_size", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
    train_sft.main(words("sft", "sft", *base, *held_out, "--use_peft", "--lora_r", "2", "--save_strategy", "no"))
    own = ["--value_init", "policy", "--reward_funcs", "test_report:even", "--length_coef", "-1"]
    own += ["--total_episodes", "8", "--response_length", "4", "--stop_token", "eos", "--num_ppo_epochs", "1"]
    saved = [
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--num_sample_generations",
        "2",
        "--test_split_size",
        "2",
    ]
    train_ppo.main(words("ppo", "ppo", "--sft_model_path", str(adapter), *own, *saved))
    group = ["--num_generations", "2", "--max_completion_length", "4", "--log_completions", "true", "--use_peft"]
    grpo = ["--reward_funcs", "test_report:even", "--save_strategy", "no", "--beta", "0.1", "--lora_r", "2"]
    train_grpo.main(words("ppo", "grpo", *base, *group, *grpo))
    return folder


def copy(folder: Path, name: str, without: tuple[str, ...] = ()) -> Path:
    """A run that a test may change, without its tables of completions."""
    ignored = shutil.ignore_patterns("completions", *without)
    return Path(shutil.copytree(folder / "ppo", folder / name, ignore=ignored))


def write_samples(run: Path, step: int, completions: list[str], scores: list[float]) -> None:
    """A table as PPO writes it."""
    (run / "completions").mkdir(exist_ok=True)
    images = []
    for colour in ("red", "blue"):
        tiny_models.image(colour).save(run / "image.jpg")
        images.append([{"bytes": (run / "image.jpg").read_bytes(), "path": f"{colour}.jpg"}])
    table = {
        "step": [step] * 2,
        "prompt": ["What is red?", "What is <b>blue</b>?"],
        "images": images,
        "captions": [["a red square", "red"], []],
        "completion": completions,
        "score": scores,
        "rewards/even": scores,
    }
    pd.DataFrame(table).to_parquet(run / "completions" / f"completions_{step:05d}.parquet")


def report(*words: Any) -> str:
    """The page that the command writes."""
    output = Path(words[0]).parent / "report.html"
    assert cli.main(["report", *map(str, words), "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    output.unlink()
    page = Page(text)
    assert page.open == []
    assert (
        all(value.startswith("data:") for value in page.loads)
        and "script" not in text
        and "url(" not in text.replace("url(#", "")
    )
    return text


def plain(text: str) -> str:
    """The text between the tags."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(svg|style).*?</\1>", "", text))))


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert cli.main(["report", *map(str, words)]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def history(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_the_numbers_of_a_ppo_run_are_those_of_its_log(folder: Path) -> None:
    text = report(folder / "ppo")
    told = Page(text).told
    log = [entry for entry in history(folder / "ppo") if "objective/kl" in entry]
    assert len(log) == 4
    held_out = [
        charts.number(entry[name])
        for entry in history(folder / "ppo")
        for name in entry
        if name[5:] == "objective/scores"
    ]
    assert f"ppo, held out: {held_out[0]} → {held_out[2]}" in plain(text)
    for title, name in {
        "Reward": "objective/scores",
        "Reward: even": "rewards/even/mean",
        "Reward: length": "rewards/length/mean",
        "KL to the reference": "objective/kl",
        "Completion length (tokens)": "completions/mean_length",
        "Share without a stop token": "completions/clipped_ratio",
        "Clipped ratios": "policy/clipfrac_avg",
    }.items():
        values = [entry[name] for entry in log]
        first, last = charts.number(values[0]), charts.number(values[-1])
        between = f"between {charts.number(min(values))} and {charts.number(max(values))}"
        assert f"{title}: ppo from {first} at step 1 to {last} at step 4, {between}" in " ".join(told)
        assert f"ppo: {first} → {last}" in plain(text)


def test_the_text_of_a_chart_has_literal_numbers() -> None:
    shown = [charts.number(value) for value in (0.123456, 12345.6, 40.0, -1.341e-07, -0.0, float("inf"))]
    assert shown == ["0.1235", "12,346", "40", "-1.3e-07", "0", "inf"]
    series = [charts.Series("a", [(1, 0.25), (2, -3.0), (30, 1234.5)]), charts.Series("b", [(2, 0.5)], 1)]
    assert charts.lines("Loss", series).alt == (
        "Loss: a from 0.25 at step 1 to 1,234 at step 30, between -3 and 1,234; b 0.5 at step 2."
    )
    points = charts.scatter("T", [charts.Series("a", [(1, 1), (2, 3), (3, 2)])], "words", "reward")
    assert points.alt == "T: a, 3 points, mean words 2, mean reward 2, correlation +0.50."
    assert charts.bars("T", [("x\ny", 0.125, 0.01, 0)]).alt == "T: x y 0.125 ± 0.010."
    assert "var(--series-0)" in points.svg and "#0" not in points.svg.replace("url(#", "").replace('"#', "")


def test_a_run_of_another_stage_has_its_own_curves_and_what_was_held_out(folder: Path) -> None:
    text = report(folder / "sft")
    losses = [charts.number(entry["loss"]) for entry in history(folder / "sft") if "loss" in entry]
    held_out = [charts.number(entry["eval_loss"]) for entry in history(folder / "sft") if "eval_loss" in entry]
    assert f"sft: {losses[0]} → {losses[1]}" in plain(text)
    assert f"sft, held out: {held_out[0]} → {held_out[1]}" in plain(text)
    assert "sft : policy after supervised fine-tuning, finished (step 2 of 2)" in plain(text)
    assert "no completions: sft makes none" in plain(text)


def test_what_a_run_was_made_of(folder: Path, tiny_llava_dir: Path) -> None:
    shown = plain(report(copy(folder, "plain")))
    assert f"base {tiny_llava_dir} " in shown
    assert f"dataset_name {folder}/ppo.json " in shown
    assert f"sft_model_path {folder}/adapter " in shown
    assert f"trl {json.loads((folder / 'ppo' / 'versions.json').read_text())['trl']} " in shown
    assert "total_episodes: 8" in shown and "whiten_rewards: false" in shown
    assert "finished (step 4 of 4)" in shown
    for missing in ("no completions of held-out prompts", "no evaluation: there is no evaluation_results.json"):
        assert f"plain: {missing}" in shown


def test_the_same_prompts_before_and_after(folder: Path) -> None:
    run = copy(folder, "sampled")
    write_samples(run, 0, ["a dog", "blue"], [0.25, 0.5])
    write_samples(run, 2, ["a cat", "green"], [0.5, 0.5])
    write_samples(run, 4, ["", "red red red"], [1.5, 2.5])
    text = report(run)
    shown = plain(text)
    assert shown.count("What is red?") == 1
    assert (
        "Captions: a red square; red start a dog score 0.25, even 0.25 step 4 empty score 1.5, even 1.5 1 more"
        in shown
    )
    assert "step 2 a cat" in shown
    assert "What is <b>blue</b>?" in shown  # text, no markup
    told = Page(text).told
    assert told.count("a red square; red") == 1 and told.count("blue.jpg") == 1
    sampled = "Each of the last sample completions: sampled, step 4, 2 points, mean words 1.5, mean reward 2"
    assert f"{sampled}, correlation +1.00." in told
    one = report(run, "--examples", "1")
    assert "What is red?" in one and "blue" not in plain(one)


def test_the_completions_that_ppo_wrote(folder: Path) -> None:
    text = report(folder / "ppo")
    table = {
        step: pd.read_parquet(folder / "ppo" / "completions" / f"completions_0000{step}.parquet") for step in (0, 4)
    }
    for row in range(2):
        said = {step: " ".join(table[step]["completion"][row].split()) or "empty" for step in table}
        score = {step: charts.number(table[step]["score"][row]) for step in table}
        caption = table[0]["captions"][row][0]
        assert Page(text).told.count(caption) == 1
        section = plain(text[text.index(f"Captions: {caption}<") :])
        assert section.startswith(f"Captions: {caption} start {said[0]} score {score[0]}, even ")
        assert f" step 4 {said[4]} score {score[4]}, even " in section[: section.index("more")]
    assert "no completions" not in plain(text)


@pytest.mark.parametrize(
    "damage", [{"images": [[{"bytes": b"no image", "path": "a.jpg"}]] * 2}, {"completion": [None] * 2}]
)
def test_a_table_that_holds_something_else_is_left_out(folder: Path, damage: dict[str, Any]) -> None:
    run = copy(folder, f"strange-{'-'.join(damage)}")
    write_samples(run, 4, ["a dog", "a cat"], [0.0, 1.0])
    file = run / "completions" / "completions_00004.parquet"
    pd.read_parquet(file).assign(**damage).to_parquet(file)
    assert "completions/completions_00004.parquet is left out: it cannot be read" in plain(report(run))


def test_a_number_that_a_step_does_not_have_is_a_gap_in_its_curve(folder: Path) -> None:
    run = copy(folder, "gaps")
    state = json.loads((run / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "objective/scores" in entry]
    steps[0]["objective/scores"] = None  # as TRL's GRPO logs a reward that no function gave
    (run / "trainer_state.json").write_text(json.dumps(state))
    first, last = (charts.number(steps[i]["objective/scores"]) for i in (1, -1))
    assert f"{first} \N{RIGHTWARDS ARROW} {last}" in plain(report(run))


def test_a_checkpoint_shows_the_run_as_it_was(folder: Path) -> None:
    run = copy(folder, "then")
    for step in (0, 2, 4):
        write_samples(run, step, ["a dog", f"step {step}"], [0.0, 1.0])
    (run / "alarms.json").write_text(json.dumps([{"step": 4, "alarm": "kl", "message": "too late"}]))
    shown = plain(report(run / "checkpoint-2"))
    assert "as it was at checkpoint-2 (step 2 of 4)" in shown
    assert f"{charts.number(history(run)[1]['objective/scores'])} " in shown
    assert "step 4" not in shown and "too late" not in shown and "step 2 step 2" in shown
    assert "too late" in plain(report(run))


def test_a_run_that_is_not_finished(folder: Path) -> None:
    run = copy(folder, "training", without=("trainer_state.json", "checkpoint-4"))
    shutil.copy(folder / "ppo" / "checkpoint-2" / "trainer_state.json", run / "checkpoint-2")
    assert "not finished, shown up to its last checkpoint, checkpoint-2 (step 2 of 4)" in plain(report(run))
    shutil.rmtree(run / "checkpoint-2")
    shown = plain(report(run))
    assert "not finished, and no checkpoint yet" in shown and "no curves: nothing was logged yet" in shown


def test_a_run_of_an_earlier_version(folder: Path) -> None:
    run = copy(folder, "earlier", without=("card.json", "versions.json"))
    (run / "completions").mkdir()
    table = {"query": ["what?"], "model response": ["that</s>"], "score": [0.5]}
    pd.DataFrame(table).to_parquet(run / "completions" / "completions_00001.parquet")
    (run / "completions" / "completions_00003.parquet").write_bytes(b"PAR1 cut short")
    shown = plain(report(run))
    assert "PPO: earlier" in shown and "what? step 1 that</s> score 0.5" in shown
    for line in (
        "no versions: there is no versions.json",
        "no completions of the start: the first in completions/ are those after step 1",
        "no images beside the completions",
        "completions/completions_00003.parquet is left out: it cannot be read",
    ):
        assert f"earlier: {line}" in shown


def test_completions_that_trls_grpo_wrote(folder: Path) -> None:
    shown = plain(report(folder / "grpo"))
    # TRL 1.12 writes the prompt as the model reads it, later versions its messages.
    assert re.search(r"what is it\?.{0,20} Image: red\.png Captions: red \d", shown)
    assert "step 2" in shown and "advantage" in shown
    first, *_, last = [entry["reward"] for entry in history(folder / "grpo") if "reward" in entry]
    assert f"grpo: {charts.number(first)} → {charts.number(last)}" in shown
    assert "no images beside the completions" in shown


def test_several_runs_are_compared(folder: Path) -> None:
    first, second = copy(folder, "first"), copy(folder, "second")
    recipe = (second / "recipe.yaml").read_text()
    recipe = recipe.replace(f"output_dir: {folder}/ppo", f"output_dir: {second}")
    changed = recipe.replace("length_coef: -1.0", "length_coef: -3.0")
    changed = changed.replace("kl_coef: 0.05", "kl_coef: 0.5").replace("\ngamma:", "\nnew_field: 1\ngamma:")
    assert changed.count("-3.0") == 1 and changed.count("0.5\n") >= 1
    (second / "recipe.yaml").write_text(changed)
    write_samples(first, 0, ["a dog", "blue"], [0.0, 0.0])
    write_samples(first, 4, ["one", "one"], [0.0, 0.0])
    write_samples(second, 0, ["a dog", "red"], [1.0, 1.0])
    write_samples(second, 4, ["two", "two"], [0.0, 0.0])
    text = report(first, second, folder / "sft")
    shown = plain(text)
    table = shown[shown.index("What differs") : shown.index("Made of")]
    assert table == "What differs field first second length_coef -1.0 -3.0 kl_coef 0.05 0.5 "
    assert "start a dog first: score 0, even 0 second: score 1, even 1 first, step 4 one score 0" in shown
    assert "second, step 4 two score 0" in shown
    assert "first, start blue score 0, even 0 second, start red score 1" in shown
    (kl,) = [told for told in Page(text).told if told.startswith("KL to the reference")]
    assert "first from" in kl and "second from" in kl and "sft" not in kl
    assert shown.index("PPO: first, second") < shown.index("SFT: sft")


def test_a_run_without_completions_beside_one_that_has_some(folder: Path) -> None:
    silent, killed = copy(folder, "silent"), copy(folder, "killed")
    write_samples(killed, 0, ["a dog", "blue"], [float("nan"), 0.0])
    shown = plain(report(silent, killed))
    assert "killed, start a dog score nan, even nan" in shown and shown.count("a dog") == 1
    assert "killed, step 0: correlation undefined" in shown
    assert "silent: no completions of held-out prompts" in shown


def test_runs_without_a_common_prompt(folder: Path) -> None:
    run = copy(folder, "others")
    write_samples(run, 4, ["one", "one"], [0.0, 0.0])
    other = copy(folder, "strangers")
    write_samples(other, 4, ["one", "one"], [0.0, 0.0])
    file = other / "completions" / "completions_00004.parquet"
    pd.read_parquet(file).assign(prompt=["A?", "B?"]).to_parquet(file)
    shown = plain(report(run, other))
    assert "were asked no prompt in common" in shown and "A? " in shown and "What is red?" in shown


def test_alarms_and_evaluations(folder: Path) -> None:
    run = copy(folder, "measured")
    (run / "alarms.json").write_text(json.dumps([{"step": 3, "alarm": "kl", "message": "KL is 9, above 5"}]))
    number = {"task": "pope", "measure": "f1", "text": "F1", "by": "", "questions": 5}
    (run / "evaluation_results.json").write_text(json.dumps([{**number, "value": 0.5, "low": 0.25, "high": 0.75}]))
    estimate = {"value": 0.125, "low": 0.1, "high": 0.2}
    measures = {"f1": {"text": "F1", "by": "", "values": {"sft": estimate}}}
    (folder / "evaluation.json").write_text(json.dumps({"tasks": {"pope": {"measures": measures}}}))
    shown = plain(report(run, "--evaluation", folder))
    assert "Alarms of measured step 3, kl: KL is 9, above 5" in shown
    assert "measure task measured sft F1 pope 0.500 [0.250, 0.750] 0.125 [0.100, 0.200]" in shown
    assert "no evaluation" not in shown


def test_what_cannot_be_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert "there is no such folder" in refused(capsys, folder / "nothing", "--output", out)
    assert "is no run of trl_llava" in refused(capsys, folder / "adapter", "--output", out)
    assert f"give the runs in it: {folder}/" in refused(capsys, folder, "--output", out)
    assert "is given twice" in refused(capsys, folder / "ppo", f"{folder}/ppo/", "--output", out)
    assert "an .html file" in refused(capsys, folder / "ppo", "--output", tmp_path / "page.txt")
    assert "there is no" in refused(capsys, folder / "ppo", "--output", out, "--evaluation", tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    assert "was not written by" in refused(capsys, folder / "ppo", "--output", out, "--evaluation", tmp_path)
    damaged = copy(folder, "damaged")
    (damaged / "alarms.json").write_text("[")
    assert "alarms.json is damaged" in refused(capsys, damaged, "--output", out)
    (damaged / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml is damaged" in refused(capsys, damaged, "--output", out)
    (folder / "ppo" / "checkpoint-9").mkdir(exist_ok=True)
    assert "no whole checkpoint" in refused(capsys, folder / "ppo" / "checkpoint-9", "--output", out)
    (folder / "ppo" / "checkpoint-9").rmdir()
    assert not out.exists()


def test_a_file_of_somebody_else_is_left_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert "is no page of trl-llava report" in refused(capsys, folder / "sft", "--output", mine)
    assert mine.read_text() == "<p>mine</p>"
    mine.unlink()
    for _ in range(2):  # the second takes the place of the first
        assert cli.main(["report", str(folder / "sft"), "--output", str(mine)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]


def measured(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """What a browser makes of a page; the script that measures stands in a copy."""
    script = """<script>
      const texts = [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
      const scrolls = [...document.querySelectorAll(".wide")].filter(box => box.scrollWidth > box.clientWidth).length;
      document.title = JSON.stringify({width: document.documentElement.scrollWidth, shown: innerWidth,
        least: Math.min(...texts), charts: texts.length, scrolls: scrolls,
        ground: getComputedStyle(document.body).backgroundColor,
        line: getComputedStyle(document.querySelector("figure svg path[style*='series-0']")).stroke});
    </script>"""
    copied = page.with_name("measured.html")
    copied.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", *flags]
    done = subprocess.run([*command, "--dump-dom", f"file://{copied}"], capture_output=True, text=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    return json.loads(html.unescape(title))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(folder: Path) -> None:
    page = folder / "shown.html"
    assert cli.main(["report", str(folder / "ppo"), str(folder / "grpo"), "--output", str(page)]) == 0
    for width in (1280, 500):  # no window of a browser without a head is narrower
        for scheme, ground, line in (
            (1, "rgb(255, 255, 255)", "rgb(0, 114, 178)"),
            (0, "rgb(21, 23, 26)", "rgb(86, 180, 233)"),
        ):
            found = measured(page, width, f"--blink-settings=preferredColorScheme={scheme}")
            assert found["width"] <= found["shown"], found
            assert found["least"] >= 9 and found["charts"] > 50, found
            assert (found["ground"], found["line"]) == (ground, line)
    screenshot = page.with_suffix(".png")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,2000", f"--screenshot={screenshot}"]
    subprocess.run([str(CHROMIUM), *flags, f"file://{page}"], capture_output=True, check=True, timeout=120)
    assert Image.open(screenshot).size == (390, 2000)
