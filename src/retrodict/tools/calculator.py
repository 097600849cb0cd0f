"""A calculator that writes after "=": integers, + - and *, read by a parser of its own.

Of the text's last expression it may compute only the last operands. Two is the limit of Hu et al. (2024,
arXiv:2310.04363): a policy that leaves the whole sum to the tool gets the end of it, so the steps must be its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from retrodict.errors import InputError

REACH = 256
"""Characters before the "=" that are read."""

_NUMBER = r"[0-9]+"
_EXPRESSION = re.compile(rf"[-+]?{_NUMBER}(?: *[-+*] *-? *{_NUMBER})*\Z")
_PART = re.compile(rf" *([-+*]?) *(-?) *({_NUMBER})")
_OUTSIDE = re.compile(r"[-+*/^%] *\Z|[\w.)]\Z")
"""What must not stand before an expression: it would be a part of something that this calculator cannot read."""


def calculator(operands: int | None = 2, digits: int = 12) -> Callable[[str], str | None]:
    """A function from "... 6 - 0 =" to " 6", for :class:`retrodict.spaces.tools.Tool`.

    Args:
        operands: how many operands, counted from the end, it computes: "1 + 2 + 3 =" gives " 5" with 2. ``None`` for
            all of them.
        digits: longest operand and longest result, in digits.

    The answer is ``None`` where the text does not end with "=", where less than two operands stand before it, or where
    a number is too long. It never raises, whatever the text.

    Raises:
        InputError: fewer than two operands, or no digits (here, not in the function it returns).
    """
    if operands is not None and operands < 2:
        raise InputError(f"a calculator needs at least 2 operands, not {operands}; None takes them all")
    if digits < 1:
        raise InputError(f"digits must be at least 1, not {digits}")

    def answer(text: str) -> str | None:
        terms = last_expression(text, digits)
        if terms is None or len(terms) < 2:
            return None
        value = evaluate(terms if operands is None else last(terms, operands))
        return f" {value}" if len(str(abs(value))) <= digits else None

    return answer


def last_expression(text: str, digits: int = 12) -> list[tuple[str, int]] | None:
    """Operands of the expression before a final "=", each with the operator before it ("" or a sign for the first)."""
    if not text.endswith("="):
        return None
    tail = text[:-1].rstrip(" ")
    cut = max(len(tail) - REACH, 0)
    found = _EXPRESSION.search(tail, cut)
    if found is None or (cut and found.start() == cut) or _OUTSIDE.search(tail, cut, found.start()):
        return None
    parts = _PART.findall(found[0])
    if any(len(number) > digits for _, _, number in parts):
        return None
    return [(op, -int(number) if minus else int(number)) for op, minus, number in parts]


def last(terms: list[tuple[str, int]], operands: int) -> list[tuple[str, int]]:
    """The last operands; the operator before them goes with what is cut off."""
    kept = terms[-operands:]
    return kept if len(kept) == len(terms) else [("", kept[0][1]), *kept[1:]]


def evaluate(terms: list[tuple[str, int]]) -> int:
    """The value of operands and their operators, products first; the first operator is a sign."""
    total, product = 0, 0
    for i, (op, number) in enumerate(terms):
        if op == "*" and i:
            product *= number
        else:
            total, product = total + product, -number if op == "-" else number
    return total + product
