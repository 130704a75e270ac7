"""A rival's judgement of ours: the forms of PyTorch's own fused-attention tests, through Inductor and through fxopt.

`python tests/rivals/test_torch_forms.py` writes the table in docs/torch-forms.md; the tests compare with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import fxopt
import torch_forms as _forms
from fxopt.testing import without_inductor

FORMS = _forms.FORMS

PAGE = Path(__file__).parents[2] / "docs" / "torch-forms.md"
HEAD = "| form | Inductor's pattern | right | Inductor | fxopt |\n|---|---|---|---|---|\n"


def ours(form):
    """(sites, the reasons where there is none, the largest error against eager mode)."""
    torch.manual_seed(0)
    inputs = form.inputs()
    with torch.no_grad(), without_inductor(), fxopt.record() as rec:
        found = torch.compile(form.program, backend="fxopt")(*(x.clone() for x in inputs))
        error = worst(found, form.program(*(x.clone() for x in inputs)))
    return rec.counts().get("attention", 0), [miss.reason for miss in rec.misses if miss.fusion == "attention"], error


def theirs(form):
    """(sites, the largest error against eager mode) of Inductor's passes; what they make is run op by op."""
    from torch._inductor.compile_fx import compile_fx

    def backend(graph, inputs):
        return compile_fx(graph, inputs, inner_compile=lambda inner, *_, **__: inner.forward)

    torch.manual_seed(0)
    inputs = form.inputs()
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        found = torch.compile(form.program, backend=backend)(*(x.clone() for x in inputs))
        error = worst(found, form.program(*(x.clone() for x in inputs)))
    return counters["inductor"]["fuse_attention"], error


def worst(found, wanted):
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def allowed(form):
    return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[form.dtype]


def cell(sites, error, form):
    return str(sites) if error <= allowed(form) else f"{sites}, **wrong**"


def rows(page):
    return {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"
    }


def row(form):
    (sites, error), (own, _, own_error) = theirs(form), ours(form)
    cells = (form.name, form.pattern or "-", form.sites, cell(sites, error, form), cell(own, own_error, form))
    return f"| {' | '.join(map(str, cells))} |\n"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_ours_is_right(form):
    sites, reasons, error = ours(form)
    assert sites == form.sites, reasons
    assert error <= allowed(form)
    assert sites or reasons or form.name == "a query written to in between"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_theirs_is_as_the_page_says(form):
    if not torch.__version__.startswith("2.13"):
        pytest.skip("the page is about torch 2.13")
    assert cell(*theirs(form), form) == rows(PAGE.read_text(encoding="utf-8"))[form.name][3]


def test_the_page_has_every_form_and_claims_no_more_than_the_tests():
    found = rows(PAGE.read_text(encoding="utf-8"))
    for form in FORMS:
        cells = found.pop(form.name)
        assert cells[1:3] == [form.pattern or "-", str(form.sites)]
        assert cells[4] == str(form.sites)
    assert set(found) == {"form", "---|---|---|---|---"}


def main():
    """Write the table anew, below the text that is there."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(HEAD)
    after = rest[len("".join(line for line in rest.splitlines(keepends=True) if line.startswith("|"))) :]
    PAGE.write_text(before + HEAD + "".join(map(row, FORMS)) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
