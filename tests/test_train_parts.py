"""Parts, freezing, LoRA targets and learning rates on the genuine classes."""
from collections import Counter

import peft
import pytest
import torch
import transformers as hf

from vlm_repro.models.families import FAMILIES, byte_tokenizer, chatml
from vlm_repro.train.parts import (
    PARTS,
    NoSuchTarget,
    count_parts,
    freeze,
    inspect_model,
    inspect_tree,
    linears,
    lora_size,
    lora_targets,
    meta_model,
    parameter_groups,
    part_of,
    parts_of,
    unwrap,
)

torch.set_num_threads(1)
ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
SEVEN = [*ATTENTION, 'gate_proj', 'up_proj', 'down_proj']
MODELS = ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl', 'internvl', 'internvl_llama', 'llava_onevision', 'llava_next']


def internvl_llama() -> hf.PreTrainedModel:
    "InternVL with the text model that InternLM2 becomes."
    tok = byte_tokenizer({}, chatml(''))
    text = {'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': len(tok)}
    vision = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 24, 'image_size': 28, 'patch_size': 14}
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))


def build(name: str) -> hf.PreTrainedModel:
    "A tiny model of the genuine class."
    return internvl_llama() if name == 'internvl_llama' else FAMILIES[name]()[0]


def by_part(model: torch.nn.Module, names: list[str]) -> dict[str, int]:
    "How many of the names each part has."
    return dict(Counter(part_of(n, parts_of(unwrap(model))) for n in names))


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_has_one_part_and_no_part_is_empty(name: str) -> None:
    "On the bare class and inside PEFT."
    model = build(name)
    counts = count_parts(model)
    assert all(counts[p].total > 0 for p in PARTS)
    assert sum(c.total for c in counts.values()) == model.num_parameters()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora_targets(model)))
    inside = count_parts(wrapped)
    assert {p: inside[p].total for p in PARTS if p != 'language_model'} == {p: counts[p].total for p in PARTS if p != 'language_model'}
    assert {p for p in PARTS if inside[p].trainable} == {'language_model'}


@pytest.mark.parametrize('name', MODELS)
def test_default_targets_are_the_seven_linears_of_the_language_model(name: str) -> None:
    "Nothing of vision, projector or head; the same before and after PEFT wraps it."
    model = build(name)
    targets = lora_targets(model)
    assert by_part(model, targets) == {'language_model': 14}
    assert {t.rsplit('.', 1)[-1] for t in targets} == set(SEVEN)
    size = lora_size((linears(model)[t] for t in targets), 4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    assert wrapped.get_nb_trainable_parameters()[0] == size
    assert lora_targets(wrapped) == targets
    assert inspect_tree(wrapped).targets == tuple(targets)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('wrong', [['qkv_proj', 'out_proj'], 'languge_model', r'language_model\..*q_proj', ['q_proj', 'nothing'], []])
def test_targets_that_match_nothing_are_an_error(name: str, wrong: object) -> None:
    "The published names, a typing error, an expression that is not for whole names, one wrong name of two, none at all."
    with pytest.raises(NoSuchTarget) as e: lora_targets(build(name), wrong)
    assert all(s in str(e.value) for s in ('q_proj', 'o_proj', 'down_proj', 'in language_model', 'in vision'))


def test_published_names_come_with_near_ones() -> None:
    "As the spec has it: InternVL has neither."
    with pytest.raises(NoSuchTarget, match=r"'qkv_proj' \(near: [^)]*q_proj.*'out_proj' \(near: o_proj"): lora_targets(build('internvl'), ['qkv_proj', 'out_proj'])


def eight_billion() -> hf.PreTrainedModel:
    "InternVL3-8B on the meta device."
    text = {'model_type': 'qwen2', 'hidden_size': 3584, 'intermediate_size': 18944, 'num_hidden_layers': 28, 'num_attention_heads': 28, 'num_key_value_heads': 4, 'vocab_size': 151674}
    vision = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096, 'attention_bias': True}
    return meta_model(hf.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))


