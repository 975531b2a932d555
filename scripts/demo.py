"""From a fresh machine to a picture: `python3 scripts/demo.py ["prompt"]`."""

import sys

from environment import ROOT, ensure_venv, run

PROMPT = "a large red star on a blue background"


def main() -> int:
    prompt = " ".join(sys.argv[1:]) or PROMPT
    picture = ROOT / "demo.png"
    return run(ensure_venv(), "-m", "bitdance_core", "generate", prompt, "-o", picture)


if __name__ == "__main__":
    sys.exit(main())
