"Training on the embedded world brings texts of the exercise that the tiny coach was never shown, and on blank films it brings none. Seven clips prove no bound, and the other exercises lose some of their texts: both are printed, neither is claimed."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from vlm_repro.core.tasks import get_task
from vlm_repro.fitcoach.feature_store import features_for
from vlm_repro.fitcoach.task import FitCoachSettings, known_feedbacks, training_recipe
from vlm_repro.fitcoach.timeline import clip_hits
from vlm_repro.fitcoach.tiny_data import HELD_OUT
from vlm_repro.models.protocol import load_model
from vlm_repro.report.gain import gains
from vlm_repro.train.paper import complete_run, tune, tuned_model

TASK = get_task('fitcoach')


def blanked(root, out):
    "The same features, all of them zero."
    for path in [p for p in root.rglob('*') if p.is_file()]:
        new = out/path.relative_to(root)
        new.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith('_features.npy'): np.save(new, np.zeros_like(np.load(path, mmap_mode='r')))
        else: shutil.copyfile(path, new)
    return str(out)


@pytest.mark.slow
def test_training_brings_texts_of_what_was_left_out_and_only_where_there_is_something_to_see(tmp_path):
    import torch
    torch.set_num_threads(1)
    untuned = FitCoachSettings(model='tiny', meteor=False)
    tuned = replace(untuned, recipe='tiny')
    data = TASK.load(untuned)
    features_for(TASK.load(replace(untuned, split='train')), 'tiny', progress=False)
    nothing = blanked(features_for(data, 'tiny', progress=False).root, tmp_path/'blank')
    options, recipe = {'tiny': 'fitcoach', 'drafts': known_feedbacks(tuned)}, training_recipe(tuned)
    trained = tune(recipe, tmp_path/'training')
    models = {untuned: load_model('tiny', **options), tuned: tuned_model(recipe, trained, **options)}
    def hits(settings, model, name):
        run = complete_run(TASK, settings, model, tmp_path/name, 24)
        TASK.export(run, settings)
        return clip_hits(json.loads((run.path('upstream')/'corrected_full.json').read_text()))
    seen = [hits(s, m, f'seen {k}') for k, (s, m) in enumerate(models.items())]
    blank = [hits(replace(s, features=nothing), m, f'blank {k}') for k, (s, m) in enumerate(models.items())]
    clusters, exercise = ({s.id: s.meta[k] for s in data.samples} for k in ('video', 'exercise'))
    groups = {i: 'new' if e in HELD_OUT else 'taught' for i, e in exercise.items()}
    on_film, on_nothing = ({g.group: g for g in gains(*pair, groups, clusters)} for pair in (seen, blank))
    print(f'{trained.steps} steps', 'on film', *on_film.values(), 'on nothing', *on_nothing.values(), 'each', *gains(*seen, exercise, clusters), sep='\n')
    assert on_film['new'].paired.diff > .2
    assert on_nothing['new'].paired.diff < .05
