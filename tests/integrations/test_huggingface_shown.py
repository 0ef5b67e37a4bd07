"""Questions about several pictures and videos, against the model by itself on one sequence."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from integrations.test_huggingface_policy import answers, picture
from integrations.tiny_folders import PICTURES, VIDEO, processor
from integrations.tiny_models import FAMILIES, transformers
from torch import Tensor

from lvrpo.data.example import Example, Video
from lvrpo.models.huggingface.loading import make_policy
from lvrpo.models.huggingface.policy import HuggingFacePolicy
from lvrpo.testing import check_against_plain

COMPLETION = [30, 31, 32, 2]
#: Families that read videos.
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FPS = 4.0


@functools.lru_cache(maxsize=2)
def eager(name: str) -> Any:
    """The model by itself."""
    torch.manual_seed(0)
    model = FAMILIES[name].model()
    if name in VIDEOS:
        model.config.video_token_id = VIDEO
    return model


@functools.lru_cache(maxsize=2)
def policy_of(name: str) -> HuggingFacePolicy:
    return make_policy(copy.deepcopy(eager(name)), processor(name))


def film(seed: int, frames: int, height: int = 16, width: int = 16) -> Video:
    shape = (frames, 3, height, width)
    return Video(np.random.default_rng(seed).random(shape, dtype=np.float32), FPS)


def pil(pixels: np.ndarray) -> Any:
    """What a user would give a processor."""
    from PIL import Image

    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8).transpose(1, 2, 0))


def content(*parts: Any) -> list[dict[str, Any]]:
    """A user's turn as transformers takes it."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            found.append({"type": "text", "text": part})
        elif isinstance(part, Video):
            found.append({"type": "video", "video": [pil(frame) for frame in part.frames]})
        else:
            found.append({"type": "image", "image": pil(part)})
    return found


def alone(name: str, turn: list[dict[str, Any]]) -> Tensor:
    """Log-probs of the completion by the model's own forward on the processor's own inputs."""
    counts = [len(part["video"]) for part in turn if part["type"] == "video"]
    told = [{"fps": FPS, "total_num_frames": n, "frames_indices": [*range(n)]} for n in counts]
    inputs = dict(
        processor(name).apply_chat_template(
            [{"role": "user", "content": turn}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"do_sample_frames": False, "video_metadata": told} if told else {},
        )
    )
    if told:
        assert (inputs["input_ids"] == VIDEO).any()
    before = inputs["input_ids"].shape[1]
    for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            more = torch.full((1, len(COMPLETION)), int(key == "attention_mask"))
            inputs[key] = torch.cat([inputs[key], more], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([COMPLETION])], dim=1)
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"])
    with torch.no_grad():
        logits = eager(name)(**inputs, use_cache=False).logits[0, before - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(COMPLETION)[:, None])[:, 0]


def check(name: str, example: Example, *parts: Any) -> None:
    """A prompt reads `parts` in this order: in an update, and where an answer is sampled."""
    policy, expected = policy_of(name), alone(name, content(*parts))
    (pack,) = policy.packs([(example, [COMPLETION, COMPLETION])])
    with torch.no_grad():
        found = policy.forward(pack).logprobs(pack)
    plain = expected.repeat(2)
    check_against_plain(found, plain.double(), plain, scale=20.0)
    sampled = answers(policy, [example])
    with torch.no_grad():
        replayed = torch.cat(
            [policy.forward(pack).logprobs(pack) for pack in policy.packs(sampled.groups())]
        )
    check_against_plain(replayed, sampled.logprobs.double(), sampled.logprobs, scale=20.0)


def question(prompt: str, images: tuple[np.ndarray, ...] = (), videos: Any = ()) -> Example:
    first = images[0] if images else None
    return Example(
        "understand",
        "q",
        prompt,
        image=first,
        answer="w30",
        further_images=images[1:],
        videos=tuple(videos),
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_several_sizes_stand_where_they_are_marked_or_first(name):
    a, b, c = picture(0), picture(1, 24, 16), picture(2, 16, 24)
    check(name, question("w20 w21", (a, b)), a, b, "w20 w21")
    check(
        name,
        question("w20 <image> w21 <image> w22", (a, b, c)),
        *(a, "w20 ", b, " w21 ", c, " w22"),
    )
    check(name, question("<image> <image> w22", (a, a)), a, " ", a, " w22")


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_stand_among_words_and_pictures(name):
    a, b, still = film(0, 4), film(1, 3, 24, 16), picture(2)
    check(name, question("w20 w21", videos=[a]), a, "w20 w21")
    check(
        name,
        question("w20 <video> w21 <image> w22", (still,), [a, b]),
        *(a, "w20 ", b, " w21 ", still, " w22"),
    )


def test_how_fast_a_video_goes_is_part_of_the_prompt():
    reader, frames = policy_of("qwen2_5_vl").reader, film(0, 4)
    slow, fast = (
        reader.read(question("w20", videos=[frames._replace(fps=fps)])) for fps in (0.25, 4.0)
    )
    assert slow.token_ids == fast.token_ids
    assert slow.position_ids.max() > fast.position_ids.max()


@pytest.mark.parametrize(
    ("name", "example", "match"),
    [
        ("llava", question("w20", videos=[film(0, 2)]), "q: .*LlavaProcessor reads pictures alone"),
        ("llama", question("w20", videos=[film(0, 2)]), "q: the question has a video, and a llama"),
        (
            "qwen2_vl",
            question("<video> w20 <video>", videos=[film(0, 2)]),
            "q: 2 <video> in the prompt and 1 videos, expected a video for each",
        ),
        ("qwen2_vl", question("<image> w20"), "q: 1 <image> in the prompt and 0 pictures"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name, example, match):
    with pytest.raises(ValueError, match=match):
        policy_of(name).reader.read(example)


def test_a_picture_that_the_tower_has_no_positions_for():
    shown = processor("llava")
    shown.image_processor.size = {"height": 32, "width": 32}
    policy = make_policy(copy.deepcopy(eager("llava")), shown)
    with pytest.raises(ValueError, match=r"q: .* pictures of 32 x 32 pixels .* for 16 x 16"):
        policy.reader.read(question("w20", (picture(0),)))


def test_a_template_that_leaves_a_picture_out():
    shown = processor("llava")
    shown.chat_template = shown.chat_template.replace(
        "part['type'] == 'image'", "part['type'] == 'image' and loop.first"
    )
    policy = make_policy(copy.deepcopy(eager("llava")), shown)
    policy.reader.read(question("w20", (picture(0),)))
    with pytest.raises(ValueError, match="q: "):
        policy.reader.read(question("w20", (picture(0), picture(1))))


def test_a_video_of_transformers_own_processor():
    """As `Films` of the tests, where torchvision is installed."""
    pytest.importorskip("torchvision")
    shown = processor("qwen2_vl")
    shown.video_processor = transformers.Qwen2VLVideoProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False
    )
    policy = make_policy(copy.deepcopy(eager("qwen2_vl")), shown)
    prompt = policy.reader.read(question("w20", videos=[film(0, 4)]))
    assert prompt.token_ids.count(VIDEO) == 8
