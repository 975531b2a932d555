"""Run every check: `python3 scripts/test.py [--long] [pytest arguments]`.

--long adds the checks that take minutes (the built-in model on 100 prompts at every size).
"""

import sys

from environment import ensure_all, run


def main() -> int:
    arguments = sys.argv[1:]
    selection = [] if "--long" in arguments else ["-m", "not long"]
    arguments = [a for a in arguments if a != "--long"]
    python, comfyui = ensure_all("test", "demo")
    for command in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("pytest", *selection, *arguments)):
        status = run(python.with_name(command[0]), *command[1:])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
