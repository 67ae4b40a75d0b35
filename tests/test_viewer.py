"""The page that shows every sample of a run: complete, escaped, self-contained, and bounded."""
import json
import re
import shutil
import subprocess
import time

import pytest

from vlm_repro.core.records import Score
from vlm_repro.core.runs import RunError, open_run
from vlm_repro.report.example import example_run
from vlm_repro.report.figures import bars, heatmap, save_figures
from vlm_repro.report.rundata import choose_cells, groups, load_run
from vlm_repro.report.tables import find_sample, report_html, sample_text, save_report, score_table, worst
from vlm_repro.report.viewer import INLINE_ROWS, browse, judge_replies


@pytest.fixture
def folder(tmp_path):
    return example_run(tmp_path / 'runs' / 'example' / 'first')


def data_of(page: str) -> dict:
    return json.loads(page.split('<script type="application/json" id="run">')[1].split('</script>')[0])


def test_every_sample_is_on_the_page_with_its_stages(folder):
    run, data = load_run(folder), data_of(browse(folder).html())
    assert [r['id'] for r in data['rows']] == list(run.samples)
    row = data['rows'][0]
    assert row['gold'] == run.samples[row['id']]['gold'] and row['text'] == run.predictions[row['id']]['text']
    assert {s['variant'] for s in row['scores']} == {'corrected', 'as_published'}
    assert row['judge'] == judge_replies(run)[row['id']]
    assert [data['images'][i]['path'] for i, _ in row['views']] == [m['path'] for m in run.samples[row['id']]['media']]
    assert all(data['images'][i]['uri'].startswith('data:image/jpeg;base64,') for i, _ in row['views'])


def test_prompt_is_the_one_that_was_sent(folder):
    run, data = load_run(folder), data_of(browse(folder).html())
    for row in data['rows']:
        said = [(data['messages'][i]['role'], [p[1] for p in data['messages'][i]['parts'] if p[0] == 'text']) for i in row['prompt']]
        sent = run.samples[row['id']]['request']['messages']
        assert said == [(m['role'], [p['text'] for p in m['content'] if p['type'] == 'text']) for m in sent]


def test_shared_messages_and_images_are_kept_once(folder):
    run, data = load_run(folder), data_of(browse(folder).html())
    sent = [json.dumps(m, sort_keys=True) for s in run.samples.values() for m in s['request']['messages']]
    assert len(data['messages']) == len(set(sent)) < len(sent)
    assert len(data['images']) == len({m['path'] for s in run.samples.values() for m in s['media']})


def test_model_output_is_never_markup(folder):
    page = browse(folder).html()
    hostile = [r['text'] for r in load_run(folder).predictions.values() if '<' in r['text']]
    assert hostile and not any(text in page for text in hostile)
    assert '<' not in re.search(r'id="run">(.*?)</script>', page, re.S)[1]
    assert hostile[0] in [r['text'] for r in data_of(page)['rows']]
    assert "default-src 'none'" in page


def test_script_is_the_one_the_policy_allows(folder):
    import base64
    import hashlib
    page = browse(folder).html()
    script = re.search(r'<script>(.*?)</script>', page, re.S)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page


def test_nothing_is_loaded_from_elsewhere(folder, tmp_path):
    page = browse(folder).save(tmp_path / 'page.html').read_text(encoding='utf-8')
    assert '://' not in page and str(tmp_path) not in page


def test_missing_images_are_said_to_be_missing(folder):
    shutil.rmtree(folder.parent / 'frames')
    data = data_of(browse(folder).html())
    assert all(i['uri'] is None and 'no such file' in i['why'] for i in data['images'])
    assert '0 of 12 images are embedded' in browse(folder).html()


def test_picture_budget_is_kept_and_counted(folder):
    data = data_of(browse(folder).html(media_kb=3))
    kept = [i for i in data['images'] if i['uri']]
    assert 0 < len(kept) < len(data['images'])
    assert {i['why'] for i in data['images'] if not i['uri']} == {'not embedded in this page'}
    assert f'{len(kept)} of {len(data["images"])} images' in browse(folder).html(media_kb=3)


