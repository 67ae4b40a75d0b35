"""Drawn answers repeat: alone, in company, in any order, read with or without shared beginnings; and a reply may be begun."""
import json

import pytest
import torch
import transformers as hf
from noise import noise

from vlm_repro.core.records import Request, begun_reply
from vlm_repro.models.controls import shuffled
from vlm_repro.models.decoding import Decoding, decoding_of, sent_fields
from vlm_repro.models.draws import Draws, pick, possible
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.inputs import encode, measure, render, text_ids, tokenizer_of
from vlm_repro.models.protocol import ModelError, load_model

torch.set_num_threads(1)
WARM = {'temperature': 1.2, 'top_k': 40, 'top_p': .9, 'seed': 3}


@pytest.fixture(scope='module', params=['qwen2_5_vl', 'internvl', 'llava_onevision'])
def folder(request, tmp_path_factory):
    return random_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope='module')
def asked(tmp_path_factory) -> list[Request]:
    """Two questions about each of two pictures, of different lengths."""
    root = tmp_path_factory.mktemp('pictures')
    for i, size in enumerate([(112, 56), (60, 90)]): noise(*size).save(root/f'{i}.png')
    return [Request(f'{i}{q}', [{'role': 'user', 'content': [{'type': 'image', 'image': str(root/f'{i}.png')}, {'type': 'text', 'text': q*5}]}], 'ours')
            for i in range(2) for q in ('Where? ', 'And what is that over there? ')]


def tokens(model, requests) -> dict[str, tuple[int, ...]]:
    return {g.id: g.token_ids for g in model.generate(requests, 8)}


def test_a_draw_depends_on_seed_and_request_alone(folder, asked):
    drawn = load_model(str(folder), **WARM)
    together = tokens(drawn, asked)
    assert {k: v for r in reversed(asked) for k, v in tokens(drawn, [r]).items()} == together == tokens(load_model(str(folder), **WARM), asked[::-1])
    assert tokens(load_model(str(folder), **{**WARM, 'seed': 4}), asked) != together != tokens(load_model(str(folder)), asked)
    assert json.loads(json.dumps(drawn.describe()['decoding'])).items() >= {'do_sample': True, **WARM}.items()


def test_shared_beginnings_change_no_draw(folder, asked):
    models = [load_model(str(folder), share_prefixes=share, repetition_penalty=1.3, **WARM) for share in (True, False)]
    assert tokens(models[0], asked) == tokens(models[1], asked)


def test_a_step_of_one_token_is_greedy(folder, asked):
    assert tokens(load_model(str(folder), temperature=1., top_k=1, repetition_penalty=1.2), asked) == tokens(load_model(str(folder), repetition_penalty=1.2), asked)


def test_own_is_what_the_checkpoint_has(folder, asked, tmp_path):
    held = json.loads((folder/'generation_config.json').read_text()) if (folder/'generation_config.json').exists() else {}
    for f in folder.iterdir(): (tmp_path/f.name).symlink_to(f)
    (tmp_path/'generation_config.json').unlink(missing_ok=True)
    (tmp_path/'generation_config.json').write_text(json.dumps({**held, 'do_sample': True, 'temperature': 1.5, 'top_k': 7, 'repetition_penalty': 1.05}))
    said = load_model(str(tmp_path), temperature='own', top_k='own', top_p='own', repetition_penalty='own').describe()
    assert (said['decoding'] | {'temperature': 1.5, 'top_k': 7, 'top_p': 1., 'repetition_penalty': 1.05, 'seed': 0}) == said['decoding']
    assert load_model(str(tmp_path)).describe()['decoding'].get('temperature') is None


@pytest.mark.parametrize('asked, why', [({'temperature': -1.}, 'temperature=-1'), ({'top_p': 0.}, 'top_p=0'), ({'top_p': 1.1}, 'top_p=1.1'), ({'top_k': -1}, 'top_k=-1'),
                                        ({'temperature': 'hot'}, "'own'"), ({'temperature': float('nan')}, 'nan'), ({'repetition_penalty': 0}, 'repetition_penalty=0')])
