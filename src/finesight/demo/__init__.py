"""The demo: real scans of digits, a tiny real model, and the whole way from rows to a measured adapter. No network."""

from __future__ import annotations

from finesight.demo.settings import DemoSettings
from finesight.demo.stages import DemoResult, run_demo

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
