"""Which tokens carry no meaning of their own: told by their form, or by having been added."""

from __future__ import annotations

import re

from mltfr_dist.tables.vocabulary.base import DropReason
from mltfr_dist.tables.vocabulary.marks import BYTE_SPACE, WORD_START

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNUSED = re.compile(
    r"[<\[]((unused|UNUSED)(_token|_TOKEN)?_?\d+|(PAD|pad_|null_|unk_|extra_id_|dummy)\d+"
    r"|reserved_special_token_\d+|reserved_(token_)?\d+|(special|SPECIAL|control)_\d+)[>\]]"
    r"|<\|(reserved|placeholder)\w*\|>|<?madeupword\d+>?|</?(s|unk|pad)>NOTUSED"
)
# Named one by one: `<...>` and `[...]` alone would also match pieces of code and HTML (`<div>`).
_CONTROL = re.compile(
    r"<[|\uff5c].*[|\uff5c]>|<[|\uff5c]\w+>|<\w+[|\uff5c]>|\[\|\w+\|\]"
    r"|</?(s|unk|pad|mask|bos|eos|cls|sep|eod|eop|eot|sos|image|mask_\d+|\w+_soft_token"
    r"|(start|end|begin)_of_\w+|fim[_-]\w+|repo_?name|file_?sep|filename|gh_stars"
    r"|issue_(start|comment|closed)|jupyter_\w+|empty_output|commit_(before|msg|after)"
    r"|think|thinking|reasoning|answer|tools|tool_\w+|function_call"
    r"|PRE|SUF|MID|EOT|BOS|EOS|UNK|PAD|MASK|CLS|SEP)>"
    r"|\[(CLS|SEP|PAD|UNK|MASK|BOS|EOS|EOT|[gs]MASK|/?INST|/?(TOOL|AVAILABLE|START|END)_[A-Z_]+"
    r"|/?SYSTEM_PROMPT|/?THINK)\]"
    r"|<<?/?SYS>>?|>>[A-Za-z]{2,4}([_-][A-Za-z0-9]+)*<<|<2[a-z]{2,3}(_\w+)?>"
    r"|__(start|end|unk|null|newln|pad)__"
)
_LONGEST = 100
"""Characters of the longest token that may be a sign; the patterns see nothing longer."""

_MARKUP = re.compile(r"<[^<>\s]+>|<[^<>]*_[^<>]*>|\[/?\w[\w:@-]+\]|\{\{\w+\}\}|<<[^<>\s]+>>")
_TAG = re.compile("<[a-z]+>")
_BEFORE = f"{WORD_START}{BYTE_SPACE} "
_FIRST = frozenset("<[>_m")
_HTML = re.compile(
    r"a|abbr|address|area|article|aside|audio|b|base|blockquote|body|br|button|"
    r"canvas|caption|cite|code|col|colgroup|data|dd|del|details|dfn|dialog|div|"
    r"dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h1|h2|h3|h4|h5|"
    r"h6|head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|"
    r"main|map|mark|menu|meta|nav|noscript|object|ol|optgroup|option|output|p|"
    r"param|picture|pre|progress|q|samp|script|section|select|small|source|span|"
    r"strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|"
    r"thead|time|title|tr|track|u|ul|var|video|wbr|center"
)


def drop_reason(raw: str, text: str) -> DropReason | None:
    """Why a token carries no meaning, by its raw and its readable form; None: it carries some."""
    if form := form_reason(raw):
        return form
    if not text.strip():
        return "blank"
    return "fragment" if "\ufffd" in text else None


def form_reason(raw: str) -> DropReason | None:
    """What a token is by the way it is written alone; such tokens stand outside the marking."""
    bare = raw.lstrip(_BEFORE)
    if bare[:1] not in _FIRST or len(bare) > _LONGEST:
        return None  # quickly, for nearly all
    if _BYTE.fullmatch(raw):
        return "byte"
    if _UNUSED.fullmatch(bare):
        return "unused"
    return "special" if _CONTROL.fullmatch(bare) else None


def is_markup(content: str) -> bool:
    """Whether an added token is a sign and no word: `<my_tool>`, `</x>`, `[EDGE]`, `{{name}}`.

    Tags of HTML are none, nor is a bare word in `<>` (`<user>`), which no flag calls special.
    """
    bare = content.strip(_BEFORE + "\n")
    if len(bare) > _LONGEST or _TAG.fullmatch(bare):
        return False
    return bool(_MARKUP.fullmatch(bare)) and not _HTML.fullmatch(bare.strip("<>/").lower())