def test_matching_samples_survive_the_cap_on_rows(folder):
    view = browse(folder, category='exist', error=True)
    data = data_of(view.html(max_rows=1))
    assert [r['label'] for r in data['rows']] == ['timeout']
    assert '1 of 12 samples are on this page' in view.html(max_rows=1)
    assert data['preset']['group:category'] == 'exist' and data['preset']['error'] == '*'


def test_score_filter_is_a_range_or_a_value(folder):
    assert data_of(browse(folder, score=2).html())['preset'] | {'min': 2, 'max': 2} == data_of(browse(folder, score=2).html())['preset']
    first = data_of(browse(folder, score=(1, 2)).html(max_rows=3))['rows']
    assert all(r['scores'][0]['values'] == [2.0] for r in first)


@pytest.mark.parametrize('wrong, says', [({'category': 'E9'}, 'colour, count, exist'), ({'error': 'oom'}, 'timeout'), ({'page_size': 0}, 'at least 1')])
def test_unknown_filter_values_are_refused(folder, wrong, says):
    with pytest.raises(ValueError, match=says): browse(folder, **wrong)


def test_flips_are_marked(folder):
    data = data_of(browse(folder).html())
    assert [r['label'] for r in data['rows'] if r['flip']] == ['timeout'] and data['flips'] == 1


def test_a_run_that_is_not_complete_can_be_browsed(folder):
    (folder / 'manifest.json').unlink()
    for name in ('scores.jsonl', 'answers.jsonl', 'table.csv', 'judge.jsonl'): (folder / name).unlink()
    lines = (folder / 'predictions.jsonl').read_text().splitlines(keepends=True)
    (folder / 'predictions.jsonl').write_text(''.join(lines[:4]) + lines[4][:20])
    data = data_of(browse(folder).html())
    assert sum(r['text'] is not None for r in data['rows']) == 4 and len(data['rows']) == 12
    assert 'not complete' in browse(folder).html()


def test_a_notebook_frame_cannot_reach_the_notebook(folder):
    frame = browse(folder)._repr_html_()
    assert frame.startswith("<iframe sandbox='allow-scripts' srcdoc='") and 'allow-same-origin' not in frame
    inner = frame.split("srcdoc='")[1].split("'")[0]
    assert '<script>' in inner and len(inner) > 1000


def test_seven_thousand_samples_make_a_page(tmp_path):
    run = load_run(example_run(tmp_path / 'runs' / 'example' / 'small'))
    big = open_run(tmp_path / 'runs' / 'example' / 'big', {'paper': 'example', 'model': 'written down'})
    ids = [(i, k, f'{i}-{k}') for k in range(584) for i in run.samples]
    big.write('samples', [{**run.samples[i], 'id': new} for i, _, new in ids])
    big.write('predictions', [{**run.predictions[i], 'id': new} for i, _, new in ids])
    big.write('scores', [{**s, 'id': new} for i, _, new in ids for s in run.scores[i]])
    big.close()
    start = time.process_time()
    page = browse(big.root).html()
    assert time.process_time() - start < 20
    assert len(data_of(page)['rows']) == 7008
    assert len(page) < 12_000_000
    inline = browse(big.root)._repr_html_()
    assert f'{INLINE_ROWS} of 7008 samples are on this page' in inline and len(inline) < 1_000_000


def test_a_browser_draws_it_and_runs_no_model_output(folder, tmp_path):
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None: pytest.skip('no Chromium here (Debian: apt-get install chromium), so the page is not drawn')
    page = browse(folder, page_size=50).save(tmp_path / 'page.html')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    done = subprocess.run([chromium, *flags, f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', f'file://{page}'], capture_output=True, text=True, timeout=120)
    assert done.stdout.count('<article') == 12 and '<title>example/first</title>' in done.stdout
    assert '&lt;script&gt;document.title=2' in done.stdout


def test_groups_are_the_keys_worth_filtering_by(folder):
    assert groups(load_run(folder)).keys() == {'category', 'scenario', 'trajectory'}


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match='no run folder'): browse(tmp_path)


def test_broken_settings_are_named(folder):
    (folder / 'settings.json').write_text('{')
    with pytest.raises(RunError, match='settings.json: not JSON'): load_run(folder)


def test_report_holds_tables_figures_samples_and_manifest(folder):
    save_figures(folder, {'by_category': bars(folder), 'by_scenario': heatmap(folder)})
    page = report_html(folder)
    assert page.count('data:image/png;base64,') == 2 and 'srcdoc=' in page
    assert 'says nothing of any model' in page and 'answers_digest' in page and '://' not in page.replace('http-equiv', '')
    assert save_report(folder).name == 'report.html'


def test_figures_carry_the_watermark(folder):
    texts = [t.get_text() for f in (bars(folder), heatmap(folder)) for t in f.texts]
    assert texts.count("NOT THE PAPER'S DATA") == 2
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps({**manifest, 'watermark': None}))
    assert not [t for t in bars(folder).texts if 'PAPER' in t.get_text()]


