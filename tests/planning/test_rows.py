"""Rows that are counted, and rows that follow from a group's numbers."""

from __future__ import annotations

import pytest
import torch
from trainer.small_policy import GROUP, prompts, small_policy

from lvrpo.models.packs import pack_groups
from lvrpo.planning.rows import Group, Rows


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("skill", ["understand", "generate"])
def test_a_group_has_the_rows_of_its_pack(skill, share_prompts):
    policy = small_policy()
    (example,) = prompts(skill, 1)
    (alone,) = pack_groups(policy, [(example, [[0]])])
    prompt = Rows.of_pack(alone)
    tokens, latents = (5, 0) if skill == "understand" else (0, policy.latent_shape[0])
    texts = [(example, [[0] * tokens] * GROUP)] if tokens else []
    pictures = [(example, GROUP)] if latents else []
    drawn = torch.zeros(GROUP, *policy.latent_shape) if latents else None
    times = torch.zeros(GROUP) if latents else None
    packs = pack_groups(policy, texts, pictures, drawn, times, share_prompts=share_prompts)
    found = sum(map(Rows.of_pack, packs), Rows())
    markers = 2 if prompt.patches else 0
    group = Group(prompt.text - markers, prompt.patches, GROUP, tokens=tokens, latents=latents)
    assert found == group.rows(share_prompts=share_prompts)


def test_pairs_are_those_that_the_mask_shows():
    policy = small_policy()
    texts = [(example, [[0] * 4, [0] * 2]) for example in prompts("understand", 3)]
    (pack,) = pack_groups(policy, texts)
    rows = Rows.of_pack(pack)
    assert rows.pairs == int(pack.batch.mask.to_dense().sum())
    assert rows.total == pack.batch.rows
    assert rows.patches == len(pack.batch.patches)


def test_rows_add_up():
    one, two = Rows(text=3, pairs=9), Rows(text=4, latents=2)
    assert one + two == Rows(text=7, latents=2, pairs=9)
    assert one + two - two == one
    assert one * 3 == one + one + one
    assert (one + two).total == 9
