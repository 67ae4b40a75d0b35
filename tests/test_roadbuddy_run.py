"""Whole runs of Road Buddy on the embedded world: a test file without answers, and what training takes over from a run."""
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from roadbuddy_files import FOUR, question, reply

from vlm_repro.core.media import MediaError
from vlm_repro.core.tasks import get_task, make_settings, rescore
from vlm_repro.core.video import video_index
from vlm_repro.models.choices import by_likelihood
from vlm_repro.models.protocol import load_model
from vlm_repro.report.published import load_published, verdicts
from vlm_repro.roadbuddy.annotations import annotation_file
from vlm_repro.roadbuddy.data import FOLDER, find_file, load
from vlm_repro.roadbuddy.extract import extract
from vlm_repro.roadbuddy.score import measure
from vlm_repro.roadbuddy.task import WORLD_SEED, WORLD_SIZE, claim, load_questions, render_questions, training_examples, training_recipe
from vlm_repro.roadbuddy.world import default_world
from vlm_repro.train.paper import complete_run
from vlm_repro.train.render import Example, render_example
from vlm_repro.train.setup import load_processor

TASK = get_task('roadbuddy')
SHARED = ['A. Có', 'B. Không', 'B. Không rõ', 'B. Một phần']


@pytest.fixture(scope='module')
def tiny():
    import torch
    torch.set_num_threads(1)
    return load_model('tiny', tiny='roadbuddy')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "The world's clips below a public test of six items: two cannot be asked, and one has a letter three times."
    file, folder = find_file(default_world(WORLD_SEED, WORLD_SIZE), 'public_test')
    items = json.loads(file.read_text(encoding='utf-8'))['data'][:6]
    items[1] = {**items[1], 'choices': None}
    items[3] = {**items[3], 'choices': SHARED}
    items[5] = {**items[5], 'video_path': '../x.mp4'}
    there = tmp_path_factory.mktemp('public')/FOLDER/'public_test'
    there.mkdir(parents=True)
    (there/'videos').symlink_to(folder/'public_test'/'videos')
    (there/'public_test.json').write_text(annotation_file(items), encoding='utf-8')
    return there.parents[1]


def ids_in(root):
    return [item['id'] for item in json.loads((root/FOLDER/'public_test'/'public_test.json').read_text(encoding='utf-8'))['data']]


def rows_of(path):
    with path.open(encoding='utf-8', newline='') as file: return list(csv.DictReader(file))


class Said:
    "The tiny model, with its replies replaced: what is tested is the way from a reply to the file."
    def __init__(self, model, text): self.model, self.text, self.name = model, text, model.name

    def __getattr__(self, name): return getattr(self.model, name)

    def prepare(self, requests): return self.model.prepare(requests)

    def answer(self, prepared, n): return [replace(g, text=self.text) for g in self.model.answer(prepared, n)]


def test_a_whole_public_test_ends_in_a_submission(tmp_path, root, tiny):
    settings = make_settings(TASK, {'data_root': str(root), 'split': 'public_test', 'parser': 'inference'})
    run = complete_run(TASK, settings, Said(tiny, 'B'), tmp_path/'run', 2)
    assert run.path('manifest.json').exists() and rows_of(run.path('table.csv')) == [] and run.path('table.csv').read_text().startswith('table,row,column')
    upstream = run.path('upstream')
    for name in ('submission.csv', 'corrected_submission.csv'):
        rows = rows_of(upstream/name)
        assert [r['id'] for r in rows] == ids_in(root) and [r['answer'] for r in rows] == list('BABBBA'), name
    timed = rows_of(upstream/'time_submission.csv')
    waits = {i: row['seconds'] for row in run.rows('timings') for i in row['ids']}
    assert [r['time'] == '' for r in timed] == [False, True, False, False, False, True] and all(int(r['time']) > 1000*waits[r['id']] for r in timed if r['time'])
    assert not (upstream/'results.json').exists()
    again = rescore(run.root, tmp_path/'again', parser='evaluate')
    again.close()
    assert (tmp_path/'again'/'upstream'/'submission.csv').read_bytes() == (upstream/'submission.csv').read_bytes()


def test_by_likelihood_a_shared_letter_is_submitted_too(tmp_path, root, tiny):
    settings = make_settings(TASK, {'data_root': str(root), 'split': 'public_test', 'read': 'likelihood'})
    data = load_questions(settings)
    run = complete_run(TASK, settings, by_likelihood(tiny, {s.id: s.meta['letters'] for s in data.samples}), tmp_path/'run', 4)
    said = {row['id']: row['choice_logprobs'] for row in run.rows('predictions')}
    shared = next(s for s in data.samples if s.meta['letters'] == 'ABBB')
    answer = {r['id']: r['answer'] for r in rows_of(run.path('upstream')/'corrected_submission.csv')}
    assert answer[shared.id] == 'ABBB'[max(range(4), key=lambda k: said[shared.id][k])] and list(answer) == ids_in(root)


def test_items_that_cannot_be_asked_are_known_by_id(root):
    data = load(root, 'public_test')
    assert data.identity['absent'] == {ids_in(root)[1]: 1, ids_in(root)[5]: 5} and data.identity['left_out'] == 2
    some = make_settings(TASK, {'data_root': str(root), 'split': 'public_test', 'limit': 2})
    assert load_questions(some).identity['asked'] == 2


