"""One check in this process: `python -m leoclr_fast.doctor.one_check NAME [GIVEN]` prints its finding as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict

from leoclr_fast.doctor.checks import CHECKS
from leoclr_fast.doctor.finding import failed


def main() -> None:
    """Libraries may print what they like: that goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, *rest = sys.argv[1:]
    given = json.loads(rest[0]) if rest else {"data": "", "out": "."}
    check = next(check for check in CHECKS if check.name == name)
    try:
        finding = check.run(given)
    except Exception as error:
        traceback.print_exc()
        what = " ".join(str(error).split())[:300]
        finding = failed(
            f"{type(error).__name__}: {what}",
            f"See the whole story with `python -m leoclr_fast.doctor.one_check {name!r}`.",
        )
    answer.write(json.dumps(asdict(finding)))
    answer.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that were only half loaded may hang as they are torn down


if __name__ == "__main__":
    main()
