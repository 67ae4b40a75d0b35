"""One thread a test process, and no skip without a reason."""
import os

import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

UNEXPLAINED = ("", "unconditional skip", "Skipped", "Skipped:")


@pytest.fixture(scope="module")
def bodies():
    """The requests that a module's chat server got, oldest first."""
    return []


@pytest.fixture(scope="module")
def toy(request, tmp_path_factory):
    """A folder with a random model of the module's `FAMILY`, for the recipes of `train_toy`; torch on one thread."""
    import torch

    from vlm_repro.models.families import random_checkpoint
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("toy")
    random_checkpoint(request.module.FAMILY, folder / "model")
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip that gives no reason into a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ").strip() in UNEXPLAINED:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: skipped without a reason"
