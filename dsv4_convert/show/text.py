"""Text from outside, escaped for where it goes: one function for each kind of output.

Names and values of files, servers and tokenizers are data. A terminal must not obey their escape sequences, GitHub not
their workflow commands, and no markdown, XML or HTML may end where they say so.
"""

from __future__ import annotations

import re
import unicodedata

#: Line ends, tabs and the joiners of scripts and emoji stay. Other control characters, format characters (such as those
#: that reverse the direction of text), surrogates and separators of lines are written as Python escapes.
_HARMLESS = frozenset("\n\t\u200c\u200d")
_UNSAFE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
#: The beginnings of what GitHub's runner takes for a command: ``::error::`` at the beginning of a line, which wrapping
#: may make of any word, and ``##[error]`` anywhere. A console may hand over a line in pieces.
_COMMAND = re.compile(r"(?<!\S)::|##")
#: Characters that XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|$~&]")


def for_terminal(text: str) -> str:
    """Text of one or more lines that neither a terminal nor the log of a CI system obeys."""
    return _COMMAND.sub(lambda found: f"\\x{ord(found[0][0]):02x}{found[0][1:]}", for_html(text))


def for_html(text: str) -> str:
    """Text or a whole document without characters that do not show; the template escapes the markup of its values."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if _is_unsafe(c) else c for c in text)


def for_json(document: str) -> str:
    """Serialised JSON in which such characters are escaped, as JSON escapes them; it says the same."""
    if not (document.isascii() and document.isprintable()):
        document = "".join(_json_escape(c) if c != "\n" and _is_unsafe(c) else c for c in document)
    return document.replace("##[", "\\u0023#[")


def for_xml(text: str) -> str:
    """Text that an XML document can hold, once its writer has escaped the markup."""
    return _NOT_XML.sub("\ufffd", for_terminal(text))


def for_markdown(text: str) -> str:
    """Text as markdown shows it, in one line."""
    return " ".join(_MARKDOWN.sub(r"\\\g<0>", for_terminal(text)).split())


def for_markdown_code(text: str) -> str:
    """Text between backticks, in one line of a table or of a paragraph; nothing for no text."""
    inner = " ".join(for_terminal(text).replace("`", "'").split()).replace("|", "\\|")
    return f"`{inner}`" if inner else ""


def workflow_command(kind: str, title: str, message: str) -> str:
    """A workflow command of GitHub Actions; its runner undoes the escapes, as its ``ActionCommand`` says."""
    name = _percent(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={name}::{_percent(message)}"


def _percent(text: str) -> str:
    return for_html(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE and character not in _HARMLESS


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
