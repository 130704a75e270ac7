"""Masks as programs: from the node that makes a mask to an index function, bounds on keys, and words.

read_mask(node, scope, sizes)   the program of a mask, or why nothing is known of it
read_values(node, scope, sizes) what it holds, element by element
evaluate(program.live, ...)     the same, element by element in plain torch
describe(program)               the same, in words
"""

from fxopt.match.masks.describe import describe, show
from fxopt.match.masks.evaluate import evaluate, insert
from fxopt.match.masks.program import Chunk, MaskProgram, Segment
from fxopt.match.masks.reader import addends, read_mask, read_values

__all__ = [
    "Chunk",
    "MaskProgram",
    "Segment",
    "addends",
    "describe",
    "evaluate",
    "insert",
    "read_mask",
    "read_values",
    "show",
]
