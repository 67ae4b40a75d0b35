"""Adapters saved, merged and compared, in Python and from the command line."""
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers.utils import logging as hf_logging

from vlm_repro.cli import main
from vlm_repro.models.convert import convert
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.inputs import load_preparer, tokenizer_of
from vlm_repro.models.originals import random_original
from vlm_repro.models.protocol import ModelError, load_model
from vlm_repro.models.transformers import load_net
from vlm_repro.train import export, kinds
from vlm_repro.train.export import agreement, base_of, drawn_requests, merge
from vlm_repro.train.parts import lora_targets

torch.set_num_threads(1)
hf_logging.disable_progress_bar()
FAMILIES = ['qwen2_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision', 'internlm2']


def checkpoint(family: str, folder: Path) -> Path:
    "A base model; `internlm2` is one that was converted."
    if family != 'internlm2': return random_checkpoint(family, folder)
    convert(random_original('internlm2', folder.with_name('original')), folder)
    return folder


def tuned(base: Path, out: Path, template: str = '', **lora: object) -> Path:
    "An adapter with random second factors, as training would leave it."
    net = load_net(base, True)
    torch.manual_seed(3)
    model = peft.get_peft_model(net, peft.LoraConfig(**{'r': 4, 'target_modules': lora_targets(net), **lora}))
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.1)
    preparer = load_preparer(base, True)
    if template: preparer.chat_template = template
    for part in (model, preparer, net.generation_config): part.save_pretrained(out)
    return out


@pytest.mark.parametrize('family', FAMILIES)
def test_adapter_and_merged_weights_answer_alike(family: str, tmp_path: Path) -> None:
    "Eight requests with pictures; the adapter does change the answers of its base."
    base = checkpoint(family, tmp_path/'base')
    adapter = tuned(base, tmp_path/'adapter')
    merged, requests = merge(adapter, tmp_path/'merged'), drawn_requests(tmp_path/'pictures')
    found = agreement(base_of(adapter), adapter, merged, requests, max_new_tokens=6)
    assert found.ok and len(found.adapter) == 8 and str(found).endswith('8 of 8 requests')
    assert not any(g.error for g in found.adapter)
    apart = agreement(base, adapter, base, requests, max_new_tokens=6)
    assert not apart.ok and 'these part' in str(apart) and all(requests[i].id in str(apart) for i in apart.parted)


def test_what_travels_with_the_weights(tmp_path: Path) -> None:
    "Template, pixel budget and generation settings are those of the adapter, not of its base."
    base = random_checkpoint('qwen2_vl', tmp_path/'base')
    template = (base/'chat_template.jinja').read_text().replace('<|im_start|>', '<|im_start|>', 1) + '{# tuned #}'
    adapter = tuned(base, tmp_path/'adapter', template)
    merged = merge(adapter, tmp_path/'merged')
    for folder in (adapter, merged):
        assert AutoProcessor.from_pretrained(folder).chat_template == template
        assert json.loads((folder/'generation_config.json').read_text())['eos_token_id'] == tokenizer_of(load_preparer(base, True)).eos_token_id
    assert load_model(str(merged)).describe()['class'] == 'Qwen2VLForConditionalGeneration'
    assert not (merged/'adapter_config.json').exists()
    assert set(load_file(merged/'model.safetensors')) == set(load_file(base/'model.safetensors'))


def test_precision_is_the_bases_unless_another_is_asked_for(tmp_path: Path) -> None:
    "Half precision is rounded once, on merging."
    base = random_checkpoint('internvl', tmp_path/'base')
    config = json.loads((base/'config.json').read_text())
    save_file({k: t.half() for k, t in load_file(base/'model.safetensors').items()}, base/'model.safetensors', {'format': 'pt'})
    (base/'config.json').write_text(json.dumps({**config, 'dtype': 'float16'}))
    adapter = tuned(base, tmp_path/'adapter')
    kinds = {d: {t.dtype for t in load_file(merge(adapter, tmp_path/d, dtype=d)/'model.safetensors').values()} for d in ('auto', 'float32')}
    assert kinds == {'auto': {torch.float16}, 'float32': {torch.float32}}
    with pytest.raises(ModelError, match='unknown dtype'): merge(adapter, tmp_path/'x', dtype='int8')


