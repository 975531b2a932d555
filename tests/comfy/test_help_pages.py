"""The lists of web/docs/*.md against the nodes' schemas: names, order, types, defaults and ranges."""

import re

import pytest

from paths import ROOT

PAGES = ROOT / "web" / "docs"
WORDS = {"INT": "whole number", "FLOAT": "number", "STRING": "text", "BOOLEAN": "switch", "COMBO": "choice"}
LARGE = {2**64 - 1: "2^64 - 1"}


ENTRY = re.compile(
    r"^- \*\*(?P<name>[^*]+)\*\*, (?P<kind>[^:\n]+?)(?:: (?P<value>.+))?\\\n  (?P<meaning>.+)", re.MULTILINE
)


def entries(node, heading):
    """Under a heading, the lists of (name, type, meaning, default and range): a name, and its meaning below it."""
    section = (PAGES / f"{node}.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [entry.group("name", "kind", "meaning", "value") for entry in ENTRY.finditer(section)]
    assert len(found) == len(re.findall(r"^- \*\*", section, re.MULTILINE)), (node, heading)
    return [[(cell or "").replace("`", "") for cell in entry] for entry in found]


def value_of(declared):
    """The last column after "optional" and "advanced", or its beginning: the default, and the range of a number."""
    if declared.default is None:
        return ""
    if isinstance(declared.default, bool):
        return "on" if declared.default else "off"
    if isinstance(declared.default, int | float):
        least, most = (LARGE.get(side, f"{side:g}") for side in (declared.min, declared.max))
        return f"{declared.default:g}; {least} to {most}"
    return declared.default


@pytest.fixture(scope="module")
def schemas(pack_module):
    return {schema.node_id: schema for schema in (node.define_schema() for node in pack_module.NODES)}


def test_every_node_has_a_page_and_every_page_a_node(schemas):
    assert {page.stem for page in PAGES.iterdir()} == set(schemas)


def test_the_pages_have_no_tables():
    """The page shows help in a panel 282 pixels wide."""
    assert [
        page.name for page in PAGES.iterdir() if re.search(r"^\|", page.read_text(encoding="utf-8"), re.MULTILINE)
    ] == []


def test_the_inputs_are_those_of_the_pages(schemas):
    for node, schema in schemas.items():
        rows = {row[0]: row for row in entries(node, "Inputs")}
        assert [*rows] == [declared.id for declared in schema.inputs], node
        for declared in schema.inputs:
            _, kind, meaning, value = rows[declared.id]
            is_widget = declared.get_io_type() in WORDS
            assert kind == WORDS.get(declared.get_io_type(), declared.get_io_type()), (node, declared.id)
            flags = {"optional": declared.optional, "advanced": is_widget and declared.advanced}
            flags = ", ".join(flag for flag, is_set in flags.items() if is_set)
            found, _, default = value.partition("; ") if flags else ("", "", value)
            assert meaning and found == flags, (node, declared.id, value)
            assert default.startswith(value_of(declared)) if is_widget else flags or value == "required", value


def test_the_outputs_are_those_of_the_pages(schemas):
    for node, schema in schemas.items():
        rows = [row[:2] for row in entries(node, "Outputs")]
        types = [declared.get_io_type() for declared in schema.outputs]
        assert rows == [[declared.id or kind, kind] for declared, kind in zip(schema.outputs, types)], node
