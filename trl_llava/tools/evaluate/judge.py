"""A language model as a judge, behind any OpenAI-compatible address: concurrent, retried, every verdict kept."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import requests
from tqdm import tqdm

from trl_llava.errors import InputError
from trl_llava.hub.lookup import first_line

T = TypeVar("T")

KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")
"""Where the key is looked for; a server of one's own mostly needs none."""


class JudgeError(InputError):
    """The judge is not there, refuses, or says nothing that can be read; what it has said before is kept."""


@dataclass
class Judge:
    """Asks a judge once for each prompt; what is in the file of verdicts is not asked again.

    Args:
        base_url: Address up to `/v1`, say.
        model: Its name there, which stands beside every number.
        verdicts: JSON lines, one for each verdict that could be read; made if it is not there.
        options: Further fields of each request.
        concurrency: How many requests wait at once.
        tries: How often a request is made before the judge counts as gone, or as talking nonsense.
        wait: Seconds before the second try; each further one waits twice as long.
        timeout: Seconds for one answer.
    """

    base_url: str
    model: str
    verdicts: Path
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})
    concurrency: int = 8
    tries: int = 5
    wait: float = 1.0
    timeout: float = 120.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self) -> None:
        """Ask for one word, so that a judge that is not there is known before a model answers for an hour."""
        self._reply("Reply with the word OK.", min(self.tries, 2))

    def ask(
        self, prompts: Sequence[str], read: Callable[[str], T | None], names: Sequence[str]
    ) -> list[tuple[T, str]]:
        """What `read` finds in each verdict, and the verdict; None of `read` asks again. `names` are for errors."""
        known = self._known()
        missing = {prompt: name for prompt, name in zip(prompts, names, strict=True) if self._key(prompt) not in known}
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(self._verdict, prompt, read, name): prompt for prompt, name in missing.items()}
            try:
                for done in tqdm(as_completed(waiting), desc=self.model, total=len(waiting), disable=None):
                    known[self._key(waiting[done])] = done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those under way still end, and are kept
                raise
        texts = [known[self._key(prompt)] for prompt in prompts]
        found = [read(text) for text in texts]
        return [(value, text) for value, text in zip(found, texts, strict=True) if value is not None]

    def _verdict(self, prompt: str, read: Callable[[str], T | None], name: str) -> str:
        text = ""
        for _ in range(self.tries):
            text = self._reply(prompt, self.tries)
            if read(text) is not None:
                record = {
                    "key": self._key(prompt),
                    "judge": self.model,
                    "name": name,
                    "prompt": prompt,
                    "verdict": text,
                }
                with self._lock, self.verdicts.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                return text
        raise JudgeError(
            f"{name}: no verdict can be read in {self.tries} replies of the judge {self.model}, the last one "
            f"{text[:80]!r}. Verdicts so far are kept in {self.verdicts}: run again, or take another judge"
        )

    def _reply(self, prompt: str, tries: int) -> str:
        """The judge's words; a failure that may pass is tried again."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.options}
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url, problem = f"{self.base_url.rstrip('/')}/chat/completions", ""
        for attempt in range(tries):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                response = requests.post(url, json=body, headers=headers, timeout=self.timeout)
            except requests.RequestException as error:
                problem = first_line(error)
                continue
            if response.status_code in (408, 409, 429) or response.status_code >= 500:
                problem = f"status {response.status_code}"
                continue
            return self._content(response)
        raise self._error(f"{problem}, {tries} times")

    def _content(self, response: requests.Response) -> str:
        if response.status_code != 200:
            hint = f" (its key is read from {' or '.join(KEYS)})" if response.status_code in (401, 403) else ""
            raise self._error(f"status {response.status_code}{hint}: {' '.join(response.text.split())[:200]}")
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise self._error(f"no chat completion but {' '.join(response.text.split())[:80]!r}") from error
        return content or ""

    def _error(self, problem: str) -> JudgeError:
        return JudgeError(f"the judge {self.model} at {self.base_url} does not answer: {problem}")

    def _known(self) -> dict[str, str]:
        self.verdicts.parent.mkdir(parents=True, exist_ok=True)
        if not self.verdicts.is_file():
            return {}
        # Not `splitlines`: texts may hold other characters that end a line, as U+2028.
        lines = self.verdicts.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        # The last line may be cut short where a run was killed; it is asked for anew.
        records = [json.loads(line) for line in lines if line.endswith("}")]
        if not lines[-1].endswith("}"):
            self.verdicts.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        return {record["key"]: record["verdict"] for record in records}

    def _key(self, prompt: str) -> str:
        """The same for a prompt that the same judge was asked before."""
        return hashlib.sha256(json.dumps([self.model, self.options, prompt]).encode()).hexdigest()