def test_bars_stand_at_the_values_of_the_table(folder):
    figure, cells = bars(folder), choose_cells(load_run(folder), table=None)
    heights = sorted(round(p.get_height(), 6) for p in figure.axes[0].patches)
    assert heights == sorted(round(float(c['value']), 6) for c in cells)


def test_table_shows_both_variants_and_failures(folder):
    text = score_table(folder).text
    assert text.startswith('WATERMARK') and 'corrected' in text and 'as published' in text
    line = next(line for line in text.splitlines() if line.strip().startswith('exist'))
    assert line.split()[-5:-3] == ['3', '1']


def test_the_worst_answers_come_from_every_group():
    scores = [Score(f'{c}-{i}', 'm', v, value) for c in ('E3', 'E4', 'H2') for i in range(4) for v, value in (('corrected', (1.,)), ('as_published', (0.,)))]
    scores += [Score('E1-0', 'm', 'corrected', (.5,)), Score('M1-0', 'm', 'corrected', None, 'timeout: 60 s')]
    groups = {s.id: s.id.split('-')[0] for s in scores}
    assert [s.id for s in worst(scores, groups, 5)] == ['E1-0', 'E3-0', 'E4-0', 'H2-0', 'E3-1']
    assert [s.variant for s in worst(scores, groups, 2, 'as_published')] == ['as_published'] * 2


def test_show_finds_by_prefix_and_prints_every_stage(folder):
    run = load_run(folder)
    i = find_sample(run, 'count-812')
    text = sample_text(run, i)
    for part in (run.samples[i]['question'], run.samples[i]['gold'], run.predictions[i]['text'], 'judge: 2 (other text)', 'judge, corrected: 2', run.predictions[i]['pixel_hash']):
        assert part in text
    with pytest.raises(ValueError, match='4 ids begin with'): find_sample(run, 'count-')
    with pytest.raises(ValueError, match='close ones: count-81209ffd'): find_sample(run, 'count_81209ffd')


def test_frames_of_a_video_are_shown_as_the_model_saw_them(tmp_path):
    import base64
    import io

    import numpy as np
    from PIL import Image

    from vlm_repro.core.video import read_frames
    folder = example_run(tmp_path/'runs'/'example'/'filmed', film=True)
    run, data = load_run(folder), data_of(browse(folder).html())
    sent = [p for p in run.samples[data['rows'][0]['id']]['request']['messages'][-1]['content'] if p['type'] == 'image']
    views = [data['images'][i] for i, _ in data['rows'][0]['views']]
    assert [v['path'] for v in views] == [f'Street00/drive.mp4 frame {p["frame"]}' for p in sent] and len({p['frame'] for p in sent}) == 3
    for view, image in zip(views, read_frames(sent[0]['image'], [p['frame'] for p in sent])):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(view['uri'].split(',')[1]))).convert('RGB')).astype(int)
        assert shown.shape == np.asarray(image).shape and np.abs(shown - np.asarray(image)).mean() < 6
    assert f'drive.mp4 frame {sent[1]["frame"]}' in sample_text(run, data['rows'][0]['id'])


def test_a_broken_video_is_said_to_be_broken(tmp_path):
    folder = example_run(tmp_path/'runs'/'example'/'filmed', film=True)
    (folder.parent/'frames'/'Street01'/'drive.mp4').write_bytes(b'')
    data = data_of(browse(folder).html())
    why = {i['path'].split('/')[0]: i['why'] for i in data['images'] if i['uri'] is None}
    assert set(why) == {'Street01'} and 'is empty' in why['Street01']
