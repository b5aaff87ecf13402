"""English text found at run time in Python's own documentation, so that none is shipped or downloaded.

Calibration and evaluation read different sources: the language reference behind ``help()``, and the documentation
strings of the standard library's modules.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path


def calibration_text() -> str:
    """Prose of the Python language reference, as ``pydoc_data`` holds it; about 30,000 words."""
    from pydoc_data.topics import topics

    return _prose("\n\n".join(topics[name] for name in sorted(topics)))


def evaluation_text() -> str:
    """Prose of the documentation strings of the standard library's top-level modules; about 7,500 words."""
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            documents.append(ast.get_docstring(ast.parse(path.read_bytes())) or "")
        except (SyntaxError, ValueError):  # a module kept for another version of Python
            continue
    return _prose("\n\n".join(documents))


def _prose(text: str) -> str:
    """The paragraphs that are sentences: 150 characters or more, at least 92 % letters and spaces, no list or code."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if len(paragraph) >= 150 and letters >= 0.92 * len(paragraph) and paragraph[-1] in ".:":
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
