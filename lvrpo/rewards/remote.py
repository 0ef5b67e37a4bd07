"""A reward behind an HTTP endpoint: batches, several requests at a time, retries, a time limit."""

from __future__ import annotations

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvrpo.rewards.reward import Samples

#: Answers of a server that may be another one the next time.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: Bytes of an answer that are read; a server that sends more is none of rewards.
_MOST_BYTES = 64 << 20


class EndpointError(RuntimeError):
    """An endpoint has no scores for a batch, however often it was asked."""


@dataclass(frozen=True)
class HttpReward:
    """Scores by POST of {"samples": [...]}, answered by {"scores": [...]}, one number or null each.

    A sample is {"uid", "task", "prompt", "answers", "extra", "text", "finish_reason", "image",
    "edited"}; the last two are the drawing as PNG in base64, null for a text, and a list of the
    pictures that were to be edited.

    Args:
        url: http or https.
        batch_size: samples in a request.
        requests: at a time.
        seconds: that one request may take.
        retries: of a request that times out, is refused, or is answered by 408, 425, 429 or 5xx.
        backoff: seconds before the first retry, doubled for each further one; where the server says
            how long to wait (Retry-After), that long, `seconds` at most.
        headers: of every request, as {"Authorization": "Bearer ..."}.
        name: for reports.
    """

    url: str
    batch_size: int = 32
    requests: int = 4
    seconds: float = 60.0
    retries: int = 3
    backoff: float = 0.5
    headers: Mapping[str, str] = field(default_factory=dict)
    name: str = "http"
    may_be_nan: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"HttpReward: url is {self.url!r}, expected http:// or https://")
        for name, least in (("batch_size", 1), ("requests", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"HttpReward: {name} is {getattr(self, name)}, expected a number >= {least}"
                )
        if not self.seconds > 0:
            raise ValueError(f"HttpReward: seconds is {self.seconds}, expected a number > 0")

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32, NaN where the endpoint says null.

        Raises:
            EndpointError: a batch was refused, or failed more than `retries` times, or was answered
                by something else than one number or null for each of its samples.
        """
        sent = [_as_json(samples, row) for row in range(len(samples))]
        batches = [sent[i : i + self.batch_size] for i in range(0, len(sent), self.batch_size)]
        with ThreadPoolExecutor(self.requests, thread_name_prefix="lvrpo http") as pool:
            found = list(pool.map(self._score, batches))
        return torch.tensor([score for scores in found for score in scores])

    def _score(self, batch: list[dict[str, Any]]) -> list[float]:
        request = urllib.request.Request(
            self.url,
            json.dumps({"samples": batch}).encode(),
            {"Content-Type": "application/json", **self.headers},
            method="POST",
        )
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return self._read(response.read(_MOST_BYTES), len(batch))
            except urllib.error.HTTPError as error:
                failure: Exception = error
                if error.code not in _PASSING:
                    break
                wait = _asked_to_wait(error, wait)
            except OSError as error:  # URLError, timeouts and broken connections are ones
                failure = error
            if attempt < self.retries:
                time.sleep(min(wait, self.seconds))
        raise EndpointError(
            f"{self.url}: {type(failure).__name__}: {failure}, asked {attempt + 1} times"
        ) from failure

    def _read(self, body: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(body)["scores"]
            found = [math.nan if score is None else _number(score) for score in scores]
        except (ValueError, TypeError, KeyError) as error:
            raise EndpointError(
                f"{self.url} answered {body[:80]!r}, expected "
                '{"scores": [...]} of numbers and nulls'
            ) from error
        if len(found) != count:
            raise EndpointError(f"{self.url} answered {len(found)} scores for {count} samples")
        return found


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _asked_to_wait(error: urllib.error.HTTPError, otherwise: float) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:  # none, or a date
        return otherwise


def _as_json(samples: Samples, row: int) -> dict[str, Any]:
    example = samples.examples[row]
    image, edited = None, []
    if samples.texts[row] is None and samples.images is not None:
        image = _png(samples.images[list(samples.image_index).index(row)])
        edited = [_png(torch.from_numpy(picture)) for picture in example.images]
    return {
        "uid": example.uid,
        "task": example.task,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "extra": dict(example.extra),
        "text": samples.texts[row],
        "finish_reason": samples.finish_reasons[row],
        "image": image,
        "edited": edited,
    }


def _png(image: Tensor) -> str:
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(picture.contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
