"""Print a version's part of CHANGELOG.md: `python3 scripts/changelog.py 0.1.0` (the registry shows it)."""

import re
import sys

from environment import ROOT


def part(text: str, version: str) -> str:
    """Return the lines below `## VERSION`. Raises ValueError if there is no such heading, or nothing below it."""
    found = re.search(rf"^## {re.escape(version)}(?: .*)?\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if not found or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has no part '## {version}': rename 'Unreleased' before a release")
    return found[1].strip()


def main() -> None:
    try:
        print(part((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
