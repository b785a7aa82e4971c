"""A tiny pretraining as torchrun starts it: `-m tests.leoclr_fast.tiny_run DATA OUT MAX_STEPS CHANGES`."""

import json
import sys
from pathlib import Path

from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.pages import leave_out

leave_out()
data, out, max_steps, changes = sys.argv[1:]
pretrain(tiny_config(**json.loads(changes)), Path(data), Path(out), max_steps=int(max_steps))
