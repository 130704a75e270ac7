"""One process of a data-parallel run: `python _ddp_worker.py RANK WORLD FOLDER BACKEND`.

Takes its share of a batch through three steps of gradients and writes them, what fused and the number of graphs to
FOLDER/RANK.pt.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

import fxopt
import fxopt.backend


def network():
    """The network of the other tests; every process makes the same."""
    spec = importlib.util.spec_from_file_location("fxopt_training", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Net()


def batch(rank, world, share=2):
    """The share of `rank` (or of all, if `rank` is None) of the joint batch."""
    joint = torch.randn(world * share, 6, 16, generator=torch.Generator().manual_seed(1))
    return joint if rank is None else joint[rank * share : (rank + 1) * share]


def main(rank, world, folder, backend):
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cpu":
        fxopt.backend.compile_graph = lambda module, inputs, options: aot_eager(module, inputs)
    else:
        torch.cuda.set_device(device)
    # Buckets of a few parameters: DDPOptimizer splits the graph where one is full.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2048
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    net = network().to(device)
    model = torch.compile(DistributedDataParallel(net, bucket_cap_mb=0.004), backend="fxopt")
    with fxopt.record() as rec:
        for _ in range(3):
            model.zero_grad()
            model(batch(rank, world).to(device)).square().mean().backward()
    found = {"grads": [p.grad.cpu() for p in net.parameters()], "counts": rec.counts(), "graphs": len(rec.graphs)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