@pytest.mark.parametrize('max_tiles', [0, 1, 6])
def test_training_cuts_a_frame_as_the_run_does(max_tiles):
    settings = make_settings(TASK, {'recipe': 'small', 'max_tiles': max_tiles, 'limit': 1})
    asked = render_questions(load_questions(settings), settings)[0]
    model = load_model('tiny', tiny='roadbuddy', max_tiles=max_tiles or None)
    example = next(e for e in training_examples(settings, 'val') if e.id == asked.id)
    assert render_example(load_processor(training_recipe(make_settings(TASK, {'recipe': 'tiny', 'max_tiles': max_tiles}))), example).n_visual == model.measure(asked).n_visual


def test_counts_are_those_of_the_part():
    settings = make_settings(TASK, {'split': 'val', 'split_by': 'source'})
    data = load_questions(settings)
    assert data.identity['clips'] == len({s.meta['clip'] for s in data.samples}) and data.identity['sources'] == len({s.meta['source'] for s in data.samples}) < 12


def test_training_questions_have_a_table_of_their_own(tmp_path, tiny):
    settings = make_settings(TASK, {'split': 'train', 'limit': 3})
    run = complete_run(TASK, settings, tiny, tmp_path/'run', 3)
    assert {r['table'] for r in rows_of(run.path('table.csv'))} == {'training'}


@pytest.mark.parametrize('name', ['OpenGVLab/InternVL3-8B', 'OpenGVLab/InternVL3-8B-hf'])
def test_the_recommended_checkpoints_meet_the_published_rows(name):
    samples = [question(n, FOUR) for n in range(298)]
    answers = extract(samples, [reply(s, 'A') for s in samples], ('evaluate@1',))
    for recipe, row, told in (('published', 'finetuned, 5 epochs', '70-85'), ('', 'zero-shot', '25-40')):
        settings = make_settings(TASK, {'model': name, 'recipe': recipe})
        cells = TASK.cells(samples, measure(samples, answers), settings).where(cluster='clip', unit='0-100', column='overall', metric='accuracy')
        run = claim(settings, {'frames': 'present', 'official': True, 'split': 'val', 'asked': 298, 'n': 298}, ['verbatim'])
        made = verdicts(cells, load_published('roadbuddy'), run)
        assert cells[0].row == f'InternVL3-8B / {row}' and made[0].published is not None and made[0].status == 'no published value'
        assert told in made[0].reason and 'expected, never measured' in made[0].reason and run.model == 'InternVL3-8B'
        assert made.markdown(not_run=True).count('never measured') == 4 and '48.89' in made.markdown(not_run=True) and '48.89' not in made.markdown()


def test_an_empty_picture_stands_for_a_clip_only_when_its_turn_comes(tmp_path, monkeypatch):
    "Under `blank` no frame is decoded before training; a clip that opens and cannot be decoded is then one empty picture, as in the published code."
    shutil.copytree(default_world(WORLD_SEED, WORLD_SIZE), tmp_path/'world')
    settings = make_settings(TASK, {'data_root': str(tmp_path/'world'), 'on_decode_error': 'blank', 'limit': 3, 'recipe': 'tiny'})
    with monkeypatch.context() as m:
        m.setattr('vlm_repro.roadbuddy.frames.read_frames', lambda *_: pytest.fail('a frame was decoded'))
        examples = training_examples(settings, 'train')
    clip = next(p['image'] for p in examples[0].messages[0]['content'] if p['type'] == 'image')
    held = open(clip, 'rb').read()
    start, n = held.index(b'mdat') + 4, int.from_bytes(held[held.index(b'mdat') - 4:held.index(b'mdat')], 'big')
    open(clip, 'wb').write(held[:start + 2000] + bytes(n - 2008) + held[start + n - 8:])
    assert len(video_index(clip).pts)
    processor = load_processor(training_recipe(settings))
    torn = render_example(processor, examples[0])
    monkeypatch.undo()
    assert sum(p['type'] == 'image' for p in examples[0].otherwise[0]['content']) == 1
    assert torn.n_visual == render_example(processor, Example('empty', examples[0].otherwise)).n_visual != render_example(processor, examples[1]).n_visual
    other = training_examples(make_settings(TASK, {'data_root': str(tmp_path/'world'), 'limit': 3}), 'train')
    with pytest.raises(MediaError): render_example(processor, other[0])


@pytest.mark.papers
@pytest.mark.parametrize('read', ['text', 'likelihood'])
def test_the_page_submits_the_whole_public_test(tmp_path, read):
    page, params = Path(__file__).parents[1]/'papers'/'roadbuddy.ipynb', {'out': str(tmp_path/'run'), 'split': 'public_test', 'recipe': '', 'read': read}
    command = [sys.executable, '-m', 'papermill', str(page), str(tmp_path/'page.ipynb'), '--no-progress-bar', *(x for k, v in params.items() for x in ('-p', k, v))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    file, _ = find_file(default_world(WORLD_SEED, WORLD_SIZE), 'public_test')
    asked = [item['id'] for item in json.loads(file.read_text(encoding='utf-8'))['data']]
    for name in (['submission.csv', 'corrected_submission.csv'] if read == 'text' else ['corrected_submission.csv']):
        rows = rows_of(tmp_path/'run'/'upstream'/name)
        assert [r['id'] for r in rows] == asked and {r['answer'] for r in rows} <= set('ABCD')
    assert 'expected, never measured' in (tmp_path/'page.ipynb').read_text(encoding='utf-8')