def test_what_is_not_possible_is_refused(asked, why):
    for read in (lambda **k: decoding_of(hf.GenerationConfig(), **k), sent_fields):
        with pytest.raises(ModelError, match=why): read(**asked)


def test_probabilities_are_those_of_the_library():
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))*3
    for d in (Decoding(.7), Decoding(1.3, top_k=9), Decoding(1., top_p=.6), Decoding(2., .85, 20), Decoding(.01), Decoding(1., top_p=1e-6)):
        steps = [hf.TemperatureLogitsWarper(d.temperature), *([hf.TopKLogitsWarper(d.top_k)] if d.top_k else []), *([hf.TopPLogitsWarper(d.top_p)] if d.top_p < 1 else [])]
        shares, ids = possible(logits, d)
        ours = torch.zeros_like(shares).scatter(1, ids, shares)
        assert torch.allclose(ours, hf.LogitsProcessorList(steps)(None, logits.double()).softmax(-1), atol=1e-12)
        for chance in (0., .999999999999):
            assert (ours.gather(1, pick(logits, torch.full((5,), chance, dtype=torch.double), d)[:, None]) > 0).all()


def test_rows_that_end_leave_the_others_alone():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    whole, part = (Draws(Decoding(1.), 'abc') for _ in range(2))
    first, again = whole(logits), part(logits)
    part.only([2, 0])
    assert first.tolist() == again.tolist() and whole(logits)[[2, 0]].tolist() == part(logits[[2, 0]]).tolist()


def test_a_begun_reply_is_written_on(folder, asked):
    model = load_model(str(folder))
    p, begun = model.preparer, '<think></think><answer>'
    on = [Request(r.id, [*r.messages, {'role': 'assistant', 'content': [{'type': 'text', 'text': begun}]}], r.provenance) for r in asked]
    assert begun_reply(on[0].messages) == (asked[0].messages, begun) and model.show(on[0]) == model.show(asked[0]) + begun
    plain, made = encode(p, asked[0].messages).tensors['input_ids'][0].tolist(), encode(p, on[0].messages).tensors['input_ids'][0].tolist()
    assert made[:len(plain)] == plain and tokenizer_of(p).decode(made[len(plain):]) == begun
    lengths = measure(p, on[0].messages, model.counter)
    assert lengths.total == len(made) == model.generate(on[:1], 2)[0].n_prompt
    assert text_ids(p, render(p, on[0].messages))[-1] == made[-1] and model.prefix_keys(on[0]) == model.prefix_keys(asked[0])
    assert [r.messages[-1]['content'][0]['text'] for r in shuffled(on)] == [begun]*4 and shuffled(on)[0].messages[0]['content'][0] != on[0].messages[0]['content'][0]


def test_a_begun_reply_survives_a_question_that_quotes_an_image_token(folder, asked):
    model = load_model(str(folder))
    token, begun = model.preparer.image_token, {'role': 'assistant', 'content': [{'type': 'text', 'text': '<think>'}]}
    quoting = [{'role': 'user', 'content': [*asked[0].messages[0]['content'], {'type': 'text', 'text': f'What is {token}?'}]}]
    if 'IMG_CONTEXT' in token:  # its processor refuses such a question, begun or not
        for turns in (quoting, [*quoting, begun]):
            with pytest.raises(ValueError, match='number of'): encode(model.preparer, turns)
        return
    plain, made = encode(model.preparer, quoting), encode(model.preparer, [*quoting, begun])
    n = plain.n_prompt
    assert made.n_visual == plain.n_visual and made.tensors['input_ids'][0, :n].tolist() == plain.tensors['input_ids'][0].tolist()
    assert tokenizer_of(model.preparer).decode(made.tensors['input_ids'][0, n:]) == '<think>' and {v.shape[1] for k, v in made.tensors.items() if k in ('attention_mask', 'mm_token_type_ids')} == {made.n_prompt}
