"""Python source as HTML in which kinds of words have colours: spans of five classes, and everything else is text."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from markupsafe import Markup, escape
from pygments import lex
from pygments.lexers.python import PythonLexer
from pygments.token import Token, _TokenType

#: characters beyond which source is left as it is: a reader no longer sees colours, and a browser feels the spans
LONGEST = 300_000

#: kind of token -> class, the first that it is a kind of
_CLASSES = (
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Literal.Number, "n"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Name.Decorator, "d"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
)


@functools.lru_cache(maxsize=128)  # 30 ms for a kernel of 200 lines, and a notebook shows a report again and again
def highlighted(source: str) -> Markup:
    """`source` as markup; its text is the source, to the letter."""
    if len(source) > LONGEST:
        return escape(source)
    return Markup("").join(
        Markup('<span class="{}">{}</span>').format(kind, words) if kind and not words.isspace() else escape(words)
        for kind, words in _runs(source)
    )


def _runs(source: str) -> Iterator[tuple[str, str]]:
    """(class or "", text), where neighbours of one class are one."""
    kind, words = "", ""
    for token, text in lex(source, PythonLexer(stripnl=False, ensurenl=False)):
        found = _class(token)
        if found != kind:
            yield kind, words
            kind, words = found, ""
        words += text
    yield kind, words


def _class(token: _TokenType) -> str:
    return next((name for kind, name in _CLASSES if token in kind), "")
