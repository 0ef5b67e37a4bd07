"""What the 1,000 classes of ImageNet are: WordNet's words for them, and its definitions.

They are texts in timm's wheel (Apache-2.0; WordNet's licence is as free), which is read as the zip
file that it is and not installed: transformers would take notice of an installed one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from lvrpo.real.packages import check_sha256

WHEEL = "timm-1.0.31-py3-none-any.whl"
INSTALL = "pip download --no-deps timm==1.0.31 --dest"
SHA256 = "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7"
#: Where the wheel has its texts.
TEXTS = "timm/data/_info/imagenet_"


def why_not(folder: Path) -> str:
    """What to download before they can be read, or "".

    Args:
        folder: where the wheel is.
    """
    return "" if (folder / WHEEL).is_file() else f"{folder} has no {WHEEL}; {INSTALL} {folder}"


def descriptions(folder: Path) -> list[str]:
    """As "running shoe: a light comfortable shoe designed for running", in the order of classes.

    Args:
        folder: where the wheel is.

    Raises:
        FileNotFoundError: it is not there; says what to download.
        ValueError: it is another one.
    """
    if reason := why_not(folder):
        raise FileNotFoundError(reason)
    check_sha256(folder / WHEEL, SHA256)
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        synsets, words, definitions = (
            wheel.read(f"{TEXTS}{name}.txt").decode().splitlines()
            for name in ("synsets", "synset_to_lemma", "synset_to_definition")
        )
    word_of, definition_of = (
        dict(line.split("\t") for line in lines) for lines in (words, definitions)
    )
    return [f"{word_of[synset]}: {definition_of[synset]}" for synset in synsets]
