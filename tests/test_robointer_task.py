"RoboInter's stages as one task: settings, a whole run, the published files, answers that exist already."
import csv
import json
from dataclasses import replace

import pytest

from vlm_repro.core.adopted import score_files
from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Generation
from vlm_repro.core.tasks import get_task, make_settings, verdicts_run
from vlm_repro.models.protocol import load_model
from vlm_repro.report.published import Cell, Cells, Eligibility, load_published, short_name, verdict
from vlm_repro.robointer.cells import CHECKPOINTS, TABLE, row_name
from vlm_repro.robointer.data import TASKS
from vlm_repro.robointer.planning import published_planning
from vlm_repro.robointer.prompt import PROGRAMS
from vlm_repro.robointer.task import RoboInterSettings, adopt_predictions, choose, claim, data_folder, decoding_options, extract_answers, load_questions, training_recipe
from vlm_repro.robointer.upstream import read_folder, write_plans
from vlm_repro.train.paper import complete_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    import torch
    torch.set_num_threads(1)
    settings = RoboInterSettings(limit=2)
    return complete_run(get_task('robointer'), settings, load_model('tiny', tiny='robointer', dtype='float32'), tmp_path_factory.mktemp('run')/'run')


def test_a_run_is_whole(run):
    assert run.manifest['n'] == 2*len(TASKS) and not run.manifest['errors'] and run.manifest['watermark']
    table = run.path('table.csv').read_text(encoding='utf-8')
    assert 'cannot be judged' in table and 'Object G.D.' in table and 'as_published' in table
    judged = {row['column']: row['status'] for row in csv.DictReader(table.splitlines()) if row['variant'] == 'as_published' and row['status']}
    assert {p.column for p in load_published('robointer') if p.table == TABLE} <= judged.keys() | {'Trace'} and 'Object G.D. @0.5' in judged
    assert judged.get('Trace', 'cannot be judged') == 'cannot be judged'

def test_a_column_is_judged_in_the_unit_it_is_printed_in(run):
    task, settings = get_task('robointer'), RoboInterSettings(model='Qwen/Qwen2.5-VL-3B-Instruct')
    cells = Cells([Cell(TABLE, 'QwenVL2.5-3B', 'Trace', 'dtw', 'as_published', 2712., 'px', 2600., 2800., 2000, 0, 900, 'episode')])
    assert [v.cell.column for v in verdicts_run(task, settings, run, cells) if v.cell] == ['Trace']
    assert verdict(cells[0], next(p for p in load_published('robointer') if (p.row, p.column) == ('QwenVL2.5-3B', 'Trace')), Eligibility('paper', 'val', settings.model, '', 'verbatim')).status == 'reproduced'


def test_every_checkpoint_of_a_row_is_its_model():
    models = {p.row: p.model for p in load_published('robointer')}
    named = {'InternRobotics/RoboInter-VLM': 'RoboInter-Qwen-7B', 'InternRobotics/RoboInter-VLM_qwenvl25_3b': 'RoboInter-Qwen-3B', 'InternRobotics/RoboInter-VLM_llavaov_7B': 'RoboInter-LLaVAOV-7B'}
    assert named.items() <= CHECKPOINTS.items() and all(row_name(name) == row for name, row in named.items())
    own = {short_name(c): row for c, row in CHECKPOINTS.items()}
    assert {short_name(model): row for row, model in models.items()}.items() <= own.items()
    for c, row in CHECKPOINTS.items():
        assert short_name(claim(RoboInterSettings(model=c), {'release': 'x', 'missing_images': 0, 'official': True, 'asked': 1, 'n': 1, 'split': 'val'}, ['verbatim']).model) == short_name(models[row])


def test_published_files(run):
    files = sorted(p.name for p in run.path('upstream').glob('eval_details_*.json'))
    assert files == sorted(f'eval_details_{t}.json' for t in TASKS)
    assert sorted(p.name for p in (run.path('upstream')/'logs').iterdir()) == sorted(f'tiny_{t}.log' for t in TASKS)

def test_plans_are_written_as_their_scorers_read_them(run):
    folder = run.path('upstream')/'plans'
    assert sorted(p.name for p in folder.iterdir()) == ['eval_details_all_plan_VQA_selection_judgement_val.json', 'lang_eval_details_planning.json', 'lang_eval_results_planning.txt']
    alone, merged = read_folder(run.path('upstream')), read_folder(folder)
    assert merged == {t: alone[t] for t in ('planning', 'planning_choice', 'planning_decide')}
    means = published_planning(json.loads((folder/'eval_details_all_plan_VQA_selection_judgement_val.json').read_text()))
    assert sum(means.n.values()) == sum(map(len, merged.values()))
    words = json.loads((folder/'lang_eval_details_planning.json').read_text())
    assert [w['gt'] for w in words] == [r['gt'] for r in merged['planning']] and 'score=' in (folder/'lang_eval_results_planning.txt').read_text()


def test_a_merged_file_of_plans_is_scored(tmp_path):
    data = load_questions(RoboInterSettings(tasks='planning,planning_choice,planning_decide'))
    write_plans(tmp_path/'mine', data.samples, [Generation(s.id, s.gold) for s in data.samples])
    for extra in (tmp_path/'mine').glob('lang_*'): extra.unlink()
    scored = score_files('robointer', tmp_path/'mine', tmp_path/'run', data_root=str(data_folder(RoboInterSettings())))
    assert scored.path('table.csv').read_text(encoding='utf-8').count(',100.0,') >= 3


