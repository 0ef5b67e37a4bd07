"""Where a policy is, in which precision it computes, and which part of its weights a process has.

bf16 and shards are one mechanism, FSDP2 (`fully_shard`), for one process and for many: parameters,
gradients, optimizer and average stay in fp32, and what a forward or backward pass computes with is
a copy in bf16 that is made before it. Autocast would make that copy at every op, so at every token
of a rollout, and keeps norms in fp32, which a bf16 model does not; bf16 modules with fp32 copies in
the optimizer would have to be kept alike by hand, and add gradients up in bf16.

Of a policy that is not sharded every process has all of the weights: its mesh is of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lvrpo.models.protocol import Policy
from lvrpo.trainer.config import ConfigError, RunSection

#: By what is trained: names of its parameters that have had a gradient since the last update.
_USED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def run_device(name: str) -> torch.device:
    """The device that `run.device` names, for this process.

    Args:
        name: "" for the CPU, or "cpu", "cuda" or "cuda:N"; "cuda" is the GPU of the process's rank
            on its node under torchrun, and else the first.

    Raises:
        ConfigError: there is no such device here.
    """
    given = f"run.device is {name!r}"
    kind, colon, index = name.partition(":")
    if kind not in ("", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"{given}, expected '' or 'cpu', 'cuda' or 'cuda:N'")
    if kind != "cuda":
        return torch.device("cpu")
    started = torch.distributed.is_torchelastic_launched()
    if colon and started:
        raise ConfigError(
            f"{given}, expected 'cuda' under torchrun: every process has a GPU of its own"
        )
    local = torch.distributed.get_node_local_rank(fallback_rank=0)
    number = int(index) if colon else local
    there = torch.cuda.device_count()
    if number >= there:
        needs = f"process {local} of this node needs GPU {number}" if started else f"GPU {number}"
        raise ConfigError(
            f"{given}, expected a GPU that is there: {needs}, torch sees {there} of them; '' is "
            "the CPU"
        )
    return torch.device("cuda", number)


def compute_dtype(run: RunSection, policy: Policy) -> torch.dtype:
    """What the policy's weights are in a pass."""
    return torch.bfloat16 if run.precision == "bf16" else next(policy.module.parameters()).dtype


def place_trained(policy: Policy, run: RunSection) -> Policy:
    """A policy that is trained, on its device; what it had is moved there.

    Raises:
        ConfigError: there is no such device.
    """
    device = run_device(run.device)
    if run.precision == "fp32" and not _is_shared(run):
        return policy.to(device)
    shared = _shard(policy, run, device)
    placed = policy.to(device).renewed()
    if shared:
        _note_gradients(placed)
    return placed


def place_frozen(policy: Policy, run: RunSection) -> Policy:
    """A policy that is not trained, on its device and in the precision of a pass, in place.

    Raises:
        ConfigError: there is no such device.
    """
    device = run_device(run.device)
    policy.network.requires_grad_(False)
    if run.precision == "bf16":
        policy.network.to(torch.bfloat16)
    shared = _is_shared(run)
    if shared:
        _shard(policy, run, device)
    placed = policy.to(device)
    # Or else `module` would keep what has been sharded whole.
    return placed.renewed() if shared else placed


def _is_shared(run: RunSection) -> bool:
    """Whether there are other processes to share weights with, and it is wanted."""
    there = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return run.shard and there


def _shard(policy: Policy, run: RunSection, device: torch.device) -> bool:
    """Give every block a group of its own, and all else one; whether ranks share the parameters.

    All else are the parts that some passes leave out, as a tower without pictures: ranks gather
    what they share in the same order, so what is left out has to be in a group that no pass leaves
    out.
    """
    mesh = _mesh(run, device)
    parameters = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if run.precision == "bf16" else None,
        reduce_dtype=torch.float32 if run.precision == "bf16" else None,
        cast_forward_inputs=False,  # a policy narrows what its weights multiply, and nothing else
    )
    shared = mesh.size() > 1
    for module in (*policy.blocks, policy.network):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=parameters,
            reshard_after_forward=shared and module is not policy.network,
        )
        assert isinstance(module, FSDPModule)
        # The losses of the ranks add up, and so do gradients; gloo can do nothing else in fp32.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    network = policy.network
    assert isinstance(network, FSDPModule)
    if shared:
        network.set_reduce_scatter_unused_params(True)
    return shared


