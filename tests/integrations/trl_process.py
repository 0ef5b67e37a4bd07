"""One process of a run of several: python trl_process.py KIND FOLDER OPTIONS, under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trl
from integrations.trl_runs import run

from lvrpo.integrations.trl import GRPOTrainer

KINDS = {"theirs": trl.GRPOTrainer, "ours": GRPOTrainer}

if __name__ == "__main__":
    kind, folder, options = sys.argv[1:]
    found = run(KINDS[kind], Path(folder), **json.loads(options))
    norms = [float(gradient.norm()) for gradient in found.gradients]
    result = Path(folder) / f"{kind}-{os.environ['RANK']}.json"
    result.write_text(json.dumps({"logged": found.logged, "norms": norms}), encoding="utf-8")
