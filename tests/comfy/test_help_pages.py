"""The lists of web/docs/*.md against the nodes' schemas, in every language: names, order, types, defaults, ranges."""

import re

import pytest

import locales
from paths import ROOT

PAGES = ROOT / "web" / "docs"
TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# the words of a page: headings, types, flags, a switch's states and a number's range
WORDS = {
    "en": {
        "headings": ("Inputs", "Outputs"),
        "types": ("whole number", "number", "text", "switch", "choice"),
        "flags": ("required", "optional", "advanced"),
        "states": ("off", "on"),
        "range": "{} to {}",
    },
    "zh": {
        "headings": ("输入", "输出"),
        "types": ("整数", "数值", "文本", "开关", "选项"),
        "flags": ("必填", "可选", "高级"),
        "states": ("关", "开"),
        "range": "{} 到 {}",
    },
    "ja": {
        "headings": ("入力", "出力"),
        "types": ("整数", "数値", "テキスト", "スイッチ", "選択"),
        "flags": ("必須", "任意", "高度"),
        "states": ("オフ", "オン"),
        "range": "{}～{}",
    },
}
LARGE = {2**64 - 1: "2^64 - 1"}
ASCII = str.maketrans({"，": ", ", "、": ", ", "：": ": ", "；": "; ", "（": " (", "）": ")"})


# a name, with what the page calls it in another language, and its meaning below it
ENTRY = re.compile(
    r"^- \*\*(?P<name>[^*]+)\*\*(?: \((?P<label>[^)]+)\))?, (?P<kind>[^:\n]+?)(?:: (?P<value>.+))?\\\n"
    r"  (?P<meaning>.+)",
    re.MULTILINE,
)

every_language = pytest.mark.parametrize("language", WORDS)


def page_of(node, language):
    return locales.page_path(PAGES / f"{node}.md", language)


def entries(node, language, place):
    """Under a heading, the lists of (name, type, meaning, default and range, the name in the page's language)."""
    text = page_of(node, language).read_text(encoding="utf-8").translate(ASCII)
    section = text.partition(f"\n## {WORDS[language]['headings'][place]}\n")[2].partition("\n## ")[0]
    found = [entry.group("name", "kind", "meaning", "value", "label") for entry in ENTRY.finditer(section)]
    assert len(found) == len(re.findall(r"^- \*\*", section, re.MULTILINE)), (node, place)
    return [[(cell or "").replace("`", "").strip() for cell in entry] for entry in found]


def value_of(declared, words):
    """The last column after "optional" and "advanced", or its beginning: the default, and the range of a number."""
    if declared.default is None:
        return ""
    if isinstance(declared.default, bool):
        return words["states"][declared.default]
    if isinstance(declared.default, int | float):
        least, most = (LARGE.get(side, f"{side:g}") for side in (declared.min, declared.max))
        return f"{declared.default:g}; {words['range'].format(least, most)}"
    return declared.default.translate(ASCII)


@pytest.fixture(scope="module")
def schemas(pack_module):
    return {schema.node_id: schema for schema in (node.define_schema() for node in pack_module.NODES)}


def test_every_language_with_pages_is_read_here():
    assert {*WORDS} == {"en", *locales.WITH_PAGES}
    assert {page.stem for page in PAGES.glob("*/*")} == {*locales.WITH_PAGES}


@every_language
def test_every_node_has_a_page_and_every_page_a_node(schemas, language):
    assert {page.stem for page in PAGES.glob("*.md")} == set(schemas)
    assert {path.name for path in PAGES.iterdir() if path.is_dir()} <= set(schemas)
    assert [node for node in schemas if not page_of(node, language).is_file()] == []


def test_the_pages_have_no_tables():
    """The page shows help in a panel 282 pixels wide."""
    pages = PAGES.rglob("*.md")
    assert [page for page in pages if re.search(r"^\|", page.read_text(encoding="utf-8"), re.MULTILINE)] == []


def test_no_line_ends_between_two_signs():
    """The page shows the end of a line as a space, which Chinese and Japanese do not have within a sentence."""
    sign = "[\u3040-\u30ff\u4e00-\u9fff]"
    pages = [*PAGES.glob("*/*.md"), *ROOT.glob("README.*.md")]
    ends = {page: re.findall(rf".{{5}}{sign}\n *{sign}.{{5}}", page.read_text(encoding="utf-8")) for page in pages}
    assert {page: found for page, found in ends.items() if found} == {}


@every_language
def test_the_inputs_are_those_of_the_pages(schemas, language):
    words = WORDS[language]
    types, (required, *marks) = dict(zip(TYPES, words["types"])), words["flags"]
    for node, schema in schemas.items():
        rows = {row[0]: row for row in entries(node, language, 0)}
        assert [*rows] == [declared.id for declared in schema.inputs], node
        for declared in schema.inputs:
            _, kind, meaning, value, _ = rows[declared.id]
            is_widget = declared.get_io_type() in types
            assert kind == types.get(declared.get_io_type(), declared.get_io_type()), (node, declared.id)
            flags = zip(marks, (declared.optional, is_widget and declared.advanced))
            flags = ", ".join(flag for flag, is_set in flags if is_set)
            found, _, default = value.partition("; ") if flags else ("", "", value)
            assert meaning and found == flags, (node, declared.id, value)
            if is_widget:
                assert default.startswith(value_of(declared, words)), (node, declared.id, value)
            else:
                assert flags or value == required, (node, declared.id, value)


@every_language
def test_the_outputs_are_those_of_the_pages(schemas, language):
    for node, schema in schemas.items():
        rows = [row[:2] for row in entries(node, language, 1)]
        types = [declared.get_io_type() for declared in schema.outputs]
        assert rows == [[declared.id or kind, kind] for declared, kind in zip(schema.outputs, types)], node


@every_language
def test_a_pages_names_are_those_that_nodes_have_in_its_language(schemas, language):
    texts = locales.read(language)
    for node, schema in schemas.items():
        title = page_of(node, language).read_text(encoding="utf-8").splitlines()[0]
        assert title == f"# {texts[f'nodeDefs.{node}.display_name']}"
        shown = {declared.id: f"inputs.{declared.id}" for declared in schema.inputs}
        for row in entries(node, language, 0):
            name = texts[f"nodeDefs.{node}.{shown[row[0]]}.name"].translate(ASCII)
            assert row[4] == ("" if name == row[0] else name.strip()), (node, row[0])
