"""What every test stands on: cold plans, warm kernels, a fresh Dynamo, two threads."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Compiled C++ is shared between runs. Graphs are not: a plan kept from an earlier run
# would hide a change to the planner. Tests of the caches turn them on for themselves.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "inductor")
)
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ["MEMCOMPILE_CACHE"] = tempfile.mkdtemp(prefix="memcompile-tests-")
atexit.register(shutil.rmtree, os.environ["MEMCOMPILE_CACHE"], ignore_errors=True)
os.environ["MEMCOMPILE_RATES"] = "fixed"  # plans are the same on every machine
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes: workers fill the cores
os.environ["AOT_INDUCTOR_ENABLE_LINE_TABLES"] = "0"  # a tenth of the C++ compiler's time
os.environ["HF_HUB_OFFLINE"] = "1"  # subjects have random weights: nothing is fetched

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing compiled or drawn by one test reaches the next."""
    from memcompile import live

    torch._dynamo.reset()
    live.forget()
    torch.manual_seed(0)
