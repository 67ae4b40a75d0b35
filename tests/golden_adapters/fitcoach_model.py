"""Stream-VLM, its modules, decoding and training sequences: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from vlm_repro.fitcoach import actions, cnn, cross_attention, decode, train_sequence, windows
from vlm_repro.train.loss import supervised_loss

ACTS = actions.Actions(100, 101, 102)


# ---- modules

def filled(module: torch.nn.Module, scale: float | None) -> torch.nn.Module:
    """The parameters of the vectors: a sine by place, scaled by `scale`, or by the fan-in where there is none."""
    for j, (name, p) in enumerate(sorted(module.state_dict().items())):
        wave = np.sin(.37*np.arange(p.numel()) + 1.1*j + .5)
        if scale is None: wave *= np.sqrt(6/np.prod(p.shape[1:])) if name.endswith('weight') else .01
        p.copy_(torch.from_numpy((wave*(scale or 1)).astype(np.float32)).reshape(p.shape))
    return module.eval()


def waves(shape: Sequence[int], k: int, s: float = 1.) -> torch.Tensor:
    """The inputs of the vectors."""
    return torch.from_numpy((s*np.cos(.91*np.arange(np.prod(shape)) + .3*k)).astype(np.float32)).reshape(*shape)


def wave_of(given: Mapping[str, Any]) -> torch.Tensor:
    return waves(given['shape'], given['k'], given.get('s', 1.))


def facts(t: torch.Tensor, first: int) -> dict[str, Any]:
    """What the vectors say of a result."""
    wide = t.double()
    return {'shape': list(t.shape), 'sum': wide.sum().item(), 'abs_sum': wide.abs().sum().item(), 'min': t.min().item(), 'max': t.max().item(), 'first': t.flatten()[:first].tolist()}


def attention(given: Mapping[str, Any]) -> dict[str, Any]:
    layer = filled(cross_attention.CrossAttentionLayer(given['hidden_dim'], given['vision_feat_dim'], given['attn_dim'], given['num_heads']), given['param_scale'])
    hidden, vision, mask = wave_of(given['hidden']), wave_of(given['vision']), torch.tensor(given['mask'])
    added = layer(hidden, vision, cross_attention.steps_of(mask, vision.shape[1]))
    return {'param_order': sorted(layer.state_dict()), **facts(added[mask > 0].reshape(len(mask), -1, added.shape[-1]), 64)}


def temporal(given: Mapping[str, Any]) -> dict[str, Any]:
    conv, kept, calls = filled(cnn.TemporalConv(given['in'], given['out'], given['temporal_stride']), given['param_scale']), None, []
    for k, n in enumerate(given['frames_per_call']):
        out, kept = conv(waves([n, given['in'], *given['spatial']], k)[None], kept)
        calls.append(facts(out[0], 24))
    return {'weight_shape': list(conv.weight.shape), 'calls': calls}


def residual(given: Mapping[str, Any]) -> dict[str, Any]:
    time = 2 if given['temporal_stride'] else int(given['temporal_shift'])
    block, kept, calls = filled(cnn.InvertedResidual(cnn.Block(given['in'], given['out'], given['kernel'], given['spatial_stride'], time, given['expand_ratio'])), given['param_scale']), None, []
    for k in range(given.get('calls', 2)):
        out, kept = block(waves(given['input_per_call'], k)[None], kept)
        calls.append(facts(out[0], 24))
    return {'param_order': sorted(block.state_dict()), 'calls': calls}


def tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    maps = waves(given['input'], given['k'])
    return {**facts(cross_attention.feature_tokens(maps, blank=True), 64), 'spatial_res': [5, 7]}


def whole(given: Mapping[str, Any]) -> dict[str, Any]:
    net, state, calls = filled(cnn.FitnessCNN(), None), None, []
    for k in given['call_indices']:
        frames = (waves([4, 3, 224, 160], k) + 1)/2*torch.tensor([((4*k + t) % 5 + 1)/5 for t in range(4)])[:, None, None, None]
        maps, state = net(frames[None], state)
        held = facts(maps[0], 12)
        calls.append({**held, 'samples': [[c, y, x, maps[0, 0, c, y, x].item()] for c, y, x in ((0, 0, 0), (17, 3, 2), (640, 6, 4), (1279, 5, 1))], 'fraction_zero': (maps == 0).double().mean().item()})
    return {'num_parameters': sum(p.numel() for p in net.parameters()), 'num_state_entries': len(net.state_dict()), 'first_params_sorted': sorted(net.state_dict())[:6], 'calls': calls}


def language(given: Mapping[str, Any]) -> dict[str, Any]:
    c = given['config']
    config = hf.LlamaConfig(vocab_size=c['vocab'], hidden_size=c['hidden'], intermediate_size=c['intermediate'], num_hidden_layers=c['layers'], num_attention_heads=c['heads'], rms_norm_eps=c['rms_eps'], rope_theta=c['rope_theta'])
    looking = cross_attention.Looking(tuple(given['insert_layers']), given['vision_feat_dim'], 1, given['attn_dim'])
    net = filled(cross_attention.add_looking(hf.LlamaForCausalLM(config), looking), given['param_scale'])
    vision, labels = wave_of(given['vision']), torch.tensor([given['labels']])
    batch = {'input_ids': torch.tensor([given['ids']]), 'vision': vision, 'vision_steps': cross_attention.steps_of(torch.tensor([given['mask']]), vision.shape[1])}
    loss = supervised_loss(net, {**batch, 'labels': labels}, int((labels[:, 1:] != -100).sum()))
    logits, shorter = net(**batch).logits, {k: t[:, :-1] if k != 'vision' else t for k, t in batch.items()}
    last = {k: t[:, -1:] if k != 'vision' else t for k, t in batch.items()}
    cached = net(**last, past_key_values=net(**shorter, use_cache=True).past_key_values, use_cache=True).logits[0, -1]
    return {'param_order': sorted(net.state_dict()), 'loss': loss.item(), 'logits_last': logits[0, -1].tolist(), 'max_diff_cached_vs_full_last_logits': (cached - logits[0, -1]).abs().max().item(),
            **{f'logits_{k}': v for k, v in facts(logits, 0).items() if k != 'first'}}


@torch.no_grad()
def module_numerics(given: Any, data: Path) -> dict[str, Any]:
    if 'frames_per_call' in given: return temporal(given)
    if 'config' in given: return language(given)
    if 'call_indices' in given: return whole(given)
    if 'expand_ratio' in given: return residual(given)
    return attention(given) if 'hidden_dim' in given else tokens(given)


# ---- decoding

def streaming_loop(given: Any, data: Path) -> dict[str, Any]:
    choices = iter(given['argmax_script'])
    rules = actions.Rules(ACTS, given['max_feedback_length']).published()
    held = decode.plain_loop(lambda new, steps: next(choices, ACTS.vision), decode.stream_prompt(given['prompt_ids'], ACTS), given['num_features'], rules)
    return {'output_ids': list(held.tokens), 'num_lm_calls': held.calls, 'num_visible_features_per_call': list(held.visible)}


VOCAB = {10: 'nice', 11: 'knees', 12: 'higher', 13: 'squat', 14: 'keep', 15: 'going', 16: 'lower', 17: 'left', 18: 'arm', 19: 'five', 20: 'ten', 21: 'stop', 22: 'great', 23: 'faster', 24: 'slow', 25: 'core', 26: 'tight',
         100: '<vision>', 101: '<answer>', 102: '<answer/>', 1: '<s>', 2: '</s>', 3: ''}


def feedback_extraction(given: Any, data: Path) -> dict[str, Any]:
    texts, times = actions.published_feedbacks(given['tokens'], ACTS, lambda ids: ' '.join(VOCAB[i] for i in ids), given['feats_frequency'])
    return {'responses': texts, 'timestamps': times}


# ---- training

WORDS = {**{text: i for i, text in VOCAB.items() if text}, 'you': 27, 'coach': 28, 'user': 29}


def encode(text: str) -> list[int]:
    return [WORDS.get(word, 3) for word in text.split()]


def row(held: train_sequence.Published, kept: Sequence[int]) -> dict[str, Any]:
    return {'video_feature_index': list(kept), 'input_ids': list(held.ids), 'vision_mask': ''.join(map(str, held.mask)), 'loss_mask': ''.join(map(str, held.supervised))}


def train_sequence_(given: Any, data: Path) -> dict[str, Any]:
    held = train_sequence.published_sequence([1, *encode(given['prompt'])], given['responses'], given['response_timestamps'], given['video_timestamps'], encode, ACTS, given['max_sequence_length'])
    return {'input_ids': list(held.ids), 'attention_mask_len': len(held.ids), 'attention_all_ones': True, 'vision_mask_positions': [i for i, m in enumerate(held.mask) if m],
            'vision_mask_values': sorted(set(held.mask)), 'loss_mask': ''.join(map(str, held.supervised))}


def train_items(given: Any, data: Path) -> dict[str, Any]:
    clock, system = np.array(given['feature_timestamps']), [1, *encode(given['system'])]
    def part(clip: Mapping[str, Any]) -> tuple[list[int], np.ndarray]:
        kept = windows.kept_features(clock, clip.get('exercise_start_timestamp', clock[0]), clip.get('exercise_end_timestamp', clock[-1]))
        return kept.tolist(), clock[kept]
    if 'segments' not in given:
        kept, times = part(given)
        return row(train_sequence.published_sequence(system, given['responses'], given['response_timestamps'], times, encode, ACTS), kept)
    parts = [part(s) for s in given['segments']]
    held = train_sequence.published_windows_sequence(system, [(s['responses'], s['response_timestamps'], times) for s, (_, times) in zip(given['segments'], parts)], encode, ACTS)
    return {'windows': [row(one, kept) for one, (kept, _) in zip(held, parts)]}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'module_numerics': module_numerics, 'streaming_loop': streaming_loop, 'feedback_extraction': feedback_extraction, 'train_sequence': train_sequence_, 'train_items': train_items}
