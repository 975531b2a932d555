"""The tables of web/docs/*.md against the nodes' schemas: names, order, types, defaults and ranges."""

import pytest

from paths import ROOT

PAGES = ROOT / "web" / "docs"
WORDS = {"INT": "whole number", "FLOAT": "number", "STRING": "text", "BOOLEAN": "switch", "COMBO": "choice"}
LARGE = {2**64 - 1: "2^64 - 1"}


def table(node, heading):
    """The rows of the table under a heading, as lists of cells."""
    section = (PAGES / f"{node}.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows[2:]]


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


def test_the_inputs_are_those_of_the_pages(schemas):
    for node, schema in schemas.items():
        rows = {row[0]: row for row in table(node, "Inputs")}
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
        rows = [row[:2] for row in table(node, "Outputs")]
        types = [declared.get_io_type() for declared in schema.outputs]
        assert rows == [[declared.id or kind, kind] for declared, kind in zip(schema.outputs, types)], node
