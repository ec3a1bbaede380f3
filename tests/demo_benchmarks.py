"""The demo's held-out questions as copies of POPE, CHAIR and MMHal-Bench in their published layouts."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from trl_llava.demo import language

STRING = Value("string")


def write_copies(data: Path, folder: Path) -> Path:
    """Write `pope`, `chair` and `mmhal` below a folder, out of the demo's `data`; returns the folder."""
    lines = (data / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**row, "image": data / "pictures" / row["images"][0]} for row in map(json.loads, lines)]
    _pope([row for row in rows if row["kind"] == "yes_no"], folder / "pope")
    _chair([row for row in rows if row["kind"] == "describe"], folder / "chair")
    _mmhal([row for row in rows if row["kind"] == "describe"], folder / "mmhal")
    return folder


def _save(folder: Path, columns: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    table = Dataset.from_list(rows, features=Features({"image": Image(), **columns}))
    DatasetDict({"test": table}).save_to_disk(folder)


def _pope(rows: list[dict[str, Any]], folder: Path) -> None:
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    questions = [
        {
            "image": str(row["image"]),
            "id": str(number),
            "question_id": str(number),
            "question": row["prompt"][0]["content"],
            "answer": row["answer_type"],
            "image_source": row["images"][0],
            "category": "random",
        }
        for number, row in enumerate(rows)
    ]
    _save(folder, dict.fromkeys(names, STRING), questions)


def _chair(rows: list[dict[str, Any]], folder: Path) -> None:
    questions = [
        {"image": str(row["image"]), "question_id": str(number), "gt_object": row["objects"]}
        for number, row in enumerate(rows)
    ]
    _save(folder, {"question_id": STRING, "gt_object": List(STRING)}, questions)


def _mmhal(rows: list[dict[str, Any]], folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    records = []
    for row in rows[:96]:  # as many as the benchmark has
        shutil.copy(row["image"], folder / "images")
        records.append(
            {
                "question_type": "holistic",
                "question_topic": "drawn",
                "image_id": row["image"].stem,
                "image_src": f"https://example.org/{row['image'].name}",
                "image_content": row["objects"],
                "question": row["prompt"][0]["content"],
                "gt_answer": language.description(row["objects"]),
                "model_answer": "",
            }
        )
    (folder / "response_template.json").write_text(json.dumps(records), encoding="utf-8")


def truthful_judge(prompt: str) -> tuple[int, str]:
    """A judge that knows the drawn world: 6 for an answer that invents nothing and leaves nothing out."""
    found = re.search(r"Things in the image: (.*)\n", prompt)
    answer = re.search(r"Answer to rate: (.*)\n", prompt)
    if found is None or answer is None:  # it is asked whether it is there
        return 200, "OK"
    there, said = set(found[1].split(", ")), set(language.mentioned(answer[1]))
    rating = (6 if there <= said else 4 if said else 3) if said <= there else (1 if said & there else 0)
    return 200, f"Rating: {rating}"
