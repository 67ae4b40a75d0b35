"""GPT4Scene: all adapters, by topic."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golden_adapters.gpt4scene_data import ADAPTERS as DATA
from golden_adapters.gpt4scene_images import ADAPTERS as IMAGES
from golden_adapters.gpt4scene_metrics import ADAPTERS as METRICS

ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {**METRICS, **IMAGES, **DATA}
