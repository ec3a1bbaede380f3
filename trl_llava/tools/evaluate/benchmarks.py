"""Benchmarks that lmms-eval runs: its questions, its prompts and its scoring, with our model behind it.

lmms-eval's own model classes take no adapter, and score an empty answer where an error was.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lmms_eval.tasks
import numpy as np
from datasets import Image as ImageFeature
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.utils import load_yaml_config
from loguru import logger as loguru_logger
from PIL import Image
from tenacity import RetryError

from trl_llava.errors import NotFoundError
from trl_llava.hub.lookup import first_line
from trl_llava.tools.evaluate.lmms_model import Asked, LmmsModel
from trl_llava.tools.evaluate.model import Decoding, EvaluationModel
from trl_llava.tools.evaluate.own_data import read_answer
from trl_llava.tools.evaluate.results import Measure, Outcome, Question, Sampled, TaskResult
from trl_llava.tools.evaluate.statistics import Statistic, ratio

RESAMPLES = 500
"""Of a measure that lmms-eval aggregates, which is slower than a ratio of sums."""


class Benchmark(NamedTuple):
    """Where lmms-eval has a benchmark, and what of it needs a word.

    `groups` are the measures that count groups of questions, which are drawn together, with what names a group;
    `leave_out` those that say nothing of a model.
    """

    task: str
    folder: str
    groups: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    leave_out: tuple[str, ...] = ()


BENCHMARKS = {
    # The share of yes among the right answers, whatever the model says.
    "pope": Benchmark("pope", "pope", leave_out=("pope_yes_ratio",)),
    "chair": Benchmark("coco_cap_chair", "coco_cap_chair"),
    "amber_g": Benchmark("amber_g", "amber_g"),
    "mmvp": Benchmark("mmvp", "mmvp", {"mmvp_pair_accuracy": ("pair_index",)}),
    "hallusion_bench": Benchmark(
        "hallusion_bench_image",
        "hallusion_bench",
        {
            "qAcc": ("category", "subcategory", "set_id", "question_id"),
            "fAcc": ("category", "subcategory", "set_id", "figure_id"),
        },
    ),
}

READ_YES_NO = [
    Measure("yes_no_accuracy", "right, by the first word of the answer", "higher"),
    Measure("yes_no_f1", "F1 of yes, by the first word of the answer", "higher"),
    Measure("says_yes", "answered with yes"),
]


class LmmsTask:
    """A benchmark of lmms-eval as a task.

    Args:
        name: One of `BENCHMARKS`.
        folder: A copy of its data, as `save_to_disk` or `hf download` leave it; None loads it from the Hub.
        limit: How many questions.
        plain: Ask the bare questions, without the instruction that lmms-eval puts around them.
    """

    def __init__(self, name: str, folder: Path | None, limit: int | None = None, *, plain: bool = False) -> None:
        loguru_logger.disable("lmms_eval")  # it would say a line for every step
        self.name = name
        self.benchmark = BENCHMARKS[name]
        self.folder = folder
        self.limit = limit
        self.plain = plain
        self.task = self._load()
        self.docs = self.task.test_docs() if self.task.has_test_docs() else self.task.validation_docs()
        # Texts are read three times, and images decoded each time they are.
        features = self.docs.features.items()
        self.texts = self.docs.select_columns([name for name, kind in features if not isinstance(kind, ImageFeature)])
        count = len(self.docs) if limit is None else min(limit, len(self.docs))
        self.questions = [self._question(number) for number in range(count)]

    def ask(self, model: EvaluationModel, decoding: Decoding) -> list[Asked]:
        """A model's answers, asked for by lmms-eval."""
        asked = LmmsModel(model, decoding, self.name)
        # The scores follow in `judge`, where they get intervals; `predict_only` changes the task that it is given.
        simple_evaluate(
            asked,
            tasks=[self._load()],
            limit=self.limit,
            predict_only=True,
            bootstrap_iters=0,
            task_manager=self._manager(),
        )
        return [asked.answers[number] for number in range(len(self.questions))]

    def judge(self, models: list[str], answers: list[list[Asked]]) -> TaskResult:
        """Score the answers by lmms-eval's functions."""
        outcomes, statistics = [], []
        for own in answers:
            scored = [self._scores(number, answer.text) for number, answer in enumerate(own)]
            outcomes.append(
                [self._outcome(number, *found) for number, found in enumerate(zip(own, scored, strict=True))]
            )
            statistics.append({name: self._statistic(name, scored) for name in self._names()})
        better = {name: "higher" if good else "lower" for name, good in self.task.higher_is_better().items()}
        better |= {"amber_cog": "lower"}  # lmms-eval has it the other way round; it is a share of hallucinations
        measures = [Measure(name, f"{name} (lmms-eval)", better.get(name)) for name in self._names()]  # type: ignore[arg-type]
        read = [
            *READ_YES_NO,
            *(Measure(f"yes_no_f1_{kind}", f"F1 of yes, {kind}", "higher") for kind in self._kinds()),
        ]
        note = f"{len(self.questions)} questions, scored by lmms-eval's {self.benchmark.task}"
        note += ", asked without its instruction" if self.plain else ""
        return TaskResult(self.name, models, self.questions, outcomes, [*measures, *read], note, statistics)

    def _load(self) -> Any:
        """A fresh task object of lmms-eval, its data out of the folder if there is one."""
        manager = self._manager()
        yaml_path = manager.task_index[self.benchmark.task]["yaml_path"]
        config: dict[str, Any] = load_yaml_config(yaml_path=yaml_path, mode="full")
        if self.folder is not None:
            saved = (self.folder / "dataset_dict.json").is_file()
            config |= {"dataset_path": str(self.folder), "dataset_kwargs": {"load_from_disk": True} if saved else {}}
            config |= {"dataset_name": None}
        if self.plain and "lmms_eval_specific_kwargs" in config:  # else nothing stands around a question
            config["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": ""}}
        if self.name == "hallusion_bench":
            config["metric_list"] = _hallusion_measures()
        try:
            return lmms_eval.tasks.get_task_dict([config], manager)[self.benchmark.task]
        except RetryError as error:
            cause = error.last_attempt.exception() or error
            place = "from the Hub (--data FOLDER takes a copy)" if self.folder is None else f"from {self.folder}"
            raise NotFoundError(
                f"{self.name}: its data cannot be loaded {place}. The cause: {first_line(cause)}"
            ) from error

    def _manager(self) -> lmms_eval.tasks.TaskManager:
        """What finds a task's YAML; it reads one folder only, not all thousand of them."""
        folder = Path(lmms_eval.tasks.__file__).parent / self.benchmark.folder
        return lmms_eval.tasks.TaskManager("ERROR", include_path=str(folder), include_defaults=False)

    def _question(self, number: int) -> Question:
        doc = self.texts[number]
        truth = self.task.doc_to_target(doc)
        truth = ", ".join(map(str, truth)) if isinstance(truth, (list, tuple)) else str(truth)
        return Question(
            f"{self.name}[{number}]", self.task.doc_to_text(doc), lambda: self._images(number), f"right: {truth}"
        )

    def _images(self, number: int) -> Sequence[Image.Image]:
        images: Sequence[Image.Image] = self.task.doc_to_visual(self.docs[number])
        return images

    def _names(self) -> list[str]:
        return [name for name in self.task.aggregation() if name not in self.benchmark.leave_out]

    def _scores(self, number: int, text: str) -> dict[str, Any]:
        """What lmms-eval makes of one answer: for each measure what its aggregation takes."""
        try:
            found: dict[str, Any] = self.task.config.process_results(self.texts[number], [text])
        except (LookupError, OSError) as error:  # NLTK's and spaCy's data, and AMBER's own files
            said = " ".join(str(error).split())
            raise NotFoundError(
                f"{self.name}: lmms-eval cannot score an answer, because data is not there (docs/evaluation.md says "
                f"which). The cause: {said[:300]}"
            ) from error
        return found

    def _statistic(self, name: str, scored: list[dict[str, Any]]) -> Sampled:
        items, aggregate = [own[name] for own in scored], self.task.aggregation()[name]
        keys = self.benchmark.groups.get(name)
        if keys is None:
            return Sampled(_aggregated(items, aggregate), len(items), RESAMPLES)
        groups = defaultdict(list)
        for item in items:
            groups[tuple(item[key] for key in keys)].append(item)
        return Sampled(ratio([aggregate(group) for group in groups.values()], [1] * len(groups)), len(groups))

    def _kinds(self) -> list[str]:
        """The splits of POPE, which stand in one column of its data."""
        return sorted(set(self.texts["category"])) if self._asks_yes_no() and "category" in self.texts.features else []

    def _asks_yes_no(self) -> bool:
        return self.name == "pope"

    def _outcome(self, number: int, asked: Asked, scored: dict[str, Any]) -> Outcome:
        details = {"tokens": asked.generated.tokens, "finished": asked.generated.finished}
        if self._asks_yes_no():
            return self._yes_no(number, asked, details)
        item = next(iter(scored.values()))
        if self.name == "chair":
            invented = sorted({word for word in item["pred"] if word not in item["answer"]})
            note = f"invented: {', '.join(invented)}" if invented else ""
            return Outcome(asked.text, bool(invented), note, details={**details, "invented": invented})
        wrong = {"mmvp": lambda: not item["is_correct"], "amber_g": lambda: item["non_hallu_score"] == 0}
        wrong["hallusion_bench"] = lambda: ("yes" in asked.text.lower()) != (str(item["gt_answer"]) == "1")
        is_wrong = bool(wrong[self.name]())
        return Outcome(asked.text, is_wrong, "wrong" if is_wrong else "", details=details)

    def _yes_no(self, number: int, asked: Asked, details: dict[str, Any]) -> Outcome:
        """POPE takes an answer that is more than one word for wrong; read by its first word it has its say."""
        doc = self.texts[number]
        right, given = doc["answer"].strip().lower(), read_answer(asked.text, "yes_no")
        hits, either = 2.0 * (right == given == "yes"), float(right == "yes") + float(given == "yes")
        counts: dict[str, tuple[float, float]] = {
            "yes_no_accuracy": (given == right, 1),
            "yes_no_f1": (hits, either),
            "says_yes": (given == "yes", 1),
        }
        if "category" in doc:
            counts[f"yes_no_f1_{doc['category']}"] = (hits, either)
        return Outcome(asked.text, given != right, "" if given == right else "wrong", [], counts, details)


def _aggregated(items: list[Any], aggregate: Callable[[list[Any]], float]) -> Statistic:
    def statistic(places: np.ndarray) -> float:
        try:
            return float(aggregate([items[place] for place in places]))
        except ZeroDivisionError:  # a resample in which nothing was mentioned
            return float("nan")

    return statistic


def _hallusion_measures() -> list[dict[str, Any]]:
    """The measures that read yes or no from the answer: lmms-eval's others ask a model of OpenAI."""
    module = importlib.import_module("lmms_eval.tasks.hallusion_bench.evaluate_hb")
    return [
        {
            "metric": name,
            "aggregation": getattr(module, f"hb_aggregation_result_{name}_intern"),
            "higher_is_better": True,
        }
        for name in ("aAcc", "qAcc", "fAcc")
    ]
