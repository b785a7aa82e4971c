"""One check in this process: `python -m leoclr_fast.doctor.one_check NAME [GIVEN]` prints its result as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict

from leoclr_fast.doctor.checks import chosen_checks
from leoclr_fast.doctor.result import failed


def main() -> None:
    """Libraries may print what they like: that goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, *rest = sys.argv[1:]
    (check,) = chosen_checks([name])
    try:
        result = check.run(json.loads(rest[0]) if rest else {"data": "", "out": "."})
    except Exception as error:
        traceback.print_exc()
        what = " ".join(str(error).split())[:300]
        remedy = f"See the whole story with `python -m leoclr_fast.doctor.one_check {name!r}`."
        result = failed(f"{type(error).__name__}: {what}", remedy)
    answer.write(json.dumps(asdict(result)))
    answer.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that were only half loaded may hang as they are torn down


if __name__ == "__main__":
    main()
