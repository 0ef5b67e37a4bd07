"""Rewards by models of transformers, against the models called directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integrations.tiny_folders import processor, tokenizer
from integrations.tiny_models import FAMILIES, SIGLIP, SIZES, transformers

from lvrpo.data.example import Example
from lvrpo.rewards.boxes import Box
from lvrpo.rewards.detection import COLORS, ObjectColors, ObjectDetector
from lvrpo.rewards.geneval import Detection
from lvrpo.rewards.registry import load_reward
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score
from lvrpo.rewards.siglip import SiglipEncoder

torch.manual_seed(0)
KINDS = ("siglip", "siglip2")
POSITIONS = 24


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A tiny model of random weights, as its publishers save one."""
    path = tmp_path_factory.mktemp(request.param)
    text = {name: SIZES[name] for name in ("vocab_size", "num_hidden_layers", "pad_token_id")}
    text |= {name: SIGLIP[name] for name in ("hidden_size", "intermediate_size")}
    text |= {"num_attention_heads": 2, "max_position_embeddings": POSITIONS, "projection_size": 16}
    vision = dict(SIGLIP)
    if request.param == "siglip2":
        del vision["image_size"]
        vision["num_patches"] = 16
        images = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20)
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model = transformers.Siglip2Model(config)
    else:
        images = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
    model.save_pretrained(path)
    images.save_pretrained(path)
    words = letters() if request.param == "siglip2" else tokenizer()
    words.save_pretrained(path)
    return path