@contextlib.contextmanager
def leaves_no_group() -> Iterator[None]:
    """At the end there are other processes to talk to only if there were any before."""
    joined = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not joined:
            torch.distributed.destroy_process_group()


def _mesh(run: RunSection, device: torch.device) -> DeviceMesh:
    if not torch.distributed.is_initialized():
        # A mesh is of a group, and this one of this process alone.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    size = torch.distributed.get_world_size()
    if run.shard:
        return init_device_mesh(device.type, (size,))
    names = ("replicas", "parts")
    return init_device_mesh(device.type, (size, 1), mesh_dim_names=names)["parts"]


@contextlib.contextmanager
def whole(*policies: Policy) -> Iterator[None]:
    """Inside, every process has all of the weights, gathered once, and no pass is trained on.

    So processes may make as many passes as each of them likes.
    """
    networks = {id(policy.network): policy.network for policy in policies}.values()
    with contextlib.ExitStack() as stack, torch.no_grad():
        for network in networks:
            if isinstance(network, FSDPModule):
                stack.enter_context(_gathered(network))
        yield


@contextlib.contextmanager
def _gathered(network: FSDPModule) -> Iterator[None]:
    assert isinstance(network, nn.Module)
    modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    network.set_reshard_after_forward(False)
    passes: list[bool] = []
    counting = network.register_forward_pre_hook(lambda *_: passes.append(True))
    try:
        yield
    finally:
        counting.remove()
        if passes:
            # Forgets the order of the passes, which processes need not have alike.
            network.reset_iter_state()
        for module in modules:
            module.reshard()
        for block in modules[1:]:
            assert isinstance(block, nn.Module)
            block.set_reshard_after_forward(any(map(is_split, block.parameters())), recurse=False)


def is_split(tensor: Tensor) -> bool:
    """Whether other processes have parts of a tensor."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1


def _note_gradients(policy: Policy) -> None:
    """From now on know which of the parameters that ranks share have a gradient on this one.

    FSDP gives the others zeros, which an optimizer with momentum does not take for nothing.
    """
    used = _USED[policy.module] = set()
    names = {id(parameter): name for name, parameter in policy.module.named_parameters()}
    for module in policy.network.modules():
        if not isinstance(module, FSDPModule):
            continue
        sharded = {name: id(p) for name, p in module.named_parameters()}
        module.unshard()
        for name, parameter in module.named_parameters():
            full = names.get(sharded[name])
            if full is not None and not isinstance(parameter, DTensor) and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, full=full: used.add(full))
        module.reshard()


def leave_unused(module: nn.Module) -> None:
    """Take the gradient from parameters that are sharded and that no rank has used."""
    used = _USED.get(module)
    if used is None:
        return
    named = dict(module.named_parameters())
    flags = torch.tensor([name in used for name in named], dtype=torch.uint8)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    for parameter, is_used in zip(named.values(), flags.tolist(), strict=True):
        if not is_used:
            parameter.grad = None
    used.clear()


def as_stored(tensor: Tensor) -> Tensor:
    """A tensor that this process has all of as a plain one; others are DTensors and stay so."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.size() == 1:
        return tensor.to_local()
    return tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; those that have parts of it all call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like_stored(stored: Tensor, own: Tensor) -> Tensor:
    """What `as_stored` gave, here or in processes of another number, placed as `own` is."""
    if isinstance(stored, DTensor) or not isinstance(own, DTensor):
        return stored if isinstance(own, DTensor) else whole_tensor(stored)
    return distribute_tensor(stored, own.device_mesh, own.placements, src_data_rank=None)
