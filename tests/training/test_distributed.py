"""Data-parallel training: every process has the gradients of one process over the joint batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

WORKER = Path(__file__).with_name("_ddp_worker.py")
_spec = importlib.util.spec_from_file_location("fxopt_ddp_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def check(folder, backend, sites, world=2, **tolerance):
    commands = [[sys.executable, str(WORKER), str(rank), str(world), str(folder), backend] for rank in range(world)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    try:
        for process in running:
            said, _ = process.communicate(timeout=420)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in running:
            process.kill()
    net = worker.network()
    net(worker.batch(None, world)).square().mean().backward()
    for rank in range(world):
        found = torch.load(folder / f"{rank}.pt")
        assert found["graphs"] > 1, "DDPOptimizer did not split the graph"
        assert found["counts"] == sites
        for ours, parameter in zip(found["grads"], net.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_on_the_cpu(tmp_path, sites):
    check(tmp_path, "gloo", sites)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(tmp_path, sites):
    check(tmp_path, "nccl", sites, rtol=1e-3, atol=1e-5)
