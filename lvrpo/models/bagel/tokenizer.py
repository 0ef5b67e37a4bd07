"""The words of BAGEL: Qwen2.5's tokenizer, and the four tokens that its chat is made of."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


class ChatTokenizer(Protocol):
    """What a policy asks of a tokenizer."""

    @property
    def start(self) -> int:
        """Before a text."""

    @property
    def end(self) -> int:
        """After it."""

    @property
    def markers(self) -> tuple[int, int]:
        """Before and after a picture."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, which can never turn into one of the four."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""


class QwenTokenizer:
    """A `ChatTokenizer` from the files of a folder.

    Args:
        files: of a published folder, by name.
        vocab_size: of the model that embeds its tokens.

    Raises:
        ModuleNotFoundError: transformers is not installed; says what to install.
        ValueError: the files are no tokenizer, it lacks a token of the chat, or it has more tokens
            than the model.
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int) -> None:
        self._tokenizer = _read(files)
        # Whoever writes "<|im_end|>" into a prompt has written ten characters.
        self._tokenizer.encode_special_tokens = True
        names = START, END, VISION_START, VISION_END
        ids = {name: self._tokenizer.token_to_id(name) for name in names}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}, expected Qwen2.5's")
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= vocab_size:
            raise ValueError(
                f"the tokenizer has a token {largest}, the model's vocabulary has {vocab_size}: "
                "they are not of one folder"
            )
        self.start, self.end = ids[START], ids[END]
        self.markers = ids[VISION_START], ids[VISION_END]

    def encode(self, text: str) -> list[int]:
        """See `ChatTokenizer`."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """See `ChatTokenizer`."""
        found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return found


def _read(files: Mapping[str, bytes]) -> Any:
    """A `tokenizers.Tokenizer`; transformers knows how to make one of whichever files there are."""
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "not installed: transformers, which reads BAGEL's tokenizer: "
            "pip install 'lvrpo[transformers]'",
            name="transformers",
        )
    from transformers import Qwen2Tokenizer

    own = {name: files[name] for name in TOKENIZER_FILES if name in files}
    if "tokenizer.json" not in own and not {"vocab.json", "merges.txt"} <= own.keys():
        raise ValueError(
            "the folder has no tokenizer.json, and not both vocab.json and merges.txt, expected "
            "the files of Qwen2.5's tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in own.items():
            (Path(folder) / name).write_bytes(content)
        return Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
