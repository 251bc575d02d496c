"""Any text as literal text of TensorBoard's Markdown."""

from __future__ import annotations


def plain(text: str) -> str:
    """``text`` such that it shows as it is, in a paragraph or in a cell of a table.

    Signs of ASCII become references, which no rule of Markdown or HTML reads as a mark; what does
    not show, such as a line break, is spelt as Python spells it.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(
        c if c.isalnum() or c == " " or ord(c) > 127 else f"&#{ord(c)};"
        for spelt in shown
        for c in spelt
    )


def code(text: str) -> str:
    """The same, set as code; a code span would show references as they are spelt."""
    return f"<code>{plain(text)}</code>"


def block(text: str) -> str:
    """Lines as they are: an indented block, which no content can end."""
    return "\n".join("    " + line for line in text.splitlines())