def test_wrong_bases_and_places_are_refused(tmp_path: Path) -> None:
    "Not an adapter, another model, a base that is gone, a folder with something in it, weights that are not finite."
    base, other = random_checkpoint('internvl', tmp_path/'base'), random_checkpoint('qwen2_vl', tmp_path/'other')
    adapter = tuned(base, tmp_path/'adapter')
    with pytest.raises(ModelError, match='not a PEFT adapter'): merge(base, tmp_path/'x')
    with pytest.raises(ModelError, match='does not fit'): merge(adapter, tmp_path/'x', base=str(checkpoint('internlm2', tmp_path/'third')))
    with pytest.raises(ModelError, match='is a server'): merge(adapter, tmp_path/'x', base='openai:x')
    with pytest.raises(ModelError, match='there already'): merge(adapter, other)
    base.rename(tmp_path/'moved')
    with pytest.raises(ModelError, match='another place'): merge(adapter, tmp_path/'x')
    assert (merge(adapter, tmp_path/'found', base=str(tmp_path/'moved'))/'config.json').is_file()
    weights = load_file(adapter/'adapter_model.safetensors')
    save_file({k: torch.full_like(t, float('nan')) for k, t in weights.items()}, adapter/'adapter_model.safetensors')
    with pytest.raises(ModelError): merge(adapter, tmp_path/'x', base=str(tmp_path/'moved'))
    assert not (tmp_path/'x').exists() and not list(tmp_path.glob('.*.part'))


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A merged folder does not appear half."
    base = random_checkpoint('internvl', tmp_path/'base')
    adapter = tuned(base, tmp_path/'adapter')

    def full(*args: object, **kwargs: object) -> None: raise OSError(28, 'No space left on device')
    monkeypatch.setattr(kinds, 'load_preparer', full)
    with pytest.raises(OSError, match='No space'): merge(adapter, tmp_path/'merged')
    assert not (tmp_path/'merged').exists() and not list(tmp_path.glob('.*.part'))


def test_saved_modules_are_merged_too(tmp_path: Path) -> None:
    "A head that was trained whole beside the adapter."
    base = random_checkpoint('internvl', tmp_path/'base')
    adapter = tuned(base, tmp_path/'adapter', modules_to_save=['lm_head'])
    weights = load_file(adapter/'adapter_model.safetensors')
    head = next(k for k in weights if 'lm_head' in k)
    save_file({**weights, head: weights[head] + 0.5}, adapter/'adapter_model.safetensors', {'format': 'pt'})
    merged = load_file(merge(adapter, tmp_path/'merged')/'model.safetensors')
    own = next(t for k, t in merged.items() if 'lm_head' in k)
    assert torch.allclose(own, weights[head] + 0.5)


def test_nothing_to_ask_is_an_error(tmp_path: Path) -> None:
    "An agreement about nothing would be none."
    with pytest.raises(ValueError, match='give some requests'): agreement('tiny', tmp_path, tmp_path, [])


# --- the command line

def test_convert_inspect_and_merge_as_a_shell_calls_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "From an original to merged weights."
    source, native = random_original('qwen2', tmp_path/'original'), tmp_path/'native'
    assert main(['inspect', str(source)]) == 2
    assert 'vlm-repro convert' in capsys.readouterr().err
    assert main(['convert', str(source), str(native), '--shard-size', '0.05MB', '--system', '']) == 0
    assert 'written now' in capsys.readouterr().out
    assert AutoProcessor.from_pretrained(native).apply_chat_template([{'role': 'user', 'content': 'x'}]).startswith('<|im_start|>system\n<|im_end|>\n')
    assert main(['inspect', str(native)]) == 0
    assert r'model\.language_model\..*\.(q_proj|' in capsys.readouterr().out
    assert main(['merge', str(tuned(native, tmp_path/'adapter')), str(tmp_path/'merged'), '--samples', '3']) == 0
    assert '3 of 3 requests' in capsys.readouterr().out
    assert load_model(str(tmp_path/'merged')).describe()['class'] == 'InternVLForConditionalGeneration'


def test_merge_ends_with_one_where_answers_part(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    "A merge that forgot the adapter."
    base = random_checkpoint('internvl', tmp_path/'base')
    adapter = tuned(base, tmp_path/'adapter')
    monkeypatch.setattr(export, 'merge', lambda *args: base)
    assert main(['merge', str(adapter), str(tmp_path/'merged')]) == 1
    assert 'these part' in capsys.readouterr().out


def test_what_a_merge_is_checked_with_is_known_before_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "A slip in the name of the paper leaves nothing in the way of the command that is right; a wrong base is said in one line."
    base, other = random_checkpoint('internvl', tmp_path/'base'), checkpoint('internlm2', tmp_path/'other')
    adapter, merged = tuned(base, tmp_path/'adapter'), tmp_path/'merged'
    assert main(['merge', str(adapter), str(merged), '--check', 'roadbudy']) == 2
    assert "no paper named 'roadbudy'; there are" in capsys.readouterr().err and not merged.exists()
    assert main(['merge', str(adapter), str(merged), '--base', str(other)]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and 'tensors have other sizes in other' in said and 'give the model it was trained on' in said
    assert main(['merge', str(adapter), str(merged), '--samples', '1']) == 0


@pytest.mark.parametrize(('args', 'said'), [
    (['convert', 'none/', 'x'], 'none'), (['merge', '.', 'x'], 'not a PEFT adapter'), (['inspect', 'openai:x'], 'server'), (['inspect', 'tiny', '--tiny', 'nope'], 'nope'),
    (['convert', '.', 'x', '--shard-size', 'big'], 'size'), (['convert', '.', 'x', '--system', 'a', '--system-file', 'b'], 'not both')])
def test_wrong_words_are_one_line(args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    "Exit code 2, no traceback."
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
