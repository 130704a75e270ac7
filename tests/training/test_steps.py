"""All that a training loop does around a compiled model: it gives what eager mode gives, with the fusions inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def x():
    return torch.randn(3, 6, 16)


def loss(model, x):
    return model(x).float().square().mean()


def test_gradients_of_inputs_and_parameters(net, twins, recorder, sites, same_gradients, x):
    compiled, ours, eager = twins(net())
    a, b = (x.clone().requires_grad_() for _ in range(2))
    loss(compiled, a).backward()
    loss(eager, b).backward()
    same_gradients(ours, eager)
    torch.testing.assert_close(a.grad, b.grad)
    assert recorder.counts() == sites


def test_frozen_parameters_get_none(net, twins, recorder, sites, same_gradients, x):
    model = net()
    for parameter in [*model.blocks[0].parameters(), model.blocks[1].before.weight]:
        parameter.requires_grad_(False)
    compiled, ours, eager = twins(model)
    for run in (compiled, eager):
        loss(run, x).backward()
    same_gradients(ours, eager)
    assert ours.blocks[0].mlp.weight.grad is None
    assert recorder.counts() == sites


def test_only_the_input_is_differentiated(net, twins, recorder, sites, x):
    compiled, _, eager = twins(net().requires_grad_(False))
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(loss(run, x), x)[0] for run in (compiled, eager))
    torch.testing.assert_close(ours, theirs)
    assert recorder.counts() == sites


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason='torch 2.11 loses the gradient with backend="aot_eager" too'
)
def test_thawing_a_parameter_later(net, twins, same_gradients, x):
    compiled, ours, eager = twins(net().requires_grad_(False))
    torch.testing.assert_close(compiled(x), eager(x))
    for model in (ours, eager):
        model.blocks[0].before.weight.requires_grad_()
    for run in (compiled, eager):
        loss(run, x).backward()
    same_gradients(ours, eager)


def test_tied_weights(net, twins, recorder, sites, same_gradients, x):
    model = net()
    model.blocks[1].mlp.weight = model.blocks[0].mlp.weight
    model.blocks[1].before.weight = model.blocks[0].before.weight
    model.blocks[1].between.weight = model.blocks[0].before.weight
    compiled, ours, eager = twins(model)
    for run in (compiled, eager):
        loss(run, x).backward()
    same_gradients(ours, eager)
    assert recorder.counts() == sites


@pytest.mark.parametrize(
    "optimiser, set_to_none",
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), True),
        (lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, foreach=True), False),
    ],
    ids=["SGD", "AdamW"],
)
def test_steps_and_accumulation(net, twins, recorder, sites, x, optimiser, set_to_none):
    """Parameters change in place between calls; nothing of their values was kept, nothing is compiled again.

    AdamW's eps is above rounding errors: the gradient of the keys' bias is zero, and its sign would be noise.
    """
    compiled, ours, eager = twins(net())
    for run, model in ((compiled, ours), (eager, eager)):
        step = optimiser(model.parameters())
        for _ in range(3):
            for part in (x, x.flip(0)):  # accumulated
                (loss(run, part) / 2).backward()
            step.step()
            step.zero_grad(set_to_none=set_to_none)
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert len(recorder.graphs) == 1
    assert recorder.counts() == sites


def test_parameters_written_by_hand(net, twins, recorder, same_gradients, x):
    compiled, ours, eager = twins(net())
    for run, model in ((compiled, ours), (eager, eager)):
        for write in (lambda p: p.mul_(0.5), lambda p: p.data.copy_(p.data.flip(0)), lambda p: p.add_(0.1)):
            with torch.no_grad():
                write(model.blocks[0].before.weight)
                write(model.blocks[0].mlp.weight)
            loss(run, x).backward()
    same_gradients(ours, eager)
    assert len(recorder.graphs) == 1


def test_clipping_and_hooks_on_gradients(net, twins, same_gradients, x):
    compiled, ours, eager = twins(net())
    norms = []
    for run, model in ((compiled, ours), (eager, eager)):
        handle = model.blocks[0].before.weight.register_hook(lambda grad: grad * 3)
        loss(run, x).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        handle.remove()
    torch.testing.assert_close(*norms)
    same_gradients(ours, eager)


def test_retained_graphs(net, twins, same_gradients, x):
    compiled, ours, eager = twins(net())
    for run in (compiled, eager):
        value = loss(run, x)
        value.backward(retain_graph=True)
        value.backward()
    same_gradients(ours, eager)


def test_double_backward_is_refused_as_by_any_compiled_graph(net, twins, x):
    compiled, _, _ = twins(net())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(compiled, x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_train_and_eval_switches(net, twins, recorder, x):
    """Active dropout keeps attention as it is, and draws the same numbers; in eval the same model fuses."""
    compiled, ours, eager = twins(net(dropout=0.5))
    for mode in (True, False, True, False):
        ours.train(mode), eager.train(mode)
        results = []
        for run in (compiled, eager):
            torch.manual_seed(3)
            results.append(run(x))
        torch.testing.assert_close(*results)
    assert [g.counts() if hasattr(g, "counts") else len(g.sites) for g in recorder.graphs] == [4, 6]
    assert any("dropout" in miss.reason for miss in recorder.graphs[0].misses)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_inside_sdpa(p, recorder):
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    results = []
    for run in (F.scaled_dot_product_attention, torch.compile(F.scaled_dot_product_attention, backend="fxopt")):
        torch.manual_seed(3)
        out = run(q, k, v, dropout_p=p)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert recorder.counts() == ({"attention": 1} if p == 0 else {})


def as_near(ours, eager, exact, times=2.0):
    """Gradients as near to float64 as eager mode's, largest error of each parameter relative to its largest entry."""
    for (name, mine), theirs, truth in zip(
        ours.named_parameters(), eager.parameters(), exact.parameters(), strict=True
    ):
        scale = truth.grad.abs().max()
        own = (theirs.grad.double() - truth.grad).abs().max() / scale
        error = (mine.grad.double() - truth.grad).abs().max() / scale
        assert error <= times * own + 2 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(net, twins, recorder, sites, x, inside):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                return self.net(x)

    compiled, ours, eager = twins(Wrapped())
    exact = twins(eager)[2].double()
    torch.autograd.backward(loss(exact.net, x.double()))
    for run in (compiled, eager):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            value = (
                loss(run, x)
                if inside
                else loss(run.net if run is eager else torch.compile(ours.net, backend="fxopt"), x)
            )
        value.backward()
    as_near(ours, eager, exact)
    assert recorder.counts() == sites


