"""The documents: links lead somewhere, quoted commands exist, names are those of the code."""

import argparse
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from bitdance_core.cli import build_parser
from paths import ROOT

HELP_PAGES = sorted((ROOT / "web" / "docs").rglob("*.md"))
READMES = sorted(ROOT.glob("README*.md"))
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *HELP_PAGES]
SCRIPT = re.compile(r"(?<![\w/.])(?:scripts|benchmarks|builtin|tests)/[\w/]+\.py\b")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
CITATION = re.compile(r"(?<![\w/.])docs/\w+\.md(?:#[\w-]+)?")
COMMAND = re.compile(r"python3? -m bitdance_core (?P<command>\w+)(?P<rest>[^`#]*)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE):
        plain = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def resolves(link: str, folder: Path) -> bool:
    """Whether a relative link, seen from `folder`, leads to a file of the repository, and to a heading of it."""
    path, _, anchor = link.partition("#")
    target = (folder / unquote(path)).resolve()
    if not (target.is_relative_to(ROOT) and target.exists()):
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target.read_text(encoding="utf-8")))


def broken_links(text: str, page: Path) -> list[str]:
    prose = SPAN.sub("code", FENCE.sub("", text))
    links = [link for link in LINK.findall(prose) if not re.match(r"\w+:", link)]
    return [link for link in links if not resolves(page.name + link if link[0] == "#" else link, page.parent)]


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return actions.choices


def quoted_code(text: str) -> str:
    """A page's quoted code: blocks with continued lines joined, and spans, which may go over a line's end."""
    blocks = FENCE.findall(text)
    spans = SPAN.findall(FENCE.sub("", text))
    return "\n".join([block.replace("\\\n", " ") for block in blocks] + [" ".join(span.split()) for span in spans])


def wrong_options(text: str) -> list[str]:
    """What quoted commands have that the argument parser does not: commands, options, choices."""
    wrong = []
    for line in quoted_code(text).split("\n"):
        for call in COMMAND.finditer(line):
            parser = commands().get(call["command"])
            if parser is None:
                wrong.append(call["command"])
                continue
            for option, value in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)(?:[ =](\{[^}]*\}|[\w.-]+))?", call["rest"]):
                action = parser._option_string_actions.get(option)
                if action is None:
                    wrong.append(f"{call['command']} {option}")
                elif action.choices and value.startswith("{") and set(value[1:-1].split(",")) != set(action.choices):
                    wrong.append(f"{call['command']} {option} {value}")
                elif action.choices and value[:1].islower() and value not in action.choices:
                    wrong.append(f"{call['command']} {option} {value}")
    return wrong


@every_page
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


@every_page
def test_quoted_commands_exist(page):
    assert wrong_options(page.read_text(encoding="utf-8")) == []


@every_page
def test_quoted_scripts_exist(page):
    quoted = set(SCRIPT.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(quoted) if not (ROOT / path).is_file()] == []


def test_citations_in_code_lead_somewhere():
    folders = ("bitdance_core", "nodes", "scripts", "benchmarks", "builtin", "tests")
    cited = {
        (file.relative_to(ROOT).as_posix(), citation)
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if file != Path(__file__).resolve()
        for citation in CITATION.findall(file.read_text(encoding="utf-8"))
    }
    assert cited, "the facts are cited in the code"
    assert [where for where in sorted(cited) if not resolves(where[1], ROOT)] == []


every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)


@every_readme
def test_the_readme_stays_short_and_names_the_two_commands(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "python3 scripts/demo.py" in text and "python3 scripts/test.py" in text


@every_readme
def test_the_readme_leads_to_every_document_and_workflow(readme):
    links = {unquote(link) for link in LINK.findall(readme.read_text(encoding="utf-8"))}
    targets = [*READMES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "workflows").glob("*.json")]
    assert [path.name for path in targets if path.relative_to(ROOT).as_posix() not in {*links, readme.name}] == []


def declared_nodes() -> dict[str, str]:
    """Ids and shown names as the nodes' schemas declare them."""
    pattern = re.compile(r'node_id="(\w+)",\s+display_name="([^"]+)"')
    return dict(pair for file in (ROOT / "nodes").rglob("*.py") for pair in pattern.findall(file.read_text("utf-8")))


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_table_of_nodes_is_that_of_the_schemas():
    table = {row[0]: row for row in rows((ROOT / "docs" / "design.md").read_text("utf-8")) if row[0][:8] == "BitDance"}
    assert {name: row[1] for name, row in table.items()} == declared_nodes()
    for name, row in table.items():
        inputs = (ROOT / "web" / "docs" / f"{name}.md").read_text("utf-8").partition("## Outputs")[0]
        assert row[2].split(", ") == re.findall(r"^- \*\*(\w+)\*\*, ", inputs, re.MULTILINE), name


@every_readme
def test_the_readme_names_every_node(readme):
    """As the page shows it in that language."""
    language = readme.stem.partition(".")[2] or "en"
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    named = {name for row in rows(readme.read_text("utf-8")) for name in re.split(", |、", row[0])}
    assert {texts[node]["display_name"] for node in declared_nodes()} <= named


def test_the_checks_see_what_is_wrong():
    page = ROOT / "README.md"
    text = (
        "[a](docs/facts.md) [b](docs/nothing.md) [c](docs/facts.md#sampler) [d](docs/facts.md#nothing) [e](../other.md)"
    )
    assert broken_links(text, page) == ["docs/nothing.md", "docs/facts.md#nothing", "../other.md"]
    assert broken_links("[a](#install) [`b`](#nothing) `[c](d)`\n```\n[e](f)\n```", page) == ["#nothing"]
    assert anchors("# A `b` (c)\n## Twice\n## Twice\n```\n# code\n```") == {"a-b-c", "twice", "twice-1"}
    text = "`python -m bitdance_core draw x`, `python -m bitdance_core generate x --seed 1\n--sedd 2`"
    assert wrong_options(text) == ["draw", "generate --sedd"]
    text = "```\npython -m bitdance_core convert a b --format {comfy,single} \\\n    [--dtype fp9] [--name N]\n```"
    assert wrong_options(text) == ["convert --format {comfy,single}", "convert --dtype fp9"]
    assert SCRIPT.findall("`scripts/demo.py`, bitdance_core/assets/builtin/x.py") == ["scripts/demo.py"]
