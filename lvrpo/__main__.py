"""`lvrpo`, as a command and as `python -m lvrpo`: sees that what it needs is installed, then runs.

The ops need torch only, so the command may be there without the packages of its extra.
"""

from __future__ import annotations

import sys

from lvrpo import info


def main() -> None:
    """Run the command; missing packages end it with one line and exit code 2, before anything."""
    if sys.argv[1:] == ["info"]:  # tells what is missing, and must not need it
        print(info.describe())
        return
    try:
        info.require(*info.packages_of("train"))
        from lvrpo.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if (error.name or "lvrpo").partition(".")[0] == "lvrpo":
            raise
        # One that a package of the extra needs itself is named by Python alone.
        missing = str(error) if info.INSTALL in str(error) else f"{error}; {info.INSTALL}"
        print(f"lvrpo: {missing}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
