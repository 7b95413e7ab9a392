"""A count that rises whenever something that was decided may no longer hold.

What is remembered from call to call (`plans`) is made under one generation and forgotten under the
next: after a change of the stated policy, of the quarantine, of the trusted verdicts, or after
`invalidate`.
"""

from __future__ import annotations

current = 0


def renew() -> None:
    """Let everything that was remembered so far be found out again."""
    global current
    current += 1
