"""Before a run: its flags are read before anything heavy is imported, and a grid looks at it before it starts one.

    if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
        args = parsed(complete_flags, build_parser().parse_args())

`common.grid` starts a script with environment variable FEDQUARTET_CHECK: "flags" ends it where its flags are read,
"study" where data and model are read, nothing is written yet, or where something would have to be downloaded.
"""

import os
import sys

from common.cli import checked

CHECK = "FEDQUARTET_CHECK"


def parsed(function, *args):
    """function(*args), the script's flags; where that is a UsageError, its line on stderr and exit code 2."""
    flags = checked(function, *args)
    stop_if_checked("flags")
    return flags


def stop_if_checked(at):
    """Ends the process with exit code 0 where a grid wanted to know no more than that it comes so far."""
    if os.environ.get(CHECK) == at:
        sys.exit(0)
