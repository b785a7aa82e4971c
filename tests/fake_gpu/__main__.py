"""`python -m tests.fake_gpu ARGUMENT…`: Python with these arguments, or the cases of `program.py`, on the fake GPU."""

import os
import subprocess
import sys

from tests.fake_gpu.build import environment, what_it_lacks

if what_it_lacks():
    sys.exit(f"the fake GPU cannot be built: {what_it_lacks()}")
given = sys.argv[1:]
arguments = given if given[:1] == ["-m"] or os.path.exists(given[0]) else ["-m", "tests.fake_gpu.program", *given]
sys.exit(subprocess.run([sys.executable, *arguments], env=environment(devices=2), check=False).returncode)
