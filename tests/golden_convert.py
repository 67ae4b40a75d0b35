"""Run the golden cases of the InternVL conversion: `python tests/golden_convert.py DIR`.

Every folder `case_*` below DIR holds a tiny model in the original format (`config.json`, `model.safetensors`) and what the original code computed with it in float32
(`io.safetensors`). Each is converted, loaded, and compared: values of the configuration, the vision tower, the visual tokens and the logits within 1e-4, the greedy ids
exactly. A line a case is printed with its largest error; the reasons of failures go to stderr.
"""
import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from transformers.utils import logging as hf_logging

from vlm_repro.models.convert import convert

TOLERANCE = 1e-4


@dataclass
class Checked:
    "What was compared in one case so far."
    largest: float = 0.0
    reasons: list[str] = field(default_factory=list)

    def close(self, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        "Compare floats within the tolerance."
        if got.shape != expected.shape: return self.reasons.append(f'{what}: shape {list(got.shape)}, expected {list(expected.shape)}')
        error = (got.float() - expected.float()).abs().max().item()
        self.largest = max(self.largest, error)
        if not error <= TOLERANCE: self.reasons.append(f'{what}: off by {error:.2e}')

    def equal(self, what: str, got: Any, expected: Any) -> None:
        "Compare exactly."
        if got != expected: self.reasons.append(f'{what}: {got!r}, expected {expected!r}')


def expected_text(llm: Mapping[str, Any], rows: int) -> dict[str, Any]:
    "What the native text configuration has to say, read off the original one; written apart from the package."
    internlm2 = llm['model_type'] == 'internlm2'
    same = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'intermediate_size', 'max_position_embeddings', 'rms_norm_eps', 'hidden_act')
    out = {k: llm[k] for k in same if k in llm} | {'vocab_size': rows, 'model_type': 'llama' if internlm2 else llm['model_type']}
    return out | ({'attention_bias': llm.get('bias', False), 'mlp_bias': False} if internlm2 else {})


def expected_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    "The same for the vision tower."
    same = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'norm_type', 'layer_norm_eps', 'hidden_act', 'num_channels')
    renamed = {'attention_bias': 'qkv_bias', 'use_qk_norm': 'qk_normalization'}
    square = {k: (vision[k], vision[k]) for k in ('image_size', 'patch_size')}
    return {k: vision[k] for k in same if k in vision} | {n: vision[o] for n, o in renamed.items() if o in vision} | square | {'use_mean_pooling': True}


