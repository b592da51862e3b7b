"""What other libraries say for nothing is not heard, and everything else is."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from finesight.library_noise import drop_kernel_hint


def test_only_the_hint_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = len(logger.filters)
    drop_kernel_hint()
    assert len(logger.filters) == before  # `import finesight` has put it there
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please …", ImportError("No module named 'kernels'"))
    logger.warning("Another warning: %s", 1)
    logger.error("An error")
    assert [record.getMessage() for record in caplog.records] == ["Another warning: 1", "An error"]


def test_importing_bitsandbytes_says_nothing() -> None:
    """Through peft, as a run does; on a CPU without bfloat16 instructions it says nothing anyhow."""
    code = "import finesight.models.adapter_files, sys; assert 'bitsandbytes' in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_warning_of_the_hub_is_shown_once() -> None:
    code = (
        "from finesight.cli import main\ntry:\n    main(['version'])\nexcept SystemExit:\n    pass\n"
        "from huggingface_hub.utils import logging\nlogging.get_logger('huggingface_hub.utils._http').warning('Retrying')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.count("Retrying") == 1, ran.stderr
