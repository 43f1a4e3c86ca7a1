"""Open pages in a real browser, headless, and ask them questions."""

from __future__ import annotations

import http.server
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

_NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
_SECONDS = 120  # for a browser to start and answer on a busy machine
#: Runs a function on the page in the frame once that has loaded, and sends what it returns.
_AROUND = """<!doctype html><iframe id="frame" width="{width}" height="900" src="{address}"></iframe><script>
const frame = document.getElementById("frame");
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
async function until(condition) {{ while (!condition()) await wait(100); return condition(); }}
async function ask(page) {{ {script} }}
frame.addEventListener("load", async () => {{
  let answer;
  try {{ answer = {{value: await ask(frame.contentWindow)}}; }} catch (error) {{ answer = {{error: String(error)}}; }}
  await fetch("/answer", {{method: "POST", body: JSON.stringify(answer)}});
}}, {{once: true}});
</script>"""


def needed_browser() -> str:
    """The path of a browser; the test is skipped without one."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"opens a page in a browser, and there is none of {', '.join(_NAMES)}")
    return found


class Answer(NamedTuple):
    """What a page answered, and what the browser asked the test's server for."""

    value: Any
    requests: list[str]


def ask_page(address: str, script: str, width: int, pages: Mapping[str, str] | None = None) -> Answer:
    """Open an address in a frame of that many pixels and run the body of an async function of ``page``, its window.

    Args:
        script: may use ``wait(milliseconds)`` and ``until(condition)``.
        pages: what the test's own server answers, by path.
    """
    browser, answers, requests = needed_browser(), queue.Queue(), []
    around = _AROUND.format(width=width, address=address, script=script)
    known = {"/around": around, **(pages or {})}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            body = known.get(self.path, "").encode()
            self.send_response(200 if self.path in known else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = subprocess.Popen(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-web-security", f"--user-data-dir={profile}",
             "--remote-debugging-port=0", "--window-size=1400,1000",
             f"http://127.0.0.1:{server.server_port}/around"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            answer = answers.get(timeout=_SECONDS)
        finally:
            process.kill()
            process.wait()
            server.shutdown()
    assert "error" not in answer, answer
    return Answer(answer["value"], requests)
