"""Words of a small vocabulary as one token each, everything else as bytes.

Ids are ordered so that modalities can be masked by a range: control tokens first, which only the
program writes, then 256 bytes, <eos>, words. Text can never turn into a control token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from lvrpo.data.words import WORD

PAD, BOS, IMAGE, IMAGE_END, DRAW, DRAW_END = range(6)
CONTROL_TOKENS = ("<pad>", "<bos>", "<image>", "</image>", "<draw>", "</draw>")
FIRST_BYTE = len(CONTROL_TOKENS)
EOS = FIRST_BYTE + 256
FIRST_WORD = EOS + 1


class Tokenizer:
    """Exact round trip for every string: `decode(encode(text)) == text`.

    A single space between two known words is implied and costs no token.

    Args:
        words: the known words, each as `lvrpo.data.words` finds them; the order fixes their ids.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("Tokenizer: a word occurs twice")
        for word in self.words:
            if not WORD.fullmatch(word):
                raise ValueError(
                    f"Tokenizer: {word!r} is not a run of letters, digits and inner hyphens"
                )

    def __len__(self) -> int:
        return FIRST_WORD + len(self.words)

    @property
    def text_token_range(self) -> tuple[int, int]:
        """[low, high) of the tokens a text may hold: bytes, <eos> and words."""
        return FIRST_BYTE, len(self)

    @property
    def word_token_range(self) -> tuple[int, int]:
        """[low, high) of <eos> and words, for answers that need no bytes."""
        return EOS, len(self)

    def encode(self, text: str) -> list[int]:
        """Ids of the words and bytes of `text`; no <bos>, no <eos>."""
        ids: list[int] = []
        after_word = False
        pieces = WORD.split(text)  # gap, run, gap, run, ..., gap
        for i in range(0, len(pieces) - 1, 2):
            gap, run = pieces[i], pieces[i + 1]
            word = self._ids.get(run)
            if not (gap == " " and after_word and word is not None):
                ids += _bytes_of(gap)
            if word is None:
                ids += _bytes_of(run)
            else:
                ids.append(word)
            after_word = word is not None
        return ids + _bytes_of(pieces[-1])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control tokens and <eos> are left out; broken UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        buffer = bytearray()
        after_word = False
        for token in ids:
            if not 0 <= token < len(self):
                raise ValueError(f"Tokenizer.decode: {token} is not in [0, {len(self)})")
            if token >= FIRST_WORD:
                if after_word:
                    buffer += b" "
                buffer += self.words[token - FIRST_WORD].encode()
                after_word = True
            elif FIRST_BYTE <= token < EOS:
                buffer.append(token - FIRST_BYTE)
                after_word = False
        try:
            # Lone surrogates are legal in a Python string and must survive the round trip.
            return buffer.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return buffer.decode("utf-8", "replace")

    def name(self, token: int) -> str:
        """A readable name for one id: the control token, "<0x41>", "<eos>" or the word."""
        if token < FIRST_BYTE:
            return CONTROL_TOKENS[token]
        if token < EOS:
            return f"<0x{token - FIRST_BYTE:02x}>"
        return "<eos>" if token == EOS else self.words[token - FIRST_WORD]

    def to_json(self) -> str:
        """Everything `from_json` needs, as one line."""
        return json.dumps({"format": 1, "words": self.words}, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`.

        Raises:
            ValueError: `text` was written by something else.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != 1:
            raise ValueError("Tokenizer.from_json: not a tokenizer of format 1")
        return cls(data["words"])

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give every string the same ids, on every machine."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self.words)} words, {len(self)} tokens)"


def _bytes_of(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode("utf-8", "surrogatepass")]
