"""A second process compiles from torch's caches, plans nothing, and still has its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, memcompile
from torch._dynamo.utils import counters
sys.path.insert(0, sys.argv[2])

def step(x, w):
    for each in w:
        x = torch.tanh(x @ each)
    return x.square().mean()

torch.manual_seed(0)
x, w = torch.randn(64, 32, requires_grad=True), torch.randn(4, 32, 32, requires_grad=True)
options = {"budget": "min"}
if len(sys.argv) > 3:
    options["passes"] = ["default", __import__(sys.argv[3]).Mine()]
loss = torch.compile(step, backend="memopt", options=options)(x, w)
loss.backward()
report = memcompile.reports()[-1]
print(json.dumps({
    "cached": report.cached, "lowered": report.lowered, "moves": len(report.moves),
    "hits": counters["aot_autograd"]["autograd_cache_hit"], "loss": loss.item(),
    "gradient": w.grad.sum().item(),
}))
"""

MINE = """
import dataclasses
from typing import ClassVar
import memcompile

@dataclasses.dataclass(frozen=True)
class Mine(memcompile.Proposer):
    name: ClassVar[str] = "mine"
    def propose(self, step, context):
        return []
"""


def run(folder: Path, *args: str) -> dict:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "MEMCOMPILE_CACHE": str(folder / "memcompile"),
    }
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(folder), *args],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_plans_nothing_and_has_its_report(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert not first["cached"] and first["moves"]
    assert second["cached"] and second["hits"] == 1
    for key in ("lowered", "moves", "loss", "gradient"):
        assert first[key] == second[key]


@pytest.mark.slow
def test_editing_a_pass_invalidates_the_cache(tmp_path: Path) -> None:
    module = tmp_path / "mine_pass.py"
    module.write_text(MINE)
    run(tmp_path, "mine_pass")
    assert run(tmp_path, "mine_pass")["hits"] == 1
    module.write_text(MINE.replace("return []", "return list()"))
    edited = run(tmp_path, "mine_pass")
    assert edited["hits"] == 0 and not edited["cached"]
