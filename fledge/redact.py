"""Secrets stay out of messages: values of environment variables that are called a key, a token, a secret or a password,
and what is written behind such a name on a command line.
"""

import os
import re

_WORD = r"(?:key|token|secret|password|passwd|credentials?)"
NAME = re.compile(rf"(?:^|_|api){_WORD}(?:_id)?$", re.IGNORECASE)
GIVEN = re.compile(rf"(?<![A-Za-z])((?:[\w.-]*[_.-])?(?:api)?{_WORD}=)[^\s,;]+", re.IGNORECASE)
SHORTEST = 8  # characters: a shorter value is a switch rather than a secret, and would tear words apart


def redact(text: str) -> str:
    """The text with … for every secret of this process's environment, and for what stands behind `…_token=`."""
    secrets = [value for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST]
    for value in sorted(secrets, key=len, reverse=True):  # one may hold another
        text = text.replace(value, "…")
    return GIVEN.sub(r"\1…", text)