def check_config(seen: Checked, original: Mapping[str, Any], config: hf.InternVLConfig, stored: Mapping[str, torch.Tensor], token: int) -> None:
    "Compare the values of the configuration that was written."
    llm, vision = original['llm_config'], original['vision_config']
    rows = next(t for k, t in stored.items() if k.endswith(('tok_embeddings.weight', 'embed_tokens.weight'))).shape[0]
    head = any(k in stored for k in ('language_model.output.weight', 'language_model.lm_head.weight'))
    tile = original.get('force_image_size') or vision['image_size']
    ratio = original['downsample_ratio']
    top = {'model_type': 'internvl', 'image_token_id': token, 'downsample_ratio': ratio, 'vision_feature_layer': original.get('select_layer', -1), 'projector_hidden_act': 'gelu',
           'vision_feature_select_strategy': 'default', 'tie_word_embeddings': bool(llm.get('tie_word_embeddings', not head)),
           'image_seq_length': round((tile//vision['patch_size']*ratio)**2)}
    for section, wanted in ((config, top), (config.text_config, expected_text(llm, rows)), (config.vision_config, expected_vision(vision))):
        for k, v in wanted.items():
            got = getattr(section, k)
            seen.equal(f'{section.model_type}.{k}', tuple(got) if isinstance(v, tuple) else got, v)
    rope, scaling = config.text_config.rope_parameters, llm.get('rope_scaling') or {}
    seen.equal('rope_theta', float(rope['rope_theta']), float(llm.get('rope_theta', 10000)))
    seen.equal('rope_type', rope['rope_type'], scaling.get('rope_type') or scaling.get('type') or 'default')
    if 'factor' in scaling: seen.equal('rope factor', rope.get('factor'), scaling['factor'])


def load(folder: Path, seen: Checked, attention: str) -> hf.InternVLForConditionalGeneration:
    "A fresh model, in float32: rotary state is kept from one input to the next."
    model, info = hf.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True)
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'): seen.equal(kind, sorted(map(str, info[kind])), [])
    return model.eval()


def check_inputs(seen: Checked, folder: Path, io: Mapping[str, torch.Tensor], name: str, attention: str) -> None:
    "Compare one group of inputs: hidden states, visual tokens, logits, greedy ids."
    def given(part: str) -> torch.Tensor | None: return io.get(f'{name}.{part}')
    pixels = given('pixel_values')
    tokens = {'input_ids': given('input_ids'), 'attention_mask': given('attention_mask'), 'pixel_values': (io['two.pixel_values'] if pixels is None else pixels).float()}
    with torch.no_grad():
        model = load(folder, seen, attention)
        if (want := given('vit_last_hidden_state')) is not None: seen.close(f'{name} vision tower', model.model.vision_tower(tokens['pixel_values']).last_hidden_state, want)
        if (want := given('visual_tokens')) is not None: seen.close(f'{name} visual tokens', model.get_image_features(tokens['pixel_values']).pooler_output, want)
        logits = load(folder, seen, attention)(**tokens).logits
        if (want := given('logits')) is not None: seen.close(f'{name} logits', logits, want)
        if (want := given('logits_last')) is not None: seen.close(f'{name} last logits', logits[:, -1], want)
        if (want := given('generated_ids')) is not None:
            new = load(folder, seen, attention).generate(**tokens, generation_config=hf.GenerationConfig(do_sample=False, max_new_tokens=want.shape[1], pad_token_id=0))
            seen.equal(f'{name} greedy ids', new[:, tokens['input_ids'].shape[1]:].tolist(), want.tolist())


def check_case(case: Path, attention: str) -> Checked:
    "Convert one case and compare everything; a crash is a reason too."
    seen = Checked()
    try:
        io, original = load_file(case/'io.safetensors'), json.loads((case/'config.json').read_text('utf-8'))
        token = int(io['img_context_token_id'].item())
        with tempfile.TemporaryDirectory() as folder:
            convert(case, folder, image_token_id=token)
            config = hf.AutoConfig.from_pretrained(folder)
            check_config(seen, original, config, load_file(case/'model.safetensors'), token)
            names = list(dict.fromkeys(k.split('.')[0] for k in io if k.endswith('.input_ids')))
            seen.equal('some input', bool(names), True)
            for name in names: check_inputs(seen, Path(folder), io, name, attention)
    except Exception as e:  # noqa: BLE001 - whatever a broken conversion raises is a failed case
        seen.reasons.append(f'{type(e).__name__}: {e}')
        traceback.print_exc(file=sys.stderr)
    return seen


def cases(folder: Path) -> Iterator[Path]:
    "The case folders at or below a folder."
    yield from sorted(p for p in [folder, *folder.rglob('case_*')] if p.is_dir() and p.name.startswith('case_'))


def main(argv: list[str] | None = None) -> int:
    "Run, print, and return the exit status: 0 only when at least one case ran and all passed."
    parser = argparse.ArgumentParser(description='Convert the golden InternVL cases and compare them with what the original code computed.')
    parser.add_argument('folder', type=Path, help='folder with case_* folders at any depth')
    parser.add_argument('--attention', default='sdpa', choices=['sdpa', 'eager'], help='attention of the native class')
    options = parser.parse_args(argv)
    passed = failed = 0
    for case in cases(options.folder):
        seen = check_case(case, options.attention)
        print(f'{case.name}: {"failed" if seen.reasons else "passed"}, largest error {seen.largest:.2e}', flush=True)
        for reason in seen.reasons[:5]: print(f'  {case.name} {reason}', file=sys.stderr, flush=True)
        passed, failed = passed + (not seen.reasons), failed + bool(seen.reasons)
    if not passed + failed: print(f'no case_* folders below {options.folder}', file=sys.stderr)
    print(f'{passed} passed, {failed} failed')
    return 0 if passed and not failed else 1


if __name__ == '__main__':
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    sys.exit(main())
