"""Original InternVL checkpoints as transformers' own classes: golden cases, wrong cuts, resuming, refusals, the text side."""
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_convert
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from vlm_repro.core.records import Request
from vlm_repro.models import convert_keys, convert_shards
from vlm_repro.models.convert import convert
from vlm_repro.models.convert_config import NotConvertible, is_original, native_config
from vlm_repro.models.convert_keys import internlm2_lora, split_wqkv
from vlm_repro.models.convert_shards import INDEX, is_whole, plan_conversion, write_weights
from vlm_repro.models.convert_text import load_tokenizer, read_sentencepiece, sentencepiece_tokenizer
from vlm_repro.models.originals import ADDED, original_config, original_shapes, random_original
from vlm_repro.models.protocol import ModelError, load_model
from vlm_repro.train.parts import linears, lora_size, lora_targets, meta_model

torch.set_num_threads(1)
hf_logging.disable_progress_bar()
GOLDEN = Path(__file__).parent/'golden'/'internvl_convert'
CASES = sorted(p.name for p in GOLDEN.glob('case_*'))
SPIECES = json.loads((GOLDEN/'sentencepiece'/'ids.json').read_text('utf-8'))['models']


# --- what the original code computed

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_golden_case(case: str, attention: str) -> None:
    "Configuration, vision tower, visual tokens, logits, greedy ids."
    seen = golden_convert.check_case(GOLDEN/case, attention)
    assert seen.reasons == [] and 0 < seen.largest < 2e-5


def test_runner_prints_a_line_a_case_and_fails_for_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "One good case, one without weights; an empty folder fails too."
    shutil.copytree(GOLDEN/CASES[0], tmp_path/'deep'/'case_good')
    shutil.copytree(GOLDEN/CASES[1], tmp_path/'deep'/'case_torn')
    (tmp_path/'deep'/'case_torn'/'model.safetensors').unlink()
    assert golden_convert.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith('case_good: passed, largest error') and printed[1].startswith('case_torn: failed') and printed[-1] == '1 passed, 1 failed'
    (tmp_path/'empty').mkdir()
    assert golden_convert.main([str(tmp_path/'empty')]) == 1
    assert golden_convert.main([str(tmp_path/'deep'/'case_good')]) == 0


