"""The loop of plain_loop.py on several processes, which share parameters and groups of answers.

torchrun --nproc-per-node 2 examples/several_processes.py
"""

import argparse
import functools

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import fully_shard

import lvrpo
from lvrpo import distributed

VOCABULARY, WIDTH, LENGTH, PROMPTS, GROUP = 16, 32, 4, 8, 8
PARAMS = lvrpo.LossParams.preset("dapo")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = distributed.LossHead(nn.Linear(WIDTH, VOCABULARY))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(ids))[0]


@torch.no_grad()
def sample(model: Model, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(LENGTH):
        logits = model.head(model(ids)[:, -1])
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


def main(steps: int) -> list[float]:
    torch.distributed.init_process_group()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = Model()
    fully_shard(model.head)
    fully_shard(model)
    optimizer, means = torch.optim.Adam(model.parameters(), lr=1e-2), []
    prompts_of_step = torch.Generator().manual_seed(1)
    torch.manual_seed(rank)
    for _ in range(steps):
        # The answers to a prompt are dealt to all ranks.
        prompts = torch.randint(VOCABULARY, (PROMPTS,), generator=prompts_of_step)
        names = torch.arange(PROMPTS).repeat_interleave(GROUP // ranks)
        ids = sample(model, prompts[names][:, None])
        answers = ids[:, 1:]
        rewards = (answers == ids[:, :1]).float().mean(dim=1)
        advantages = distributed.normalize_advantages(rewards, group_ids=names)
        mask = torch.ones_like(answers, dtype=torch.bool)
        loss = functools.partial(
            lvrpo.linear_grpo_loss,
            token_ids=answers,
            old_logprobs=None,
            advantages=advantages.values,
            params=PARAMS,
            denominator=distributed.global_denominator(mask, params=PARAMS),
        )
        result = model.head(model(ids)[:, :-1], loss)
        optimizer.zero_grad()
        (result.loss * ranks).backward()  # FSDP takes the mean over ranks
        optimizer.step()
        means.append(float(advantages.stats.mean))
    torch.distributed.destroy_process_group()
    return means if rank == 0 else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    print(*(f"{mean:.2f}" for mean in main(parser.parse_args().steps)[::10]))
