"""The house lets several arguments share a line of a docstring; the site's reader of docstrings wants a line for each.

`q: [T, D]. k: [S, D].` becomes two entries, `q, k: [B, T, D].` two entries with the same words. Only names that the
function or class really has are taken for names, so that a colon in running text changes nothing.
"""

import re

import griffe

SECTION = re.compile(r"^(Args|Attributes):$")
ITEM = re.compile(r"^    (?! )(.+)$")


class OneArgumentALine(griffe.Extension):
    """Rewrites the docstrings that griffe has read; the files stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None and (obj.is_function or obj.is_class):
            obj.docstring.value = one_argument_a_line(obj.docstring.value, names(obj))


def names(obj: griffe.Object) -> set[str]:
    """Arguments of a function; of a class its attributes and the arguments of `__init__`."""
    if obj.is_function:
        return {parameter.name for parameter in obj.parameters}
    init = obj.all_members.get("__init__")
    return {*obj.all_members, *(names(init) if init is not None and init.is_function else ())}


def one_argument_a_line(text: str, known: set[str]) -> str:
    """The docstring with every argument and attribute of `known` on a line of its own."""
    name = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    starts = re.compile(rf"(?:^|(?<=[.;)]) )((?:{name})(?:, (?:{name}))*): ")
    out, inside = [], False
    for line in text.splitlines():
        inside = bool(SECTION.match(line)) or (inside and (not line or line.startswith(" ")))
        item = ITEM.match(line) if inside and known else None
        out += _entries(item[1], starts) if item else [line]
    return "\n".join(out)


def _entries(line: str, starts: re.Pattern) -> list[str]:
    found = list(starts.finditer(line))
    if not found or found[0].start():
        return [f"    {line}"]
    ends = [match.start() for match in found[1:]] + [len(line)]
    entries = [(match[1].split(", "), line[match.end() : end].strip()) for match, end in zip(found, ends)]
    # what follows on the next lines belongs to the last name alone
    return [f"    {name}: {words}" for group, words in entries for name in group]
