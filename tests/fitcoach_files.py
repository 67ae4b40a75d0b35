"A small data root in the released layout and a small streaming checkpoint, for tests."
import json
from pathlib import Path

import numpy as np

from vlm_repro.fitcoach.data import FOLDERS, LABELS

START, FPS = 1_707_431_506., 23
RLE = [('', 20), ('First up are squats!', 40), ('', 100), ('Nice work!', 30), ('', 110), ('Moving on to lunges!', 40), ('', 60), ('Go lower!', 20), ('', 60), ('3', 20), ('', 100), ("That's the end!", 20), ('', 30)]
COACHING = ('Nice work!', 'Go lower!', '3')


def add_session(root: Path, id: str, split: str = 'test', coached: bool = True, channels: int = 6, steps: int | None = None) -> dict:
    "Clock, features and record of a workout; there is no video, because the features are there."
    folder = root/FOLDERS[split]
    texts = [t if coached or t not in COACHING else '' for t, n in RLE for _ in range(n)]
    times = START + np.arange(len(texts))/FPS
    places = folder/'long_range_videos', folder/'efficientnet_features/long_range_videos'
    for p in places: p.mkdir(parents=True, exist_ok=True)
    np.save(places[0]/f'{id}_timestamps.npy', np.rint(times*1e9).astype(np.int64))
    rng, n = np.random.default_rng(int(id)), steps or int(len(texts)/FPS*4)
    np.save(places[1]/f'{id}_features.npy', (rng.normal(size=(n, channels, 7, 5))*3).astype(np.float32))
    np.save(places[1]/f'{id}_timestamps.npy', times[0] + 28_800 + np.arange(1, n + 1)/4)
    first = [i for i, t in enumerate(texts) if t and (not i or texts[i - 1] != t)]
    record = {'long_range_video_file': f'./long_range_videos/{id}.mp4', 'video_timestamps': f'./long_range_videos/{id}_timestamps.npy', 'feedbacks': texts,
              'feedback_timestamps': [float(times[i]) + 28_800 for i in first], 'is_transition': [texts[i] not in COACHING for i in first]}
    path = folder/LABELS
    held = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*held, record]))
    return record


def features_of(root: Path, id: str, split: str = 'test') -> Path:
    "Where the features of a session lie."
    return root/FOLDERS[split]/'efficientnet_features/long_range_videos'/f'{id}_features.npy'


def make_checkpoint(folder: Path, seed: int = 1) -> Path:
    "Random weights that speak now and then."
    import torch
    import transformers as hf

    from vlm_repro.fitcoach.actions import add_actions
    from vlm_repro.fitcoach.cross_attention import Looking
    from vlm_repro.fitcoach.model import Eyes, save_stream_vlm, stream_vlm
    from vlm_repro.models.tiny import learn_tokenizer
    tokenizer = learn_tokenizer(['keep your back straight', 'Go lower!', 'Nice work!', '1 2 3']*20, 300, r' ?\p{L}+|\d|[^\s\p{L}\p{N}]|\s', ('<s>', '<|endoftext|>', '<|im_end|>'), {}, 4096)
    acts = add_actions(tokenizer)
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=.4)
    model = stream_vlm(config, tokenizer, Looking((0,), feature=6), Eyes(1/16, 6), seed=seed)
    with torch.no_grad():
        model.net.lm_head.weight[acts.vision] *= 3
        model.net.lm_head.weight[acts.answer] = model.net.lm_head.weight[acts.vision] + 3*model.net.lm_head.weight[acts.answer]
    return save_stream_vlm(model, folder)
