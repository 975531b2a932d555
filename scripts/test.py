"""Run every check: `python3 scripts/test.py [--long] [--browser] [pytest arguments]`.

--long adds the checks that take minutes (the built-in model on 100 prompts at every size). Browser tests run if
Chromium is installed; --browser fails if it is not.
"""

import sys

from environment import ensure_all, find_chromium, run


def main() -> int:
    arguments = sys.argv[1:]
    left_out = [] if "--long" in arguments else ["long"]
    if find_chromium() is None:
        if "--browser" in arguments:
            sys.exit("--browser needs Chromium, which was not found; on Debian and Ubuntu: apt install chromium")
        print("skipping the browser tests: Chromium is not installed", flush=True)
        left_out.append("browser")
    selection = ["-m", " and ".join(f"not {mark}" for mark in left_out)] if left_out else []
    arguments = [a for a in arguments if a not in ("--long", "--browser")]
    python, _ = ensure_all("test", "demo")
    for command in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("pytest", *selection, *arguments)):
        status = run(python.with_name(command[0]), *command[1:])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
