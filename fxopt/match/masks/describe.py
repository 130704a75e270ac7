"""Masks in words, for reports: "causal, window 1024, keys padded (attention_mask)"."""

from __future__ import annotations

import re

from fxopt.match.masks.bounds import Limits, limits
from fxopt.match.masks.conditions import FALSE, TRUE, All, Condition, Constant, Eq, Le, Ne, all_of, conjuncts
from fxopt.match.masks.forms import Apply, Atom, Coordinate, Form, Max, Quotient, Read, Size, elements
from fxopt.match.masks.program import MaskProgram
from fxopt.match.masks.values import Cases, Operand, Value, atoms

#: words for what rows without a live key come to
_EMPTY = {
    "uniform": "empty rows uniform",
    "nan": "empty rows NaN",
    "mixed": "empty rows of two kinds",
    "boolean": "rows may be empty",
}


def describe(program: MaskProgram) -> str:
    """The program in a line of words."""
    words = [*_bounds(program)]
    words += [f"chunks of {chunk.size}" for chunk in program.chunks]
    words += [f"segments by {_names(s.condition) or show(s.rows)}" for s in program.segments]
    if program.key_padding is not TRUE:
        names = _names(program.key_padding)
        words.append(f"keys padded ({names})" if names else f"keys where {show(program.key_padding)}")
    if program.residual is FALSE:
        words.append("no key is live")
    elif program.residual is not TRUE:
        words.append(f"where {show(program.residual)}")
    if not words:
        words.append("every key is live")
    if program.bias is not None:
        words.append(f"a bias over ({', '.join(sorted(program.bias_depends)) or 'nothing'})")
    if program.empty_rows != "never":
        words.append(_EMPTY[program.empty_rows])
    return ", ".join(words)


def _bounds(program: MaskProgram) -> list[str]:
    """Words for the limits on keys, but for those that the words for chunks imply."""
    row, key = program.coordinates[-2], program.coordinates[-1].atom
    chunks = [chunk.condition for chunk in program.chunks]
    own = [part for part in conjuncts(program.live) if part not in chunks]
    found = Limits() if key is None or not chunks else limits(all_of(own), key)
    lower, upper = (found.lower, found.upper) if chunks else (program.lower, program.upper)
    words: list[str] = []
    ahead = None if upper is None else upper - row
    behind = None if lower is None or row.is_number else row - lower
    if upper is not None and ahead is not None:
        words.append(_upper(upper, ahead, row))
    if lower is None:
        return words
    if behind is None or not behind.is_number:
        words.append(f"keys from {show(lower)} on")
    elif ahead is None or not ahead.is_number:
        words.append(f"keys from i - {behind.constant} on" if behind.constant >= 0 else f"keys from {show(lower)} on")
    elif ahead.constant == behind.constant:
        words = [f"window of {behind.constant} on both sides"]
    else:
        words.append(f"window {ahead.constant + behind.constant + 1}")
    return words


def _upper(upper: Form, ahead: Form, row: Form) -> str:
    if row.is_number:
        return f"keys up to {show(upper)}"
    if ahead.is_number:
        return f"causal, {ahead.constant:+d}" if ahead.constant else "causal"
    if isinstance(upper.atom, Max) and row in upper.atom.members:
        return f"causal after a prefix of {', '.join(show(m + 1) for m in upper.atom.members if m is not row)}"
    if row.atom is not None and upper.coefficient(row.atom) == 1 and row.atom not in ahead.atoms:
        return f"causal from {show(ahead)} on"
    return f"keys up to {show(upper)}"


def _names(condition: Condition) -> str:
    """The names of the tensors that a condition is about."""
    return ", ".join(dict.fromkeys(_name(read) for read in elements(atoms(condition))))


def _name(read: Read) -> str:
    return re.sub(r"^l_(kwargs_|args_)?|_$", "", read.node.name)


# As formulas


def show(value: Value | Form | Atom) -> str:
    """A form, condition or value as a formula."""
    if isinstance(value, Form):
        return _form(value)
    if isinstance(value, Cases):
        return "{" + ", ".join(f"{_scalar(s)}: {show(c)}" for s, c in value.pieces) + "}"
    if isinstance(value, Constant):
        return str(value.value).lower()
    if isinstance(value, Le):
        return _comparison(value.form, "<=")
    if isinstance(value, Eq):
        return _comparison(value.form, "=")
    if isinstance(value, Ne):
        return _comparison(value.form, "!=")
    if isinstance(value, (Coordinate, Size, Read, Quotient, Max, Apply)):
        return _atom(value)
    joined = (" and " if isinstance(value, All) else " or ").join(
        f"({show(part)})" if hasattr(part, "parts") else show(part) for part in value.parts
    )
    return joined


def _scalar(scalar: float | Form | Read | Apply) -> str:
    return f"{scalar:g}" if isinstance(scalar, float) else show(scalar)


def _comparison(form: Form, sign: str) -> str:
    """Positive terms on the left, negative ones on the right."""
    left = Form.of(tuple(t for t in form.terms if t[1] > 0), max(form.constant, 0))
    right = Form.of(tuple((a, -k) for a, k in form.terms if k < 0), max(-form.constant, 0))
    return f"{_form(left)} {sign} {_form(right)}"


def _form(form: Form) -> str:
    alone = form.atom is not None
    text = ""
    for atom, k in sorted(form.terms, key=lambda term: term[1] < 0 and not isinstance(term[0], Max)):
        name = _atom(atom)
        if isinstance(atom, Max) and k < 0:  # -max(a, b) = min(-a, -b)
            name, k = f"min({', '.join(_form(-member) for member in atom.members)})", -k
        elif isinstance(atom, Quotient) and not alone:
            name = f"({name})"
        text += f"{' + ' if k > 0 else ' - '}{f'{abs(k)}·' if abs(k) != 1 else ''}{name}"
    if form.constant or not form.terms:
        text += f" {'+' if form.constant >= 0 else '-'} {abs(form.constant)}"
    text = text.strip()
    return text[2:] if text.startswith("+ ") else "-" + text[2:] if text.startswith("- ") else text


def _atom(atom: Atom) -> str:
    if isinstance(atom, Coordinate):
        return atom.name
    if isinstance(atom, Size):
        return str(atom.expression)
    if isinstance(atom, Read):
        return f"{_name(atom)}[{', '.join(map(_form, atom.index))}]" if atom.index else _name(atom)
    if isinstance(atom, Quotient):
        numerator = _form(atom.numerator)
        return f"{numerator if atom.numerator.atom is not None else f'({numerator})'} // {atom.divisor}"
    if isinstance(atom, Max):
        return f"max({', '.join(map(_form, atom.members))})"
    name = str(getattr(atom.target, "__name__", atom.target)).split(".")[0]
    return f"{name}({', '.join(show(o.value) if isinstance(o, Operand) else str(o) for o in atom.operands)})"
