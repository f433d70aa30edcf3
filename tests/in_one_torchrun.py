"""Several runs of train.py, one after the other in the processes of one torchrun: they start once.

torchrun --standalone --nproc-per-node 2 in_one_torchrun.py commands.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hydra.core.global_hydra import GlobalHydra

import train
from harness.machine import distributed

for command in json.loads(Path(sys.argv[1]).read_text()):
    GlobalHydra.instance().clear()
    sys.argv[1:] = command
    train.main()
distributed.end()
