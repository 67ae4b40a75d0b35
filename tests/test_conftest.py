"""A skip has to say why."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = '''
import pytest

@pytest.mark.skip
def test_marked(): ...

def test_called(): pytest.skip()

@pytest.mark.skipif(True, reason="needs a GPU; this machine has none")
def test_explained(): ...
'''


@pytest.fixture
def summary(tmp_path) -> str:
    """What pytest prints for a suite of two unexplained skips and an explained one."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_suite.py").write_text(SUITE)
    return subprocess.run([sys.executable, "-m", "pytest", "-rsf", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True).stdout


def test_an_unexplained_skip_fails_and_an_explained_one_does_not(summary):
    assert "1 failed, 1 skipped, 1 error" in summary
    assert "needs a GPU; this machine has none" in summary
    assert "test_marked: skipped without a reason" in summary and "test_called: skipped without a reason" in summary