def test_gradient_scaler(net, twins, recorder, sites, x):
    """float16 on the CPU: the scaled gradients overflow in the first step, which is skipped, and not in the second."""
    compiled, ours, eager = twins(net())
    scales = []
    for run, model in ((compiled, ours), (eager, eager)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        step = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                value = loss(run, x)
            scaler.scale(value).backward()
            scaler.step(step)
            scaler.update()
            step.zero_grad()
            scales.append(scaler.get_scale())
    assert scales[:3] == scales[3:] == [2.0**10] * 3
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    assert recorder.counts() == sites


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(net, twins, recorder, sites, same_gradients, x, reentrant):
    compiled, ours, eager = twins(net(reentrant=reentrant))
    x.requires_grad_()  # reentrant checkpoints ask for it
    for run in (compiled, eager):
        loss(run, x).backward()
    same_gradients(ours, eager)
    assert recorder.counts() == sites


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_compiled_model(net, twins, recorder, sites, same_gradients, x, reentrant):
    """Compiling under the checkpoint's hooks saves nothing that it would count."""
    compiled, ours, eager = twins(net())
    x.requires_grad_()
    for run in (compiled, eager):
        checkpoint(run, x, use_reentrant=reentrant).square().mean().backward()
    same_gradients(ours, eager)
    assert recorder.counts().keys() == sites.keys()


def test_checkpoints_under_autocast_with_dropout(net, twins, same_gradients, x):
    compiled, ours, eager = twins(net(dropout=0.5, reentrant=False))
    for run in (compiled, eager):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(run, x)
        value.backward()
    same_gradients(ours, eager, rtol=0.05, atol=2e-3)


def test_saved_tensor_hooks_see_only_the_run(net, twins, x):
    compiled, _, _ = twins(net())
    seen = []
    for _ in range(2):
        seen.append(0)

        def pack(tensor):
            seen[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            compiled(x)
    assert seen[0] == seen[1] > 0


@pytest.mark.slow
def test_dynamic_batches(net, twins, recorder, sites, same_gradients, x):
    compiled, ours, eager = twins(net())
    for rows in (6, 4, 5, 1):
        for run in (compiled, eager):
            loss(run, x[:, :rows]).backward()
    same_gradients(ours, eager)
    assert all(len(graph.sites) == sum(sites.values()) for graph in recorder.graphs)