def plain_cut(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    "Queries, keys, values one after the other: the right shapes, the wrong rows."
    d = fused.shape[0]//(heads + 2*kv_heads)
    return fused.split([heads*d, kv_heads*d, kv_heads*d])


def per_head(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    "InternViT's fused rows taken as if they lay head by head."
    return tuple(fused.reshape(-1, 3, *fused.shape[1:])[:, i].contiguous() for i in range(3))


MISTAKES = {'a plain cut of wqkv': ('case_A_open', 'split_wqkv', plain_cut), 'qkv cut by head': ('case_B_open', 'split_qkv', per_head)}


@pytest.mark.parametrize('name', MISTAKES)
def test_wrong_cuts_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "The check is worth something: the logits move by far more than the tolerance."
    case, function, wrong = MISTAKES[name]
    monkeypatch.setattr(convert_keys, function, wrong)
    seen = golden_convert.check_case(GOLDEN/case, 'sdpa')
    assert any('off by' in r for r in seen.reasons) and seen.largest > 0.05


SWAPS = {'gate and up': ('case_A_open', 'mlp.up_proj', 'mlp.gate_proj'), 'layer scales': ('case_B_open', 'lambda_1', 'lambda_2'), 'the two norms': ('case_C_open', 'layernorm_before', 'layernorm_after')}


@pytest.mark.parametrize('name', SWAPS)
def test_swapped_names_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Weights of one shape in each other's place."
    case, a, b = SWAPS[name]
    right = convert_keys.native_names

    def swapped(key: str, kind: str) -> tuple[str, ...]:
        return tuple(n.replace(a, '\0').replace(b, a).replace('\0', b) for n in right(key, kind))
    monkeypatch.setattr(convert_keys, 'native_names', swapped)
    assert any('off by' in r for r in golden_convert.check_case(GOLDEN/case, 'sdpa').reasons)


WRONG_FIELDS: dict[str, Callable[[hf.InternVLConfig], None]] = {
    'norm epsilon': lambda c: setattr(c.vision_config, 'layer_norm_eps', 1e-5), 'text norm epsilon': lambda c: setattr(c.text_config, 'rms_norm_eps', 1e-4),
    'rotary base': lambda c: c.text_config.rope_parameters.update(rope_theta=10000.0), 'tie': lambda c: setattr(c, 'tie_word_embeddings', True),
    'layer of the features': lambda c: setattr(c, 'vision_feature_layer', -2)}


@pytest.mark.parametrize('name', WRONG_FIELDS)
def test_wrong_fields_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Values that move the logits by less than the tolerance too."
    def wrong(*args: Any) -> hf.InternVLConfig:
        config = native_config(*args)
        WRONG_FIELDS[name](config)
        return config
    monkeypatch.setattr(convert_shards, 'native_config', wrong)
    assert golden_convert.check_case(GOLDEN/CASES[0], 'sdpa').reasons


# --- other sizes

SIZES = {
    'one head a group': ('internlm2', {'text': {'num_key_value_heads': 6}}), 'one key head': ('internlm2', {'text': {'num_key_value_heads': 1}}), 'biased wqkv': ('internlm2', {'text': {'bias': True}}),
    'deep': ('qwen2', {'text': {'num_hidden_layers': 5}, 'vision': {'num_hidden_layers': 1}}), 'tied head': ('qwen2', {'text': {'tie_word_embeddings': True}}),
    'tied InternLM2': ('internlm2', {'text': {'tie_word_embeddings': True}}), 'llama': ('llama', {}), 'six billion vision': ('internlm2', {'vision': {'norm_type': 'rms_norm', 'qkv_bias': False, 'qk_normalization': True}}),
    'larger tiles': ('qwen2', {'force_image_size': 56}), 'other layer': ('qwen2', {'select_layer': -2}), 'linear rope': ('internlm2', {'text': {'rope_scaling': {'type': 'linear', 'factor': 4.0}}}),
    'no rope scaling': ('internlm2', {'text': {'rope_scaling': None, 'rope_theta': 10000}})}


@pytest.mark.parametrize('name', SIZES)
def test_other_sizes_convert_and_every_weight_arrives(name: str, tmp_path: Path) -> None:
    "Nothing missing or left over; fusing the written projections again gives the file's."
    kind, changes = SIZES[name]
    source = random_original(kind, tmp_path/'original', **changes)
    done = convert(source, tmp_path/'native')
    model, info = hf.InternVLForConditionalGeneration.from_pretrained(tmp_path/'native', output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert done.tied == model.config.tie_word_embeddings == ('tied' in name)
    stored, state = load_file(source/'model.safetensors'), model.state_dict()
    assert sum(t.numel() for t in stored.values()) == model.num_parameters()
    for i in range(model.config.vision_config.num_hidden_layers):
        view = f'model.vision_tower.encoder.layer.{i}.attention.'
        assert torch.equal(stored[f'vision_model.encoder.layers.{i}.attn.qkv.weight'], torch.cat([state[f'{view}{p}_proj.weight'] for p in 'qkv']))
    if kind == 'internlm2': assert_regrouped(stored, state, model.config.text_config)
    side = original_side(source)
    pixels, tokens = torch.randn(1, 3, side, side), (side//28)**2
    out = model(input_ids=torch.tensor([[5, *[model.config.image_token_id]*tokens, 7]]), pixel_values=pixels)
    assert out.logits.shape[-1] == model.config.text_config.vocab_size and out.logits.isfinite().all()
    assert model.config.image_seq_length == tokens


def original_side(folder: Path) -> int:
    "Pixels of a tile."
    return json.loads((folder/'config.json').read_text())['force_image_size']


def assert_regrouped(stored: dict[str, torch.Tensor], state: dict[str, torch.Tensor], text: hf.PretrainedConfig) -> None:
    "Row by row: group k of the file is the key head k and the query heads it serves."
    d, groups = text.hidden_size//text.num_attention_heads, text.num_key_value_heads
    per = text.num_attention_heads//groups
    for part in ('weight', *(['bias'] if text.attention_bias else [])):
        fused = stored[f'language_model.model.layers.1.attention.wqkv.{part}']
        q, k, v = (state[f'model.language_model.layers.1.self_attn.{p}_proj.{part}'] for p in 'qkv')
        rows = [t for g in range(groups) for t in (q[g*per*d:(g + 1)*per*d], k[g*d:(g + 1)*d], v[g*d:(g + 1)*d])]
        assert torch.equal(fused, torch.cat(rows))


def test_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    "Equal to the table: tied. Different: an error, for one of them would be lost."
    source = random_original('qwen2', tmp_path/'original', text={'tie_word_embeddings': True})
    weights = load_file(source/'model.safetensors')
    table = weights['language_model.model.embed_tokens.weight']
    save_file({**weights, 'language_model.lm_head.weight': table.clone()}, source/'model.safetensors')
    assert convert(source, tmp_path/'equal').tied
    save_file({**weights, 'language_model.lm_head.weight': table + 1}, source/'model.safetensors')
    with pytest.raises(NotConvertible, match='differs from'): convert(source, tmp_path/'other')


def test_the_vocabulary_is_the_tables(tmp_path: Path) -> None:
    "A configuration may be behind its weights."
    source = random_original('qwen2', tmp_path/'original')
    config = json.loads((source/'config.json').read_text())
    rows = config['llm_config']['vocab_size']
    config['llm_config']['vocab_size'] = rows - 7
    (source/'config.json').write_text(json.dumps(config))
    convert(source, tmp_path/'native')
    assert hf.AutoConfig.from_pretrained(tmp_path/'native').text_config.vocab_size == rows


# --- left over, missing, torn

def altered(source: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    "The source with other weights."
    save_file(change(load_file(source/'model.safetensors')), source/'model.safetensors')
    return source


@pytest.mark.parametrize(('change', 'said'), [
    (lambda w: {**w, 'language_model.model.extra.weight': torch.ones(2)}, 'no place'), (lambda w: {**w, 'vision_model.encoder.layers.7.ls1': torch.ones(32)}, 'not part of the model'),
    (lambda w: {k: t for k, t in w.items() if k != 'mlp1.3.bias'}, 'linear_2.bias'), (lambda w: {k: t for k, t in w.items() if k != 'language_model.output.weight'}, 'lm_head.weight'),
    (lambda w: {**w, 'mlp1.3.bias': torch.ones(47)}, 'another shape'), (lambda w: {**w, 'language_model.model.layers.0.attention.wqkv.weight': torch.ones(79, 48)}, 'groups of')])
def test_weights_that_do_not_fit_are_an_error_and_nothing_is_written(change: Callable, said: str, tmp_path: Path) -> None:
    "Left over, missing, of another shape."
    source = altered(random_original('internlm2', tmp_path/'original'), change)
    with pytest.raises(NotConvertible, match=said): convert(source, tmp_path/'native')
    assert not (tmp_path/'native').exists()


def test_an_incomplete_download_is_an_error(tmp_path: Path) -> None:
    "A lost file, a torn one, an index that promises more."
    source = random_original('internlm2', tmp_path/'original', files=3)
    second = source/'model-00002-of-00003.safetensors'
    whole = second.read_bytes()
    os.truncate(second, 3000)
    with pytest.raises(NotConvertible, match='00002.*not whole'): convert(source, tmp_path/'native')
    second.unlink()
    with pytest.raises(NotConvertible, match='lacks 1 of 3'): convert(source, tmp_path/'native')
    second.write_bytes(whole)
    index = json.loads((source/INDEX).read_text())
    (source/INDEX).write_text(json.dumps({'weight_map': {**index['weight_map'], 'mlp1.9.weight': second.name}}))
    with pytest.raises(NotConvertible, match='no file holds'): convert(source, tmp_path/'native')
    assert not (tmp_path/'native').exists()


# --- stopped and continued

def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    "The process dies in the middle of the third shard, with half of it on the disk; what was done is not done again."
    source, out = random_original('internlm2', tmp_path/'original', files=2), tmp_path/'native'
    pid = os.fork()
    if not pid:
        def die(tensors: Any, path: Path, metadata: Any) -> None:
            if path.name.startswith('.model-00003'):
                path.write_bytes(b'half')
                os._exit(9)
            save_file(tensors, path, metadata)
        convert_shards.save_file = die
        convert(source, out, max_shard=40_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    first = {p.name: p.stat().st_mtime_ns for p in out.glob('model-*.safetensors')}
    assert len(first) == 2 and (out/'.model-00003-of-00010.safetensors.part').exists() and not (out/'config.json').exists()
    with pytest.raises(ModelError, match='no config.json'): load_model(str(out))
    seen = []
    done = convert(source, out, max_shard=40_000, progress=lambda i, n, name: seen.append((i, n)))
    assert (done.shards, done.written) == (10, 8) and seen == [(i, 10) for i in range(3, 11)]
    assert {p.name: p.stat().st_mtime_ns for p in out.glob('model-*.safetensors')}.items() >= first.items()
    assert not list(out.glob('.*.part'))
    convert(source, tmp_path/'at once', max_shard=40_000)
    for p in (tmp_path/'at once').glob('*.safetensors'): assert p.read_bytes() == (out/p.name).read_bytes()


def test_a_torn_shard_is_written_again_and_the_rest_left(tmp_path: Path) -> None:
    "Whatever tore it; while it is missing the folder is no checkpoint."
    source, out = random_original('qwen2', tmp_path/'original'), tmp_path/'native'
    names = [s.name for s in plan_conversion(source, 263, 40_000).shards]
    convert(source, out, max_shard=40_000)
    whole = (out/names[1]).read_bytes()
    os.truncate(out/names[1], len(whole) - 1)
    assert convert(source, out, max_shard=40_000).written == 1
    assert (out/names[1]).read_bytes() == whole
    assert convert(source, out, max_shard=40_000).written == 0


def test_a_full_disk_leaves_no_half_and_is_refused_beforehand_where_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The error says what to do; a shard that cannot fit is said before the first."
    source, out = random_original('qwen2', tmp_path/'original'), tmp_path/'native'

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(convert_shards, 'save_file', full)
        with pytest.raises(NotConvertible, match='No space left.*make room'): convert(source, out)
    assert not list(out.glob('*safetensors*')) and not list(out.glob('.*.part')) and not (out/'config.json').exists()
    with monkeypatch.context() as m:
        m.setattr(convert_shards.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**6, 10**6, 10))
        with pytest.raises(NotConvertible, match='10 are free'): convert(source, out)
    assert convert(source, out).written == 1


def test_memory_is_that_of_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "No write holds more than the bound, unless one weight is larger; all of them together hold everything."
    source, sizes = random_original('internlm2', tmp_path/'original'), []

    def weigh(tensors: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        sizes.append((sum(t.nbytes for t in tensors.values()), len(tensors)))
        save_file(tensors, path, metadata)
    monkeypatch.setattr(convert_shards, 'save_file', weigh)
    done = convert(source, tmp_path/'native', max_shard=20_000)
    assert all(size <= 20_000 or n == 1 for size, n in sizes) and sum(s for s, _ in sizes) == done.bytes


def test_other_destinations_are_refused(tmp_path: Path) -> None:
    "The source itself, a folder with other things, the conversion of a source that has changed since."
    source = random_original('internlm2', tmp_path/'original')
    with pytest.raises(NotConvertible, match='one folder'): convert(source, source)
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'notes.txt').write_text('mine')
    with pytest.raises(NotConvertible, match='not empty'): convert(source, tmp_path/'full')
    assert [p.name for p in (tmp_path/'full').iterdir()] == ['notes.txt']
    convert(source, tmp_path/'native')
    random_original('internlm2', source, seed=1)
    with pytest.raises(NotConvertible, match='before it changed'): convert(source, tmp_path/'native')


def test_is_whole_knows_names_shapes_and_length(tmp_path: Path) -> None:
    "A shard of another plan is not taken for this one's."
    save_file({'a': torch.ones(2, 3)}, tmp_path/'s.safetensors')
    assert is_whole(tmp_path/'s.safetensors', {'a': (2, 3)})
    assert not is_whole(tmp_path/'s.safetensors', {'a': (3, 2)}) and not is_whole(tmp_path/'s.safetensors', {'a': (2, 3), 'b': (1,)})
    os.truncate(tmp_path/'s.safetensors', 20)
    assert not is_whole(tmp_path/'s.safetensors', {'a': (2, 3)}) and not is_whole(tmp_path/'none', {})


# --- refusals

@pytest.mark.parametrize(('change', 'said'), [
    ({'ps_version': 'v1'}, 'first-generation'), ({'use_llm_lora': 16}, 'not merged'), ({'use_backbone_lora': 8}, 'not merged'), ({'model_type': 'llava'}, 'model_type'),
    ({'text': {'architectures': ['Phi3ForCausalLM']}}, 'Phi3ForCausalLM'), ({'text': {'architectures': ['InternLM3ForCausalLM']}}, 'InternLM3'), ({'vision': {'use_moe': True}}, 'experts'),
    ({'vision': {'qk_normalization': True, 'layer_norm_eps': 1e-5}}, 'fixed at 1e-6'), ({'vision': {'num_attention_heads': None}}, 'num_attention_heads'), ({'pad2square': True}, 'square'),
    ({'use_thumbnail': False}, 'thumbnail'), ({'template': 'Hermes-2'}, 'Hermes-2'), ({'force_image_size': 42}, 'downsampled')])
def test_what_has_no_equal_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    "With a reason, and nothing written."
    source = random_original('internlm2', tmp_path/'original')
    config = original_config('internlm2', 281, **change)
    (source/'config.json').write_text(json.dumps(config))
    with pytest.raises(NotConvertible, match=said): convert(source, tmp_path/'native')
    assert not (tmp_path/'native').exists()


def test_loading_an_original_names_the_converter(tmp_path: Path) -> None:
    "Instead of a native class with default sizes."
    source = random_original('internlm2', tmp_path/'original')
    assert is_original(source) and not is_original(tmp_path)
    with pytest.raises(ModelError, match='vlm-repro convert'): load_model(str(source))


# --- the text side

@pytest.mark.parametrize('name', SPIECES)
def test_ids_of_sentencepiece(name: str) -> None:
    "Ids and decoded texts that sentencepiece gave for models it trained, byte fallback and user symbols included."
    tokenizer = sentencepiece_tokenizer(read_sentencepiece(GOLDEN/'sentencepiece'/f'{name}.model'), {})
    for row in SPIECES[name]:
        assert tokenizer.encode(row['text']).ids == row['ids'], row['text']
        assert tokenizer.decode(row['ids'], skip_special_tokens=False) == row['decoded']


def test_a_torn_sentencepiece_model_is_an_error(tmp_path: Path) -> None:
    "So is a file that is something else."
    data = (GOLDEN/'sentencepiece'/'plain.model').read_bytes()
    for bad in (data[:-3], b'', b'{"json": true}'):
        (tmp_path/'tokenizer.model').write_bytes(bad)
        with pytest.raises(NotConvertible, match='fetch it again'): read_sentencepiece(tmp_path/'tokenizer.model')


@pytest.mark.parametrize('kind', ['internlm2', 'qwen2'])
def test_the_saved_processor_gives_the_originals_ids_and_prompt(kind: str, tmp_path: Path) -> None:
    "After loading from the files: special tokens, beginning of text, joins, system message, tiles."
    source = random_original(kind, tmp_path/'original')
    done = convert(source, tmp_path/'native')
    processor, first = hf.AutoProcessor.from_pretrained(tmp_path/'native'), load_tokenizer(source)
    tokenizer = processor.tokenizer
    assert [tokenizer.convert_tokens_to_ids(t) for t in ADDED] == [first.convert_tokens_to_ids(t) for t in ADDED]
    for text in ('the inn', 'a<img>b', 'é\n', '<|im_start|>user'): assert tokenizer(text).input_ids == first(text).input_ids
    assert (tokenizer('a').input_ids[0] == tokenizer.bos_token_id) == (kind == 'internlm2') and tokenizer.padding_side == 'left'
    turns = [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': 'two'}, {'role': 'user', 'content': [{'type': 'text', 'text': 'A: '}, {'type': 'image'}, {'type': 'text', 'text': 'three'}]}]
    end = {'internlm2': '<|im_end|>', 'qwen2': '<|im_end|>\n'}[kind]
    start, system = {'internlm2': ('<s>', 'You describe pictures.'), 'qwen2': ('', 'You look closely.')}[kind]
    body = f'<|im_start|>user\none{end}<|im_start|>assistant\ntwo{end}<|im_start|>user\nA: <IMG_CONTEXT>\nthree{end}<|im_start|>assistant\n'
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == f'{start}<|im_start|>system\n{system}{end}{body}'
    own = processor.apply_chat_template([{'role': 'system', 'content': 'Mine.'}, *turns], add_generation_prompt=True)
    assert own == f'{start}<|im_start|>system\nMine.{end}{body}'
    encoded = processor(text='<IMG_CONTEXT>', images=[Image.new('RGB', (56, 28))], return_tensors='pt')
    ids = encoded['input_ids'][0].tolist()
    assert sum(i == processor.image_token_id for i in ids) == 3 == encoded['pixel_values'].shape[0] and ids[-1] == tokenizer.convert_tokens_to_ids('</img>')
    generation = hf.GenerationConfig.from_pretrained(tmp_path/'native')
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids('<|im_end|>') == done.ids['<|im_end|>'] and not generation.do_sample


def test_the_system_message_is_kept_replaced_or_emptied(tmp_path: Path) -> None:
    "Without the original's file it has to be said; an emptied one leaves its header."
    source = random_original('internlm2', tmp_path/'original')
    (source/'conversation.py').unlink()
    with pytest.raises(NotConvertible, match='conversation.py'): convert(source, tmp_path/'none')
    for system in ('', 'Sei "kurz" {{ und }} klar.'):
        convert(source, tmp_path/(system[:3] or 'empty'), system=system)
        processor = hf.AutoProcessor.from_pretrained(tmp_path/(system[:3] or 'empty'))
        assert processor.apply_chat_template([{'role': 'user', 'content': 'x'}]) == f'<s><|im_start|>system\n{system}<|im_end|><|im_start|>user\nx<|im_end|>'
    assert convert(source, tmp_path/'own', template='{{ messages[0].content }}').shards == 1
    assert hf.AutoProcessor.from_pretrained(tmp_path/'own').apply_chat_template([{'role': 'user', 'content': 'x'}]) == 'x'


def test_ids_that_do_not_come_out_are_an_error(tmp_path: Path) -> None:
    "A tokenizer of another size than its added tokens, one without image tokens, an id the caller says otherwise."
    source = random_original('qwen2', tmp_path/'original')
    with pytest.raises(NotConvertible, match='image_token_id is 3'): convert(source, tmp_path/'native', image_token_id=3)
    added = json.loads((source/'added_tokens.json').read_text())
    (source/'added_tokens.json').write_text(json.dumps({t: i + 1 for t, i in added.items()}))
    with pytest.raises(NotConvertible, match='another checkpoint'): convert(source, tmp_path/'native')
    (source/'added_tokens.json').write_text(json.dumps({t: i for t, i in added.items() if '<|' in t}))
    with pytest.raises(NotConvertible, match='<img>'): convert(source, tmp_path/'native')
    for name in ('vocab.json', 'merges.txt', 'added_tokens.json'): (source/name).unlink()
    with pytest.raises(NotConvertible, match='image_token_id'): convert(source, tmp_path/'native')
    assert convert(source, tmp_path/'native', image_token_id=5).ids == {'<IMG_CONTEXT>': 5}


@pytest.mark.parametrize('kind', ['internlm2', 'qwen2', 'llama'])
def test_a_converted_checkpoint_answers(kind: str, tmp_path: Path) -> None:
    "Through the same backend as any other."
    convert(random_original(kind, tmp_path/'original'), tmp_path/'native')
    Image.new('RGB', (90, 30), 'red').save(tmp_path/'x.png')
    request = Request('a', [{'role': 'user', 'content': [{'type': 'image', 'image': str(tmp_path/'x.png')}, {'type': 'text', 'text': 'the?'}]}], 'ours')
    model = load_model(str(tmp_path/'native'))
    answer, = model.generate([request], 3)
    assert answer.error is None and answer.n_visual == 4 and model.measure(request).n_visual == 4


# --- LoRA before and after

def test_lora_on_split_projections_is_not_lora_on_the_fused_one() -> None:
    "InternVL2-8B at rank 16: counted from the names of either side."
    text = {'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'intermediate_size': 14336}
    vision = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096, 'image_size': 448}
    original = original_config('internlm2', 92553, text=text, vision=vision, force_image_size=448)
    sizes = internlm2_lora(original['llm_config'], 16)
    fused = [s for k, s in original_shapes(original).items() if '.layers.' in k and k.startswith('language_model') and len(s) == 2]
    native = meta_model(native_config(original, 92546))
    assert sizes.fused == lora_size(fused, 16) == 37_748_736
    assert sizes.split == lora_size((linears(native)[t] for t in lora_targets(native)), 16) == 41_943_040


def test_split_wqkv_refuses_rows_that_are_no_heads() -> None:
    "Heads that do not divide, rows that are too many."
    with pytest.raises(NotConvertible): split_wqkv(torch.ones(33, 4), 4, 2)
    with pytest.raises(NotConvertible): split_wqkv(torch.ones(40, 4), 5, 2)


def test_shards_are_found_by_name_alone(tmp_path: Path) -> None:
    "The index of the result names every weight once, in files that hold them."
    source = random_original('qwen2', tmp_path/'original', files=2)
    plan = plan_conversion(source, 263, max_shard=30_000)
    write_weights(plan, tmp_path/'native')
    index = json.loads((tmp_path/'native'/INDEX).read_text())['weight_map']
    held = {k: f.name for f in (tmp_path/'native').glob('*.safetensors') for k in load_file(f)}
    assert index == held
