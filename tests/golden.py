"""Run the golden vectors: `python tests/golden.py DIR [--only PAPER[/TOPIC]] [--data DIR]`.

Every `<paper>/<topic>.json` below DIR that holds `cases` is a topic. Its cases go through the adapter of that name in `golden_adapters/<paper>.py`, which only
reshapes what a function of the package returns. A line a topic is printed, `paper/topic: passed/total`; the reasons of failures go to stderr. Where METEOR cannot run, its values alone are left out of
the comparison, as are digests of prompts that are no part of the package, and stderr says so.
"""
import argparse
import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_adapters import ABSENT

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent/'shared'/'data'/'mmwalk'
EXACT = (1e-12, 1e-12) # relative, absolute
APART = {'fitcoach/module_numerics': (1e-4, 1e-5)} # topics of float32 networks, as their files say
SELDOM = ('param_order',) # recorded for some cases only, null in the others
RAISED = (ValueError, LookupError, TypeError)
CRASHED = ('error', 'raises')
LEFT_OUT = {'METEOR': 'METEOR, whose program is not here', 'meteor': "METEOR, as NLTK or its data are not here", 'system_sha256': "the digest of a reference's prompt, which the package does not hold"}


@dataclass(frozen=True)
class Result:
    "One topic's outcome."
    name: str
    passed: int
    total: int
    reasons: tuple[str, ...] = ()


def is_crash(expected: Any) -> bool:
    "Whether the reference crashed instead of returning a value."
    return isinstance(expected, dict) and any(expected.get(key) for key in CRASHED)


def left_out(key: str, got: Any) -> bool:
    "Whether a value is one of `LEFT_OUT` and is absent; nothing else may be."
    found = next((what for name, what in LEFT_OUT.items() if name in key), None) if got is ABSENT else None
    if found: left_out.counts[found] += 1
    return found is not None


def why_left_out(what: str) -> str:
    "What was left out, and for METEOR why, with what would bring it."
    from vlm_repro.metrics.meteor import meteor_absence
    from vlm_repro.metrics.meteor_nltk import meteor_nltk_absence
    why = {LEFT_OUT['METEOR']: meteor_absence, LEFT_OUT['meteor']: meteor_nltk_absence}.get(what, str)()
    return f'{what} ({why})' if why else what


left_out.counts = Counter()


def same(expected: Any, got: Any, apart: tuple[float, float] = EXACT) -> bool:
    "Equal values; floats within 1e-12, or as far `apart` as the topic allows, bool and int kept apart, and a crash of the reference matched by an error of ours."
    if is_crash(expected): return is_crash(got)
    if isinstance(expected, dict): return isinstance(got, dict) and expected.keys() == got.keys() and all(left_out(k, got[k]) or (v is None and k in SELDOM) or same(v, got[k], apart) for k, v in expected.items())
    if isinstance(expected, list): return isinstance(got, list | tuple) and len(expected) == len(got) and all(same(e, g, apart) for e, g in zip(expected, got))
    if isinstance(expected, float) or isinstance(got, float):
        return isinstance(got, int | float) and isinstance(expected, int | float) and math.isclose(expected, got, rel_tol=apart[0], abs_tol=apart[1])
    return type(expected) is type(got) and expected == got


def run_case(adapter: Callable[[Any, Path], Any], case: dict[str, Any], data: Path, apart: tuple[float, float] = EXACT) -> str | None:
    "Why a case fails; None when it passes."
    expected = case['expected'] if 'expected' in case else {key: case[key] for key in CRASHED if key in case}
    try: got = adapter(case['input'], data)
    except RAISED as e: return None if is_crash(expected) else f'raised {type(e).__name__}: {e}'
    except Exception as e: return f'raised {type(e).__name__}: {e}'  # noqa: BLE001 - whatever a patched or broken function raises is a failed case
    if left_out(getattr(adapter, '__name__', ''), got): return None
    return None if same(expected, got, apart) else f'expected {expected!r:.200}, got {got!r:.200}'


def adapters_of(paper: str) -> dict[str, Callable[[Any, Path], Any]]:
    "The adapters of a paper; none when it has no module."
    if not (HERE/'golden_adapters'/f'{paper}.py').is_file(): return {}
    return importlib.import_module(f'golden_adapters.{paper}').ADAPTERS


def run_topic(path: Path, data: Path) -> Result:
    "Run all cases of one file."
    cases, name = json.loads(path.read_text('utf-8'))['cases'], f'{path.parent.name}/{path.stem}'
    adapter = adapters_of(path.parent.name).get(path.stem)
    if adapter is None: return Result(name, 0, len(cases), ('no adapter for this topic',))
    reasons = [f'case {i}: {why}' for i, case in enumerate(cases) if (why := run_case(adapter, case, data, APART.get(name, EXACT)))]
    return Result(name, len(cases) - len(reasons), len(cases), tuple(reasons))


def topics(folder: Path, only: str | None) -> Iterator[Path]:
    "The topic files below a folder, or those of one paper or topic."
    for path in sorted(folder.glob('*/*.json')):
        if only and only not in (path.parent.name, f'{path.parent.name}/{path.stem}'): continue
        held = json.loads(path.read_text('utf-8'))
        if isinstance(held, dict) and 'cases' in held: yield path


def main(argv: list[str] | None = None) -> int:
    "Run, print, and return the exit status: 0 only when at least one case ran and all passed."
    parser = argparse.ArgumentParser(description='Run golden vectors through the package.')
    parser.add_argument('folder', type=Path, help='folder with <paper>/<topic>.json')
    parser.add_argument('--only', help='PAPER or PAPER/TOPIC')
    parser.add_argument('--data', type=Path, default=DATA, help='mmWalk data folder, for mmwalk/extract_real')
    options = parser.parse_args(argv)
    results = []
    for path in topics(options.folder, options.only):
        results.append(result := run_topic(path, options.data))
        print(f'{result.name}: {result.passed}/{result.total}', flush=True)
        for what, n in left_out.counts.items(): print(f'  {result.name}: not compared {n} times: {why_left_out(what)}', file=sys.stderr, flush=True)
        left_out.counts.clear()
        for reason in result.reasons[:3]: print(f'  {result.name} {reason}', file=sys.stderr, flush=True)
    passed, total = sum(r.passed for r in results), sum(r.total for r in results)
    if not results: print(f'no topics below {options.folder}' + (f' for --only {options.only}' if options.only else ''), file=sys.stderr)
    print(f'{passed} passed, {total - passed} failed')
    return 0 if results and passed == total else 1


if __name__ == '__main__':
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
