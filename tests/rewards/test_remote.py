"""Rewards behind an endpoint, awaited rewards, and scores that are kept."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import multiprocessing
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.counted import IMAGE, Counted, fill, texts

from lvrpo.data.example import Example
from lvrpo.rewards import remote
from lvrpo.rewards.cache import CachedReward
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.remote import HttpReward
from lvrpo.rewards.reward import FunctionReward, RewardError, Samples
from lvrpo.rewards.score import score


class Server:
    """An endpoint on the loopback; `answers` are what it says in turn, then what it computes."""

    def __init__(self):
        self.requests, self.answers, self.busy, self.most_busy = [], [], 0, 0
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with lock:
                    server.busy += 1
                    server.most_busy = max(server.busy, server.most_busy)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append((dict(self.headers), body["samples"]))
                    planned = server.answers.pop(0) if server.answers else None
                time.sleep(0.05)
                status, headers, answer = planned or (200, {}, server.scores(body["samples"]))
                if status == "slow":
                    time.sleep(1.0)
                    status = 200
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer if isinstance(answer, bytes) else answer.encode())
                except OSError:
                    pass  # the client has gone
                with lock:
                    server.busy -= 1

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def scores(self, samples):
        return json.dumps(
            {"scores": [None if s["text"] == "?" else len(s["text"] or "") for s in samples]}
        )


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_come_back_in_order(server, batch_size):
    given = ["a", "bb", "?", "dddd", "", "ffffff", "g"]
    arguments = {"url": server.url, "batch_size": batch_size, "requests": 3}
    reward = load_reward("http", arguments=arguments)
    found = score([reward], texts(*given))[:, 0]
    wanted = [math.nan if text == "?" else len(text) for text in given]
    assert found.tolist() == pytest.approx(wanted, nan_ok=True)
    sizes = sorted(len(samples) for _, samples in server.requests)
    assert sum(sizes) == len(given)
    assert len(sizes) == math.ceil(len(given) / batch_size)
    assert server.most_busy <= 3
    if batch_size == 1:
        assert server.most_busy > 1


def test_what_is_sent(server):
    pixels = torch.randint(0, 256, (1, 3, 4, 6)).float() / 255
    drawing = Example(
        "generate", "d", "draw", image=pixels[0].flip(0).numpy(), extra={"text": "stop"}
    )
    samples = Samples.concat([texts("one"), Samples.of_images([drawing], pixels)])
    HttpReward(server.url, headers={"Authorization": "Bearer me"})(samples)
    ((headers, (text, drawn)),) = server.requests
    assert headers["Authorization"] == "Bearer me"
    assert text == {
        "uid": "qone", "task": "understand", "prompt": "what", "answers": ["1"], "extra": {},
        "text": "one", "finish_reason": "end", "image": None, "edited": [],
    }  # fmt: skip
    assert (drawn["text"], drawn["extra"]) == (None, {"text": "stop"})
    sent, edited = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        for png in (drawn["image"], *drawn["edited"])
    )
    np.testing.assert_array_equal(sent, (pixels[0] * 255).round().permute(1, 2, 0))
    np.testing.assert_array_equal(edited, sent[..., ::-1])


def test_what_passes_is_tried_again_with_longer_and_longer_waits(server, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append))
    server.answers = [(503, {}, "busy"), (429, {}, "busy"), (500, {}, "oh")]
    reward = HttpReward(server.url, retries=3, backoff=0.1)
    assert reward(texts("abc")).tolist() == [3]
    assert waits == [0.1, 0.2, 0.4]
    assert len(server.requests) == 4


def test_a_server_may_say_how_long_to_wait(server):
    server.answers = [(429, {"Retry-After": "0"}, "busy")]
    assert HttpReward(server.url, retries=1, backoff=1e6)(texts("abc")).tolist() == [3]


def test_a_late_answer_is_asked_for_again(server):
    server.answers = [("slow", {}, '{"scores": [9]}')]
    assert HttpReward(server.url, seconds=0.5, backoff=0.0)(texts("abc")).tolist() == [3]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        ((404, {}, "no"), "HTTPError: HTTP Error 404: Not Found, asked 1 times", 1),
        ((503, {}, "no"), "HTTPError: HTTP Error 503: .*, asked 3 times", 3),
        ((200, {}, "hello"), r"answered b'hello', expected .*scores", 1),
        ((200, {}, "[1]"), "expected .*scores", 1),
        ((200, {}, '{"scores": ["1"]}'), "expected .*scores.* of numbers and nulls", 1),
        ((200, {}, '{"scores": [true]}'), "expected .*scores.* of numbers and nulls", 1),
        ((200, {}, '{"scores": [1, 2]}'), "answered 2 scores for 1 samples", 1),
    ],
)
def test_an_endpoint_that_does_not_score_is_named(server, answer, message, asked):
    server.answers = [answer] * 3
    reward = HttpReward(server.url, retries=2, backoff=0.0)
    with pytest.raises(
        RewardError, match=f"raised EndpointError: {server.url}:? .*{message}|{message}"
    ):
        score([reward], texts("abc"))
    assert len(server.requests) == asked


def test_nobody_there():
    reward = HttpReward("http://127.0.0.1:9", retries=1, backoff=0.0)
    with pytest.raises(RewardError, match=r"EndpointError: http://127.0.0.1:9: .*asked 2 times"):
        score([reward], texts("abc"))


@pytest.mark.parametrize(
    "wrong",
    [{"url": "file:///etc/passwd"}, {"batch_size": 0}, {"requests": 0}, {"retries": -1},
     {"seconds": 0.0}, {"backoff": -1.0}],
)  # fmt: skip
def test_settings(wrong):
    with pytest.raises(ValueError, match=f"HttpReward: {next(iter(wrong))} is "):
        HttpReward(**{"url": "http://localhost", **wrong})


async def awaited(samples):
    """All at a time."""

    everyone = asyncio.Barrier(len(samples)) if hasattr(asyncio, "Barrier") else None

    async def one(text):
        if everyone is not None:
            await everyone.wait()
        return float(len(text))

    return await asyncio.gather(*map(one, samples.texts))


async def awaited_in_vain(samples):
    await asyncio.sleep(0)
    raise LookupError("nothing there")


@pytest.mark.parametrize("timeout", [0.0, 20.0])
def test_a_reward_may_be_awaited(timeout):
    given = ["a" * n for n in range(30)]
    found = score([FunctionReward(awaited, "awaited")], texts(*given), timeout=timeout)
    assert found[:, 0].tolist() == list(range(30))
    with pytest.raises(
        RewardError, match=r"raised LookupError: nothing there.*test_remote\.py:\d+"
    ):
        score([FunctionReward(awaited_in_vain, "awaited")], texts("a"), timeout=timeout)


def test_an_awaited_reward_under_an_event_loop():
    async def notebook():
        return score([FunctionReward(awaited, "awaited")], texts("abc"))

    assert asyncio.run(notebook()).item() == 3


def test_an_awaited_reward_has_a_time_limit():
    async def late(samples):
        await asyncio.sleep(5)

    with pytest.raises(RewardError, match=r"took longer than 0\.2 s"):
        score([FunctionReward(late, "late")], texts("abc"), timeout=0.2)


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_scored_is_not_scored_again(tmp_path, on_disk):
    asked = Counted()
    reward = CachedReward(asked, str(tmp_path / "scores.db") if on_disk else "")
    first = texts("a", "?", "bb", "a")
    wanted = [1, math.nan, 2, 1]
    assert score([reward], first)[:, 0].tolist() == pytest.approx(wanted, nan_ok=True)
    assert score([reward], first)[:, 0].tolist() == pytest.approx(wanted, nan_ok=True)
    pixels = torch.rand(2, 1, 4, 4)
    mixed = Samples.concat(
        [
            texts("ccc", "a"),
            Samples.of_images([Example("generate", "d", "draw")] * 2, pixels),
        ]
    )
    for _ in range(2):
        found = score([reward], mixed)[:, 0]
        torch.testing.assert_close(found, torch.tensor([3, 1, *pixels.mean(dim=(1, 2, 3))]))
    assert asked.asked == [3, 3]
    again = CachedReward(asked, reward.path)
    score([again], first)
    assert asked.asked == ([3, 3] if on_disk else [3, 3, 3])
    score([CachedReward(asked, reward.path, version="2")], first)
    assert asked.asked[-1] == 3


def test_content_is_all_that_is_scored():
    one = Example("understand", "a", "what", image=IMAGE, answer="1")
    others = [
        Example("understand", "a", "whatever", image=IMAGE, answer="1"),
        Example("understand", "a", "what", image=IMAGE + 1, answer="1"),
        Example("understand", "a", "what", image=IMAGE, answer="2"),
        Example("understand", "a", "what", image=IMAGE, answer="1", other_answers=("2",)),
        Example("understand", "a", "what", image=IMAGE, answer="1", extra={"x": 1}),
    ]
    asked = Counted()
    reward = CachedReward(asked)
    reward(Samples.of_texts([one], ["x"]))
    reward(Samples.of_texts([Example("understand", "b", "what", image=IMAGE, answer="1")], ["x"]))
    assert len(asked.asked) == 1
    for other in others:
        reward(Samples.of_texts([other], ["x"]))
    reward(Samples.of_texts([one], ["y"]))
    reward(Samples.of_texts([one], ["x"], ["length"]))
    assert asked.asked == [1] * (3 + len(others))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    asked = Counted()
    reward = CachedReward(asked, str(tmp_path / "scores.db"), most=3)
    for name in ("a", "b", "c", "a", "d"):
        reward(texts(name))
        time.sleep(0.002)
    assert sum(asked.asked) == 4
    with sqlite3.connect(reward.path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM scores").fetchone() == (3,)
    reward(texts("a", "c", "d"))
    assert sum(asked.asked) == 4
    reward(texts("b"))
    assert sum(asked.asked) == 5
    with pytest.raises(ValueError, match="most is 0"):
        CachedReward(asked, most=0)


def test_processes_and_threads_share_a_file(tmp_path):
    path = str(tmp_path / "scores.db")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(path, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda seed: fill(path, seed), range(2, 5)))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM scores").fetchone() == (40,)


def test_an_error_under_a_cache_is_the_rewards_own():
    def broken(samples):
        return [1 / 0]

    reward = CachedReward(FunctionReward(broken, "broken"))
    with pytest.raises(
        RewardError, match=r"'broken' raised ZeroDivisionError.*test_remote\.py:\d+"
    ):
        score([reward], texts("a"))
    short = CachedReward(FunctionReward(lambda samples: [], "short"))
    with pytest.raises(RewardError, match="'short' returned 0 scores for 1 samples"):
        score([short], texts("a"))
    lasting = CachedReward(FunctionReward(awaited, "awaited"))
    assert score([lasting], texts("abc")).item() == 3
