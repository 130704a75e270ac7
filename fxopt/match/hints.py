"""What makes a site fuse, in words: what several fusions say, so that one cause is always told alike.

A hint says what the reader of a report can do (`Miss(..., hint=hints.DROPOUT)`). Where only another model would help,
there is none: the reason is enough.
"""

from __future__ import annotations

from torch.fx import Node

#: dropout, and whatever else draws random numbers in training only
DROPOUT = "call model.eval() for inference; to fuse it in training too, set the dropout probability to 0"

#: a number that is held in a tensor
NUMBER = "give it as a Python number: a tensor's value is not known while the graph is compiled"

#: a dimension that must be known while the graph is compiled
STATIC = "compile with dynamic=False, or call torch._dynamo.mark_static on that dimension of the input"


def read_by(user: Node) -> str:
    """How a reason tells who else reads a value: "also used by add_1", or "returned"."""
    return "returned" if user.op == "output" else f"also used by {user.name}"


def kept(node: Node, user: Node) -> str:
    """For an inner value `node` that `user`, outside of the match, reads: a fused op never writes it."""
    reader, steps = user, 0
    while len(reader.users) == 1 and steps < 6:  # heads averaged, a dimension dropped, then returned
        (reader,), steps = reader.users, steps + 1
    if reader.op == "output":
        asked = "output_attentions=True, need_weights=True, a hook that stores it"
        return f"don't return {node.name} ({asked}): the fused op never writes it"
    return f"compute what {user.name} needs without {node.name}: the fused op never writes it"


def same_dtype(what: str, dtype: object) -> str:
    """For operands of several dtypes, where `what` should have `dtype`."""
    return f"cast {what} to {dtype} (module.to(dtype) casts all of a module's weights, or run under torch.autocast)"