def letters():
    """The tokenizer of SigLIP 2, without a merge."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary = {letter: n for n, letter in enumerate([*special, "\u2581", *"w0123456789,and"])}
    return transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[])


def drawings(count, height=16, width=16, **extra):
    prompts = ["w20 w21 and w22", "w23", "w24 w25, w26"][:count]
    examples = [Example("generate", p, p, extra=extra) for p in prompts]
    pixels = torch.randint(0, 256, (count, 3, height, width)).float() / 255
    return Samples.of_images(examples, pixels)


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def direct(folder, samples, phrases):
    """Unit vectors [N, D] of pictures, [P, D] of the patches of each, and [Q, D] of phrases."""
    model = transformers.AutoModel.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = words(phrases, padding="max_length", max_length=POSITIONS, return_tensors="pt")
    pictures, patches = [], []
    with torch.no_grad():
        for image in samples.images:
            given = images((image * 255).round().to(torch.uint8).numpy(), return_tensors="pt")
            seen = model.get_image_features(**given)
            pictures.append(unit(seen.pooler_output)[0])
            hidden = seen.last_hidden_state[0]
            if "pixel_attention_mask" in given:
                hidden = hidden[given["pixel_attention_mask"][0].bool()]
            patches.append(
                unit(torch.cat([model.vision_model.head(h[None, None]) for h in hidden]))
            )
        return torch.stack(pictures), patches, unit(model.get_text_features(**text).pooler_output)


def pooled(similarity, pool):
    """[P] similarities to one, by the definition."""
    ordered = sorted(similarity.tolist(), reverse=True)
    if pool == "max":
        return ordered[0]
    if pool == "topk":
        return sum(ordered[:3]) / 3
    weights = np.exp(10 * np.array(ordered))
    return float((weights / weights.sum() * np.array(ordered)).sum())


@pytest.mark.parametrize("pool", ["max", "topk", "softmax"])
@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_the_dense_form(folder, pool, size):
    samples = drawings(3, *size)
    phrases = [["w20 w21", "w22"], ["w23"], ["w24 w25", "w26"]]
    _, patches, texts = direct(folder, samples, [p for each in phrases for p in each])
    wanted, at = [], 0
    for n, each in enumerate(phrases):
        found = [pooled(patches[n] @ texts[at + q], pool) for q in range(len(each))]
        wanted.append(sum(found) / len(found))
        at += len(each)
    reward = load_reward("siglip", arguments={"path": str(folder), "pool": pool, "top_k": 3})
    assert score([reward], samples)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_global_form(folder):
    samples = drawings(3)
    pictures, _, texts = direct(folder, samples, [e.prompt for e in samples.examples])
    arguments = {"path": str(folder), "form": "global", "batch_size": 2}
    found = score([load_reward("siglip", arguments=arguments)], samples)[:, 0]
    assert found.tolist() == pytest.approx((pictures * texts).sum(dim=1).tolist(), abs=1e-5)


@pytest.mark.parametrize("form", ["dense", "global"])
def test_phrases_and_negative_phrases_of_the_data(folder, form):
    phrases, negative = ["w30", "w31"], ["w40"]
    samples = drawings(1, phrases=phrases, negative_phrases=negative)
    listed = [*phrases, *negative] if form == "dense" else [", ".join(phrases), *negative]
    pictures, patches, texts = direct(folder, samples, listed)
    found = texts @ pictures[0]
    if form == "dense":
        found = torch.tensor([pooled(patches[0] @ text, "softmax") for text in texts])
    wanted = found[:-1].mean() - 0.5 * found[-1]
    arguments = {"path": str(folder), "form": form, "negative_weight": 0.5}
    given = score([load_reward("siglip", arguments=arguments)], samples)
    assert float(given) == pytest.approx(float(wanted), abs=1e-5)


def test_what_siglip_cannot_score(folder):
    reward = load_reward("siglip", arguments={"path": str(folder)})
    long = Example("generate", "l", " ".join(["w20"] * 2 * POSITIONS))
    assert score([reward], Samples.of_images([long], torch.zeros(1, 3, 16, 16))).isnan().all()
    text = Example("understand", "q", "what", image=np.zeros((3, 16, 16), np.float32), answer="1")
    assert score([reward], Samples.of_texts([text], ["1"])).isnan().all()
    with pytest.raises(RewardError, match=r"phrases of .* is 'w20', expected a list of phrases"):
        score([reward], drawings(1, phrases="w20"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    family = FAMILIES["llava"]
    transformers.AutoModelForImageTextToText.from_config(family.config()).save_pretrained(path)
    processor("llava").save_pretrained(path)
    return path


def test_vqa_is_the_probability_of_the_answer(llava):
    samples = drawings(2, questions=[["w30 w31", "w40 w41"], ["w32", "w42"]])
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava).eval()
    made = transformers.AutoProcessor.from_pretrained(llava)
    wanted = []
    for image in samples.images:
        found = []
        for question, answer in samples.examples[0].extra["questions"]:
            ids = made.tokenizer(answer, add_special_tokens=False).input_ids
            # The answer written behind the prompt, as words that the tokenizer keeps apart.
            given = made(
                text=f"w10 <image> {question} w11 {answer}",
                images=(image * 255).to(torch.uint8),
                return_tensors="pt",
            )
            with torch.no_grad():
                table = model(**given).logits[0].softmax(dim=-1)
            rows = table[-len(ids) - 1 : -1]
            found.append(float(rows[range(len(ids)), ids].prod()))
        wanted.append(sum(found) / len(found))
    reward = load_reward("vqa", arguments={"path": str(llava)})
    assert score([reward], samples)[:, 0].tolist() == pytest.approx(wanted, rel=1e-4)


def test_vqa_asks_about_the_whole_prompt(llava):
    samples = drawings(1)
    asked = drawings(1, questions=[["w9 w20 w21 and w22 w9", "w50"]])
    arguments = {"path": str(llava), "question": "w9 {prompt} w9", "answer": "w50"}
    reward = load_reward("vqa", arguments=arguments)
    asked = Samples.of_images(asked.examples, samples.images)
    assert score([reward], samples).tolist() == score([reward], asked).tolist()
    with pytest.raises(RewardError, match=r"questions of .* has 'w9', expected \[question, answer"):
        score([reward], drawings(1, questions=["w9"]))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    path = tmp_path_factory.mktemp("yolos")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[32, 32], patch_size=8, num_detection_tokens=6,
        id2label={0: "Cup", 1: "mouse", 2: "dog"},
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    for layer in (model.class_labels_classifier, model.bbox_predictor):
        for weight in layer.parameters():  # objects that differ
            torch.nn.init.normal_(weight, std=1.5)
    model.save_pretrained(path)
    transformers.YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def test_objects_are_those_of_the_model(yolos):
    images = torch.randint(0, 256, (5, 3, 24, 40)).float() / 255
    detector = ObjectDetector.from_pretrained(str(yolos), least=0.2, batch_size=2)
    found = detector(images)
    model = transformers.AutoModelForObjectDetection.from_pretrained(yolos).eval()
    prepare = transformers.AutoImageProcessor.from_pretrained(yolos)
    names, count = ["cup", "computer mouse", "dog"], 0
    for image, given in zip(images, found, strict=True):
        with torch.no_grad():
            seen = model(**prepare((image * 255).round().to(torch.uint8), return_tensors="pt"))
        sure, label = seen.logits[0].softmax(dim=-1)[:, :-1].max(dim=-1)
        x, y, w, h = (seen.pred_boxes[0] * torch.tensor([40, 24, 40, 24])).unbind(dim=1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
        kept = (sure > 0.2).nonzero().flatten().tolist()
        assert [each.box.label for each in given] == [names[label[n]] for n in kept]
        assert [each.confidence for each in given] == pytest.approx(sure[kept].tolist(), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor([each.box[:4] for each in given]).view(-1, 4), corners[kept]
        )
        count += len(kept)
    assert count > 5


def test_the_colour_is_the_nearest_of_the_object_alone(folder):
    encoder = SiglipEncoder.from_pretrained(str(folder))
    image = torch.rand(3, 24, 24)
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[4:12, 8:20] = True
    box = Box(8, 4, 20, 12, "w20")
    alone = torch.where(mask, image, torch.tensor(0x99 / 255))[:, 4:12, 8:20]
    for thing, crop in (
        (Detection(box, 0.9), image[:, 4:12, 8:20]),
        (Detection(box, 0.9, mask), alone),
        (Detection(box._replace(x1=-3.0, x2=99.0), 0.9), image[:, 4:12]),
        (Detection(Box(30, 30, 40, 40, "w20"), 0.9), image[:, 23:, 23:]),
    ):
        words = []
        for color in COLORS:
            said = [f"a photo of a {color} w20", f"a photo of a {color}-colored w20",
                    f"a photo of a {color} object"]  # fmt: skip
            words.append(unit(encoder.encode_phrases(said).mean(dim=0)))
        picture, _ = encoder.encode_images(crop[None])
        wanted = COLORS[int((torch.stack(words) @ picture[0]).argmax())]
        assert ObjectColors(encoder)(image, [thing, thing]) == [wanted] * 2


def test_geneval_by_its_short_name(yolos, folder):
    arguments = {"path": str(yolos), "color_path": str(folder), "strict_weight": 0.5}
    reward = load_reward("geneval", arguments=arguments)
    include = [{"class": "zebra", "count": 1, "color": "red"}]
    asked = drawings(2, include=include, exclude=[{"class": "zebra", "count": 1}], tag="colors")
    assert score([reward], asked)[:, 0].tolist() == [0.25, 0.25]