@pytest.mark.parametrize(('which', 'trained'), [
    (r'model\.language_model\..*\.(q|k|v|o)_proj', 20_185_088), (ATTENTION, 24_903_680), ('language_model', 80_740_352), (SEVEN, 85_458_944), ('all-linear', 95_371_264)])
def test_counts_of_the_eight_billion_shape(which: object, trained: int) -> None:
    "Trainable parameters at rank 32, counted by PEFT itself, and the size of the model (roadbuddy specification, section 4.1)."
    model = eight_billion()
    assert round(model.num_parameters()/1e9, 3) == 7.944
    targets = lora_targets(model, which)
    assert lora_size((linears(model)[t] for t in targets), 32) == trained
    with torch.device('meta'): wrapped = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules=targets))
    assert wrapped.get_nb_trainable_parameters()[0] == trained


@pytest.mark.parametrize('name', MODELS)
def test_freeze_lets_exactly_the_named_parts_learn(name: str) -> None:
    "For every single part, for all and for none."
    model = build(name)
    for trainable in [*([p] for p in PARTS), PARTS, []]:
        counts = freeze(model, trainable)
        assert {p for p in PARTS if counts[p].trainable} == set(trainable)
        assert all(c.trainable in (0, c.total) for c in counts.values())
    with pytest.raises(ValueError, match='meant projector'): freeze(model, ['projecter'])


def test_freeze_leaves_an_adapter_alone() -> None:
    "Full training of the projector beside LoRA; a saved copy of a module stays frozen."
    model = build('internvl')
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=['lm_head']))
    lora = count_parts(wrapped)['language_model'].trainable
    counts = freeze(wrapped, ['projector'])
    assert counts['projector'].trainable == counts['projector'].total
    assert counts['language_model'].trainable == lora > 0
    assert 0 < counts['head'].trainable < counts['head'].total


def test_tied_weights_count_once_and_cannot_be_half_frozen() -> None:
    "The tensor is counted with the embeddings."
    config = build('qwen2_vl').config.to_dict()
    model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig.from_dict({**config, 'tie_word_embeddings': True}))
    assert count_parts(model)['head'].total == 0
    for half in (['head'], ['embeddings']):
        with pytest.raises(ValueError, match='share one tensor'): freeze(model, half)
    assert freeze(model, ['head', 'embeddings'])['embeddings'].trainable > 0


def test_rates_reach_their_parts_and_the_groups_hold_every_parameter_once() -> None:
    "Same split into decay and no decay as the Trainer's."
    model = build('llava_onevision')
    freeze(model, ['projector', 'language_model'])
    with pytest.raises(ValueError, match='language_model learns'): parameter_groups(model, {'projector': 1e-3}, .1)
    with pytest.raises(ValueError, match='meant vision'): parameter_groups(model, {'vison': 1e-3}, .1)
    groups = parameter_groups(model, {'projector': 1e-3, 'language_model': 1e-5, 'vision': 1.}, .1)
    held = [id(p) for g in groups for p in g['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {(g['name'].split('/')[0], g['lr']) for g in groups} == {('projector', 1e-3), ('language_model', 1e-5)}
    decays = set(hf.Trainer.get_decay_parameter_names(None, model))
    mine = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    assert mine == {id(p) for n, p in model.named_parameters() if p.requires_grad and n in decays}


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'internvl', 'llava_onevision'])
def test_inspect_reads_no_weight(name: str, tmp_path) -> None:
    "A configuration is enough; the suggestion works as it is printed."
    model = build(name)
    model.config.save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert {p: c.total for p, c in found.counts.items()} == {p: c.total for p, c in count_parts(model).items()}
    assert lora_targets(model, found.pattern) == list(found.targets) == lora_targets(model)
    text = str(found)
    assert f'{model.num_parameters():,}' in text and found.pattern in text and 'q_proj' in text
