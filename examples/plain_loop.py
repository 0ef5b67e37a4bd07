"""GRPO in a loop of your own, with torch and lvrpo alone: a model learns to repeat a token."""

import argparse

import torch
from torch import nn

import lvrpo

VOCABULARY, WIDTH, LENGTH, PROMPTS, GROUP = 16, 32, 4, 8, 8


@torch.no_grad()
def sample(model: nn.ModuleDict, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(LENGTH):
        logits = model["head"](model["body"](model["embedding"](ids))[0][:, -1])
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


def main(steps: int) -> list[float]:
    torch.manual_seed(0)
    body = nn.GRU(WIDTH, WIDTH, batch_first=True)
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    model = nn.ModuleDict({"embedding": embedding, "body": body, "head": head})
    optimizer, means = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        prompts = torch.randint(VOCABULARY, (PROMPTS, 1)).repeat_interleave(GROUP, dim=0)
        ids = sample(model, prompts)
        answers = ids[:, 1:]
        rewards = (answers == prompts).float().mean(dim=1)
        advantages = lvrpo.normalize_advantages(rewards, GROUP).values
        hidden = body(embedding(ids))[0][:, :-1]  # [B, C, H]: the row before each token
        loss = lvrpo.linear_grpo_loss(
            hidden, head.weight, answers, None, advantages, bias=head.bias
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(float(rewards.mean()))
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    print(*(f"{mean:.2f}" for mean in main(parser.parse_args().steps)[::10]))
