"""Images that rows name by URL, fetched from a server on this machine."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_models

from trl_llava import cli
from trl_llava.data import fetch
from trl_llava.data.contract import RowError
from trl_llava.data.images import load_image
from trl_llava.data.load import load_rows


def png(color: str) -> bytes:
    content = io.BytesIO()
    tiny_models.image(color).save(content, "PNG")
    return content.getvalue()


class Server(ThreadingHTTPServer):
    """`/red.png`, and what can go wrong: no such file, text, half of an image, an answer that never comes."""

    asked: list[str]
    closing: threading.Event


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/slow.png":
            self.server.closing.wait(20)
            return
        if self.path == "/gone.png":
            self.send_error(404)
            return
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/red.png")
            self.end_headers()
            return
        content = b"<html>" if self.path == "/page" else png("red")
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:20] if self.path == "/half.png" else content)

    def log_message(self, *args: object) -> None:
        """Nothing: the test's output is enough."""


@pytest.fixture
def server() -> Iterator[Server]:
    fetch._fetch.cache_clear()
    server = Server(("127.0.0.1", 0), Answers)
    server.asked, server.closing = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def rows_file(folder: Path, server: Server, *names: str) -> Path:
    rows = [
        {"image": f"http://127.0.0.1:{server.server_port}/{name}", "prompt": "What?", "completion": "Red."}
        for name in names
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_an_image_is_fetched_once_and_on_request_only(server, tmp_path):
    path = rows_file(tmp_path, server, "red.png", "red.png", "moved.png")
    with pytest.raises(RowError, match=r"rows.json\[0\]: its image is a URL .*Set `fetch_images: true`"):
        load_rows(path, "sft")
    assert not server.asked
    rows = load_rows(path, "sft", fetch_images=True)
    assert server.asked == ["/red.png", "/moved.png", "/red.png"]
    for row in rows:
        assert load_image(row["images"][0], "row").getpixel((0, 0)) == (255, 0, 0)


def test_captions_are_found_by_the_last_part_of_a_url(server, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"red.png": ["All red."]}))
    path = rows_file(tmp_path, server, "red.png")
    rows = load_rows(path, "prompt", fetch_images=True, captions_file=tmp_path / "captions.json")
    assert rows["captions"][:] == [["All red."]]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("gone.png", r"cannot be fetched \(HTTP 404 Not Found\)"),
        ("half.png", r"cannot be fetched \(20 of \d+ bytes came\)"),
        ("slow.png", r"cannot be fetched \(timed out\)"),
        ("page", "cannot be read"),
        ("red.png", r"cannot be fetched \(it has more than 0 MiB\)"),
    ],
)
def test_what_cannot_be_fetched_is_one_short_line(server, tmp_path, monkeypatch, name, cause):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    if name == "red.png":
        monkeypatch.setattr(fetch, "MAX_BYTES", 10)
    with pytest.raises(RowError, match=rf"rows.json\[0\]: .*{cause}") as error:
        load_rows(rows_file(tmp_path, server, name), "sft", fetch_images=True)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_server_that_is_not_there_and_a_url_that_is_none(tmp_path, server):
    for url, cause in (("http://127.0.0.1:1/a.png", "Connection refused"), ("http://[/a.png", "Invalid IPv6 URL")):
        (tmp_path / "rows.json").write_text(json.dumps([{"image": url, "prompt": "What?", "completion": "Red."}]))
        with pytest.raises(RowError, match=f"cannot be fetched .*{cause}"):
            load_rows(tmp_path / "rows.json", "sft", fetch_images=True)


@pytest.mark.parametrize("fetches", [True, False])
def test_check_data_says_the_same(server, tmp_path, tiny_llava_dir, capsys, fetches):
    words = ["check-data", "--stage", "sft", "--model_name_or_path", str(tiny_llava_dir), "--output_dir", "unused"]
    words += ["--dataset_name", str(rows_file(tmp_path, server, "red.png", "gone.png")), "--dataset_num_proc", "1"]
    assert cli.main([*words, "--fetch_images", str(fetches).lower()]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    expected = "HTTP 404" if fetches else "its image is a URL"
    assert f"{1 if fetches else 2} of 2 rows of" in printed and expected in printed
