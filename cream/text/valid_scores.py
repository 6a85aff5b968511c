"""--valid_reward: which numbers that a judge writes are scores. A comparison is evaluated node by node, never run."""

import ast
import math
from functools import cache

from cream.errors import UserError

COMPARE = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


def is_valid(valid: str | None, score: float) -> bool:
    """Whether a score is in a range, LOW:HIGH, LOW: or :HIGH, both included, or fulfils comparisons of `reward` with
    numbers. None: any score. Raises UserError for anything else.

    >>> is_valid("0:5", -1), is_valid("reward > 0 and reward <= 5", 5.0)
    (False, True)
    """
    if valid is None:
        return True
    if bounds := bounds_of(valid):
        return bounds[0] <= score <= bounds[1]
    return _truth(_expression(valid), score, valid)


def bounds_of(valid: str) -> tuple[float, float] | None:
    """(low, high) of a range; None for anything else."""
    low, colon, high = valid.partition(":")
    try:
        bounds = float(low or -math.inf), float(high or math.inf)
    except ValueError:
        return None
    return bounds if colon and bounds[0] <= bounds[1] else None


@cache
def _expression(valid: str) -> ast.expr:
    try:
        expression = ast.parse(valid.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _senseless(valid) from None
    if not any(isinstance(node, ast.Name) for node in ast.walk(expression)):
        raise _senseless(valid)  # it would say the same of every score
    return expression


def _truth(node: ast.expr, score: float, valid: str) -> bool:
    """Whether a score fulfils comparisons. Every part is looked at, so that a wrong one is found at once."""
    match node:
        case ast.BoolOp():
            values = [_truth(each, score, valid) for each in node.values]
            return all(values) if isinstance(node.op, ast.And) else any(values)
        case ast.UnaryOp(op=ast.Not()):
            return not _truth(node.operand, score, valid)
        case ast.Compare():
            terms = [_number(each, score, valid) for each in (node.left, *node.comparators)]
            if all(type(op) in COMPARE for op in node.ops):
                return all(COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, terms, terms[1:], strict=False))
    raise _senseless(valid)


def _number(node: ast.expr, score: float, valid: str) -> float:
    match node:
        case ast.Name(id="reward"):
            return score
        case ast.Constant(value=value) if type(value) in (int, float):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
            return -value
    raise _senseless(valid)


def _senseless(valid: str) -> UserError:
    return UserError(
        f"--valid_reward {valid!r}: expected a range LOW:HIGH, such as 0:5, or comparisons of reward with numbers, "
        "such as 'reward >= 1 and reward != 3'"
    )
