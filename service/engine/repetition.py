"""How often the innermost part of an expression may be repeated: {m,n} within {m,n} multiply.

A grammar's tables grow with it, and so does every step in which it is matched; ((.{0,100}){0,100}){0,100} keeps a core
busy for minutes, so more than MOST_REPETITIONS is refused. Works for regular expressions and for EBNF.
"""

import re

MOST_REPETITIONS = 100_000

_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\"(?:\\.|[^\"\\])*\"|\{(\d*),?(\d*)\}|[()]|.", re.DOTALL)


def largest_repetition(expression: str) -> int:
    """Return the largest product of upper bounds that lie within each other; 1 without any."""
    open_groups = [1]  # the largest product within each group that is open, and in the whole
    last = 1  # that within the part just passed, to which a bound would apply
    for token in _TOKEN.finditer(expression):
        match token[0]:
            case "(":
                open_groups.append(1)
                last = 1
            case ")" if len(open_groups) > 1:
                last = open_groups.pop()
            case text if text.startswith("{") and len(text) > 1:
                last *= max(int(token[2] or token[1] or 1), 1)
            case "*" | "+" | "?":
                pass
            case _:
                last = 1
        open_groups[-1] = max(open_groups[-1], last)
    return max(open_groups)