def test_answers_that_exist_are_scored(tmp_path):
    data = load_questions(RoboInterSettings(tasks='current_box'))
    rows = [{'id': s.meta['record_id'], 'pred': s.gold, 'gt': s.gold, 'image_path': ''} for s in data.samples]
    (tmp_path/'mine').mkdir()
    path = tmp_path/'mine'/'eval_details_current_box.json'
    path.write_text(json.dumps(rows))
    root = str(data_folder(RoboInterSettings()))
    scored = score_files('robointer', tmp_path/'mine', tmp_path/'run', data_root=root)
    assert '100.0' in scored.path('table.csv').read_text(encoding='utf-8')
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match='1 questions have no answer'): adopt_predictions(tmp_path/'mine', {'data_root': root})
    path.write_text(json.dumps([{**rows[0], 'id': 'other'}, *rows[1:]]))
    with pytest.raises(DataError, match='of another release'): adopt_predictions(tmp_path/'mine', {'data_root': root})
    with pytest.raises(DataError, match='is not that of the data'): path.write_text(json.dumps(rows)), adopt_predictions(tmp_path/'mine', {'data_root': root, 'copy': 'origin_format'})
    with pytest.raises(ValueError, match='cannot be said'): adopt_predictions(tmp_path/'mine', {'limit': 3})

@pytest.mark.parametrize('wrong, said', [({'tasks': 'current_boxes'}, 'is no task'), ({'copy': 'pixels'}, 'smart_resize_format'), ({'program': 'gpt'}, 'robobrain'), ({'mixture': 'droid_all'}, 'no data set'),
                                         ({'source': 'mine'}, 'intern'), ({'limit': -1}, '0 or more'), ({'question_type': 'free'}, 'refindoor')])
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=said): make_settings(get_task('robointer'), wrong)

def test_length_of_answers_is_the_programs():
    assert [RoboInterSettings(program=p).max_new_tokens for p in ('qwen', 'internvl', 'robobrain')] == [512, 1024, 768]
    assert RoboInterSettings(max_new_tokens=9).max_new_tokens == 9

def test_decoding_is_the_programs_unless_said_otherwise():
    found = {p: decoding_options(RoboInterSettings(program=p, seed=2)) for p in PROGRAMS}
    assert found['qwen'] == {'temperature': 0., 'top_p': 1., 'top_k': 0, 'repetition_penalty': 'own', 'seed': 2}
    assert found['robobrain'] == {'temperature': .7, 'top_p': 'own', 'top_k': 'own', 'repetition_penalty': 'own', 'seed': 2} and found['internvl']['temperature'] == 'own' == found['api']['temperature']
    assert decoding_options(make_settings(get_task('robointer'), {'program': 'robobrain', 'temperature': 0, 'top_k': 5}))['temperature'] == 0
    for wrong, said in (({'temperature': 'warm'}, 'own'), ({'top_p': 0}, 'top_p=0'), ({'temperature': True}, 'a number'), ({'thinking': True}, 'robobrain'), ({'echo': True, 'program': 'api'}, 'qwen')):
        with pytest.raises(ValueError, match=said): make_settings(get_task('robointer'), wrong)


def test_a_drawn_run_says_so_and_repeats(tmp_path):
    settings = RoboInterSettings(limit=1, tasks='current_box,contact_decide', program='robobrain', temperature=1.5, top_k=0, seed=3, max_new_tokens=12)
    runs = [complete_run(get_task('robointer'), replace(settings, seed=s), load_model('tiny', tiny='robointer', dtype='float32', **decoding_options(replace(settings, seed=s))), tmp_path/str(k), b)
            for k, (s, b) in enumerate(((3, 1), (3, 2), (4, 2)))]
    texts = [[row['text'] for row in r.rows('predictions')] for r in runs]
    assert sorted(texts[0]) == sorted(texts[1]) != sorted(texts[2])
    assert runs[0].manifest['model']['decoding'].items() >= {'do_sample': True, 'temperature': 1.5, 'seed': 3}.items()
    assert runs[0].manifest['settings'].items() >= {'temperature': 1.5, 'top_k': 0, 'top_p': 'own', 'seed': 3}.items()
    assert runs[0].rows('samples')[0]['request']['messages'][-1]['content'][0]['text'] == '<think></think><answer>'


def test_what_published_scripts_store_is_scored_as_published_only():
    data = load_questions(RoboInterSettings(tasks='current_box', limit=1))
    said = lambda text, **s: [a.value for a in extract_answers(data.samples, [Generation(data.samples[0].id, text)], RoboInterSettings(tasks='current_box', **s))]
    assert said('[[1, 2], [30, 40]]</answer>', program='robobrain') == ['[[1, 2], [30, 40]]', '[[1.0, 2.0], [30.0, 40.0]]']
    thought = 'At [[5, 6], [70, 80]]?</think><answer>[[1, 2], [30, 40]]</answer>'
    assert said(thought, program='robobrain', thinking=True) == ['[[1, 2], [30, 40]]', '[[1.0, 2.0], [30.0, 40.0]]']
    assert said('It is near [[5, 6], [70, 80]]', program='robobrain', thinking=True)[1] is None
    plain, strict = said('[[1, 2], [30, 40]]', echo=True)
    assert plain.startswith('system\nYou are a helpful assistant.\nuser\n') and plain.endswith('assistant\n[[1, 2], [30, 40]]') and data.samples[0].question.split('>')[-1].strip() in plain
    assert strict == '[[1.0, 2.0], [30.0, 40.0]]'


def test_a_larger_limit_keeps_the_smaller():
    samples = load_questions(RoboInterSettings(tasks='current_box,traj')).samples
    few, more = ({s.id for s in choose(samples, n, 1)} for n in (3, 5))
    assert few < more and len(more) == 10

def test_recipe_teaches_what_was_left_out():
    recipe = training_recipe(RoboInterSettings(recipe='tiny'))
    assert 'contact_box' in recipe.data[0].settings['mixture'] and recipe.tiny == 'robointer'
