"""RoboInter: all adapters, by topic."""
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PARTS = [f'golden_adapters.robointer_{part}' for part in ('data', 'eval', 'model')]
ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {topic: adapter for part in PARTS if find_spec(part) for topic, adapter in import_module(part).ADAPTERS.items()}
