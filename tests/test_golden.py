"""The golden vectors of the repository, and the runner itself: that it cannot pass what it does not compute."""
import importlib
import json
import sys
from pathlib import Path

import golden
import pytest

HERE = Path(__file__).resolve().parent
TOPICS = sorted(f'{p.parent.name}/{p.stem}' for p in (HERE/'golden').glob('*/*.json') if 'cases' in json.loads(p.read_text('utf-8')))


@pytest.fixture(autouse=True)
def beside_the_runner(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def adapter_of(topic):
    paper, name = topic.split('/')
    return importlib.import_module(f'golden_adapters.{paper}').ADAPTERS[name]


def run(capsys, *argv):
    status = golden.main([str(a) for a in argv])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


@pytest.mark.parametrize('topic', TOPICS)
def test_topic(topic, capsys):
    status, out, err = run(capsys, HERE/'golden', '--only', topic)
    assert status == 0, err
    passed, total = out[0].removeprefix(f'{topic}: ').split('/')
    assert passed == total and out[1] == f'{passed} passed, 0 failed'


def test_real_records(capsys):
    vectors = HERE.parents[1]/'shared'/'golden'
    if not (vectors/'mmwalk'/'extract_real.json').is_file() or not golden.DATA.is_dir(): pytest.skip('the shared golden vectors and annotations are not beside the repository')
    assert run(capsys, vectors, '--only', 'mmwalk/extract_real')[0] == 0


def test_without_the_data_the_real_records_fail_and_say_so(capsys, tmp_path):
    (tmp_path/'mmwalk').mkdir()
    (tmp_path/'mmwalk'/'extract_real.json').write_text(json.dumps({'cases': [{'input': {'file': 'E1.jsonl', 'line': 0, 'sha256': '0'}, 'expected': {'question': 'x'}}]}))
    status, out, err = run(capsys, tmp_path, '--data', tmp_path/'nowhere')
    assert status == 1 and out == ['mmwalk/extract_real: 0/1', '0 passed, 1 failed'] and 'give the folder with the released annotations by --data' in err


def functions_called(adapter, case, data):
    "Names of the package's functions that an adapter calls itself."
    called, file = set(), sys.modules[adapter.__module__].__file__
    def watch(frame, event, arg):
        back = frame.f_back
        if event == 'call' and back is not None and back.f_code.co_filename == file and '/vlm_repro/' in frame.f_code.co_filename: called.add((frame.f_globals['__name__'], frame.f_code.co_name))
    sys.setprofile(watch)
    try: golden.run_case(adapter, case, data)
    finally: sys.setprofile(None)
    return called


@pytest.mark.parametrize('topic', TOPICS)
def test_a_topic_fails_when_the_function_behind_it_raises(topic, monkeypatch):
    path, adapter = HERE/'golden'/f'{topic}.json', adapter_of(topic)
    cases = [c for c in json.loads(path.read_text('utf-8'))['cases'] if not golden.is_crash(c['expected'])]
    if adapter(cases[0]['input'], golden.DATA) is golden.ABSENT: pytest.skip(f'{topic}: the program behind it is not installed')
    called = functions_called(adapter, cases[0], golden.DATA)
    assert called, f'the adapter of {topic} calls no function of the package'

    def broken(*args, **kwargs): raise RuntimeError('patched')
    for module, name in called:
        if hasattr(sys.modules[module], name):
            with monkeypatch.context() as patch:
                for held in (sys.modules[module], sys.modules[adapter.__module__]):
                    if hasattr(held, name): patch.setattr(held, name, broken)
                assert golden.run_case(adapter, cases[0], golden.DATA), f'{topic} passes without {module}.{name}'


def test_a_topic_without_adapter_fails(capsys, tmp_path):
    (tmp_path/'mmwalk').mkdir()
    (tmp_path/'nopaper').mkdir()
    for name in ('mmwalk/no_such_topic', 'nopaper/topic'): (tmp_path/f'{name}.json').write_text('{"cases": [{"input": 1, "expected": 1}, {"input": 2, "expected": 2}]}')
    (tmp_path/'mmwalk'/'counts.json').write_text('{"counts": {}}')
    status, out, err = run(capsys, tmp_path)
    assert status == 1 and out == ['mmwalk/no_such_topic: 0/2', 'nopaper/topic: 0/2', '0 passed, 4 failed'] and 'no adapter' in err
    assert run(capsys, tmp_path, '--only', 'mmwalk')[1] == ['mmwalk/no_such_topic: 0/2', '0 passed, 2 failed']


def test_nothing_to_run_is_a_failure(capsys, tmp_path):
    status, out, err = run(capsys, tmp_path, '--only', 'mmwalk')
    assert status == 1 and out == ['0 passed, 0 failed'] and 'no topics' in err


@pytest.mark.parametrize('expected, got, equal', [
    (1.0, 1.0 + 1e-13, True), (1.0, 1.0 + 1e-9, False), (1, 1.0, True), (1, True, False), (None, None, True), (None, 0, False), ('a', 'a ', False),
    ([1, 2], (1, 2), True), ([1], [1, 2], False), ({'a': 1}, {'a': 1, 'b': 2}, False), ({'error': 'KeyError'}, {'error': 'RecordError'}, True),
    ({'error': 'KeyError'}, {'value': 'x'}, False), ({'value': 'x'}, {'error': 'KeyError'}, False), (float('nan'), 0.0, False)])
def test_comparison(expected, got, equal):
    assert golden.same(expected, got) is equal


def test_a_crash_of_the_reference_needs_an_error_of_ours():
    case = {'input': 0, 'expected': {'error': 'ZeroDivisionError'}}
    def raises(error):
        def adapter(given, data): raise error
        return adapter
    assert golden.run_case(raises(ValueError('documented')), case, golden.DATA) is None
    assert golden.run_case(raises(RuntimeError('patched')), case, golden.DATA)
    assert golden.run_case(lambda given, data: {'value': 1}, case, golden.DATA)
