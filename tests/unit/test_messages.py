"""Every message that web/docs quotes is a string in the source, with the same words around its placeholders."""

import ast
import re

import pytest

from paths import ROOT

HOLE = "\0"  # stands for a placeholder of an f-string, or of a logging format
# quoted messages that ComfyUI raises, with the file that has them
COMFYUIS = {"Saving image outside the output folder is not allowed": "folder_paths.py"}


def strings(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Return the plain strings and the f-strings of a module, without docstrings; HOLE replaces each placeholder."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    plain, formatted = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
            formatted.add("".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            plain.add(re.sub(r"%[.\d]*[sdrfg]", HOLE, node.value))
    return plain, formatted


MODULES = [ast.parse(file.read_text()) for part in ("bitdance_core", "nodes") for file in (ROOT / part).rglob("*.py")]
PLAIN, FORMATTED = (set.union(*those) for those in zip(*map(strings, MODULES)))
TEXT = "\n".join(text.replace("\n", " ") for text in PLAIN | FORMATTED)


def quotes() -> list[tuple[str, str]]:
    """Return (page, message) for each quotation of several words in web/docs, apart from its tables."""
    found, folder = [], ROOT / "web" / "docs"
    for page in sorted(folder.rglob("*.md")):
        lines = (line for line in page.read_text().splitlines() if not line.startswith("|"))
        prose = re.sub(r"`[^`]*`", "", re.sub(r"\s+", " ", "\n".join(lines)))
        name = page.relative_to(folder).as_posix()
        found += [(name, quote) for quote in re.findall(r'"([^"]+)"', prose) if " " in quote]
    return found


def values(quote: str) -> re.Pattern:
    """Match the parts of a quotation that a placeholder may have produced: "...", numbers, names in quotes, and whole
    strings of the source, such as the name of a part.
    """
    known = sorted((text for text in PLAIN if len(text) > 3 and text in quote and text != quote), key=len, reverse=True)
    words = "|".join([*map(re.escape, known), r"'[^']*'", r"\w*\d(?:\w|\.\d)*"])
    return re.compile(rf"\.\.\.|(?<!\w)(?:{words})(?!\w)")


def value(text: str) -> str:
    """Return a pattern of a part that `values` matched: itself, or a placeholder; "..." stands for anything."""
    if text == "...":
        return ".*?"
    quoted = f"|'{HOLE}'" if text.startswith("'") else ""
    itself = re.escape(text).replace(re.escape("..."), ".*?")
    itself = re.sub(r"\d+(?:\\\.\d+)?", lambda number: f"(?:{number[0]}|{HOLE})", itself)  # "11x11" is "{n}x{n}" too
    return f"(?:{itself}|{HOLE}{quoted})"


def is_in_source(quote: str) -> bool:
    pattern, end = "", 0
    for match in values(quote).finditer(quote):
        pattern += re.escape(quote[end : match.start()]) + value(match[0])
        end = match.end()
    return re.search(pattern + re.escape(quote[end:]), TEXT) is not None


@pytest.mark.parametrize(("page", "quote"), [pair for pair in quotes() if pair[1] not in COMFYUIS])
def test_a_quoted_message_is_in_the_source(page, quote):
    assert is_in_source(quote), f"{page} quotes a message that no string in the source has"


@pytest.mark.parametrize("quote", sorted({quote for _, quote in quotes()} - {*COMFYUIS}))
def test_a_quotation_with_another_word_is_not(quote):
    """The comparison is strict: one different word, on either side, and the message is not found."""
    fixed = values(quote).sub(lambda match: " " * len(match[0]), quote)
    words = list(re.finditer(r"[A-Za-z]{2,}", fixed))
    assert words, "nothing but placeholders"
    for word in words:
        assert not is_in_source(quote[: word.start()] + "xyzzy" + quote[word.end() :]), word[0]


@pytest.mark.parametrize(("quote", "file"), COMFYUIS.items())
def test_a_quoted_message_of_comfyui_is_there(quote, file, comfyui):
    assert quote in {text for _, text in quotes()}
    assert quote in (comfyui / file).read_text()
