"""Shared beginnings of prompts: found, encoded once, and without a trace in the answers."""
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_repro.core.generate import generate
from vlm_repro.core.media import MediaError
from vlm_repro.core.pins import pin_model
from vlm_repro.core.records import Request
from vlm_repro.core.runs import RunError, open_run
from vlm_repro.models import sharing
from vlm_repro.models.choices import by_likelihood
from vlm_repro.models.families import FAMILIES, random_checkpoint
from vlm_repro.models.features import Bounded, encode_once, whole
from vlm_repro.models.inputs import encode
from vlm_repro.models.prefix import LEAST, PrefixTree, common, prefix_keys, shared_ends
from vlm_repro.models.prompts import as_prompt, why_not
from vlm_repro.models.protocol import ModelError, Prepared, Staged, load_model
from vlm_repro.models.transformers import inputs_of

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:Found missing adapter keys')
SIZES = ((120, 90), (60, 110), (90, 90), (150, 60), (70, 70), (56, 84))
SHARED = ('qwen2_vl', 'qwen2_5_vl', 'internvl')


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp('families'), {}

    def get(family):
        if family not in made: made[family] = random_checkpoint(family, root/family)
        return made[family]
    return get


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    for i, (w, h) in enumerate(SIZES):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root/f'{i}.png')
    return [str(root/f'{i}.png') for i in range(len(SIZES))]


def user(text, *images): return {'role': 'user', 'content': [{'type': 'image', 'image': i} for i in images] + [{'type': 'text', 'text': text}]}


def said(text): return {'role': 'assistant', 'content': [{'type': 'text', 'text': text}]}


def request(id, *messages): return Request(id, list(messages), 'ours')


def test_the_two_halves_are_generate(folders, pictures, tmp_path):
    model = load_model(str(folders('qwen2_vl')), max_model_len=200)
    asked = [request('a', user('What is this?', pictures[0])), request('torn', user('And this?', str(tmp_path/'none.png'))),
             request('long', user('Tell me everything. '*20, pictures[1])), request('b', user('Is the sky blue?'))]
    ready = model.prepare(asked)
    assert isinstance(model, Staged) and isinstance(ready, Prepared) and len(ready) == 4
    at_once = model.generate(asked, 4)
    assert model.answer(ready, 4) == at_once
    assert [g.id for g in at_once] == ['a', 'torn', 'long', 'b']
    assert [(g.error or 'ok').split(':')[0] for g in at_once] == ['ok', 'media', 'overflow', 'ok']
    assert (model.answer(model.prepare([]), 4), model.answer(ready, 300)[0].error.split(':')[0]) == ([], 'overflow')


def test_the_first_half_runs_beside_the_second(folders, pictures):
    model = load_model(str(folders('qwen2_vl')))
    batches = [[request(f'{i}{j}', user(f'What is {i}?'*(1 + i % 3), pictures[(i + j) % 6])) for j in range(2)] for i in range(6)]
    expected = [model.generate(b, 3) for b in batches]
    ready = {}
    thread = threading.Thread(target=lambda: ready.update((i, model.prepare(b)) for i, b in enumerate(batches)))
    thread.start()
    while thread.is_alive(): assert model.generate(batches[0], 3) == expected[0]
    assert [model.answer(ready[i], 3) for i in range(6)] == expected


def test_a_chooser_has_halves_too(folders, pictures):
    chooser = by_likelihood(load_model(str(folders('internvl'))), {'a': ['A', 'B'], 'b': ['A', 'B', 'C']})
    asked = [request('a', user('A or B?', pictures[0])), request('b', user('A, B or C?', pictures[0]))]
    assert isinstance(chooser, Staged)
    for halves, at_once in zip(chooser.answer(chooser.prepare(asked), 1), chooser.generate(asked, 1), strict=True):
        assert halves.choice_logprobs == pytest.approx(at_once.choice_logprobs, abs=1e-5) and (halves.id, halves.text) == (at_once.id, at_once.text)
    assert chooser.prefix_keys(asked[0]) == chooser.prefix_keys(asked[1]) != ()


def test_keys_name_what_two_conversations_begin_with():
    shots = [user('Raining?', 'wet.png'), said('Yes'), user('Raining?', 'dry.png'), said('No')]
    one, two = prefix_keys([*shots, user('A bench?', 'park.png')]), prefix_keys([*shots, user('A tree?', 'park.png')])
    assert one == two and len(one) == len(set(one)) == 5
    assert prefix_keys([*shots[:2], user('A tree?', 'park.png')])[:2] == one[:2]
    assert prefix_keys([*shots, user('A tree?', 'street.png')])[:4] == one[:4]
    assert prefix_keys([*shots, user('A tree?', 'street.png')])[4] != one[4]
    assert prefix_keys([*shots, user('A tree?')]) == one[:4]
    assert prefix_keys([{'role': 'system', 'content': 'Be brief.'}, *shots, user('A bench?', 'park.png')])[0] != one[0]


def test_keys_tell_frames_depth_modes_and_wordings_apart():
    def key(**part): return prefix_keys([{'role': 'user', 'content': [{'type': 'text', 'text': 'Frame1:'}, {'type': 'image', 'image': 'v.mp4', **part}, {'type': 'text', 'text': '?'}]}])
    assert len({key(), key(frame=1), key(frame=2), key(depth_mode='clip')}) == 4
    assert prefix_keys([user('Is it blue?')]) == prefix_keys([{'role': 'user', 'content': 'Is it blue?'}]) == ()


# Trees and cuts. -----------------------------------------------------------------------------------------------------------------------------------------

def prompts_like(seed, n):
    "Prompts that share beginnings of several depths, and some that share nothing."
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        shots, scene = int(rng.integers(0, 3)), int(rng.integers(0, 3))
        made.append(np.concatenate([np.arange(60*(shots + 1)) + 1000*shots, np.arange(50) + 100*scene + 5000, rng.integers(0, 9, int(rng.integers(1, 40)))]))
    return made


@pytest.mark.parametrize('seed', range(8))
def test_cuts_lie_where_prompts_part(seed):
    prompts = prompts_like(seed, 9)
    for i, ends in enumerate(shared_ends(prompts)):
        assert ends == sorted(set(ends)) and all(LEAST <= e < len(prompts[i]) for e in ends)
        assert all(b - a >= LEAST for a, b in zip([0, *ends], ends))
        for e in ends: assert sum(common(prompts[i], p) >= e and len(p) > e for p in prompts) >= 2


@pytest.mark.parametrize('seed', range(8))
def test_a_tree_gives_back_what_was_put_in(seed):
    tree, prompts = PrefixTree(10**9), prompts_like(seed, 12)
    rng = np.random.default_rng(seed)
    for p in prompts:
        for end in sorted(int(e) for e in rng.integers(1, len(p) + 1, 3)):
            for s in tree.upto(p, end).line:
                if s.made is None: tree.keep(s, torch.as_tensor(p[s.start:s.end].copy())[None, :, None])
        assert tree.known(p) >= end
        line = tree.upto(p, end).line
        assert torch.cat([s.made for s in line], 1)[0, :, 0].tolist() == p[:end].tolist() and line[-1].end == end
    held = [s for p in prompts for s in tree.upto(p, tree.known(p)).line]
    assert tree.bytes == sum(s.made.nbytes for s in {id(s): s for s in held}.values())
    tree.limit = tree.bytes//3
    tree.trim()
    assert tree.bytes <= tree.limit and tree.dropped
    for p in prompts: assert torch.cat([torch.empty(1, 0, 1, dtype=torch.long), *(s.made for s in tree.upto(p, tree.known(p)).line)], 1)[0, :, 0].tolist() == p[:tree.known(p)].tolist()
    tree.limit = 0
    tree.trim()
    assert tree.bytes == 0 and not tree.root.after


def test_a_memory_keeps_what_was_used_last():
    kept = Bounded(100)
    for k in range(20): kept.put(k, k, 30)
    assert (len(kept), kept.bytes, kept.dropped, kept.get(19), kept.get(0)) == (3, 90, 17, 19, None)
    kept.put(19, 'new', 70)
    assert kept.bytes <= 100 and kept.get(19) == 'new' and Bounded(0).put('a', 1, 1) is None


# Pixels. -------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', SHARED)
def test_one_picture_at_a_time_gives_the_same_tensors(family, folders, pictures, tmp_path):
    preparer, memory = load_model(str(folders(family))).preparer, Bounded(2**26)
    for messages in ([user('a', *pictures)], [user('b', pictures[2]), said('x'), user('c', pictures[0], pictures[0])], [user('none')]):
        apart, usual = encode_once(preparer, messages, memory), encode(preparer, messages)
        ours = whole(apart)
        assert (ours.pixel_hash, ours.prompt_hash, ours.n_visual, set(ours.tensors)) == (usual.pixel_hash, usual.prompt_hash, usual.n_visual, set(usual.tensors))
        for k in usual.tensors: assert torch.equal(ours.tensors[k], usual.tensors[k]) and ours.tensors[k].dtype == usual.tensors[k].dtype, k
        assert sum(s.n_tokens for s in apart.images) == ours.n_visual and 'pixel_values' not in apart.tensors
    assert (len(memory), memory.misses) == (len(pictures), len(pictures))
    typed = [user(f'What does {preparer.image_token} mean?', pictures[1]), said('A place.'), user('And here?', pictures[2])]
    if family == 'internvl':  # its processor refuses a placeholder in a question
        for way in (lambda: encode(preparer, typed), lambda: encode_once(preparer, typed, memory)):
            with pytest.raises(ValueError, match='should be the same'): way()
    else:
        ours, usual = whole(encode_once(preparer, typed, memory)), encode(preparer, typed)
        assert all(torch.equal(ours.tensors[k], usual.tensors[k]) for k in usual.tensors) and ours.prompt_hash == usual.prompt_hash
    for broken in (str(tmp_path/'none.png'), str(tmp_path)):
        with pytest.raises(MediaError): encode_once(preparer, [user('?', pictures[0], broken)], memory)


@pytest.mark.parametrize('family', ('qwen2_vl', 'qwen2_5_vl'))
def test_positions_are_the_models_own(family, models, pictures):
    model = models(family)
    for messages in ([user('a', *pictures)], [user('b', pictures[3]), said('x'), user('c', pictures[0], pictures[5])], [user('', pictures[1])], [user('none')]):
        e = encode_once(model.preparer, messages, Bounded(0))
        ours = as_prompt(model.net, e).positions
        theirs, _ = model.net.model.get_rope_index(e.tensors['input_ids'], e.tensors['mm_token_type_ids'], image_grid_thw=e.tensors.get('image_grid_thw'))
        assert torch.equal(ours, theirs[:, 0])


def test_a_file_that_changes_is_read_again(folders, tmp_path):
    model, path = load_model(str(folders('qwen2_vl'))), tmp_path/'a.png'
    hashes = []
    for colour in ('teal', 'gold'):
        Image.new('RGB', (90, 90), colour).save(path)
        hashes.append(model.generate([request('a', user('?', str(path)))], 1)[0].pixel_hash)
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize('family', ('qwen2_vl', 'qwen2_5_vl'))
def test_pictures_of_one_colour_and_another_shape_are_two(family, models, tmp_path):
    model, asked = models(family), []
    for size in ((56, 112), (112, 56), (28, 224)):
        Image.new('RGB', size, 'teal').save(path := tmp_path/f'{size[0]}.png')
        asked.append(encode_once(model.preparer, [user('What is this?', str(path))], Bounded(0)))
    assert len({whole(e).tensors['pixel_values'].shape for e in asked}) == 1 and len({e.images[0].digest for e in asked}) == len({e.pixel_hash for e in map(whole, asked)}) == 3


# Answers. ------------------------------------------------------------------------------------------------------------------------------------------------

def conversations(pictures, shots, n=7):
    "Questions behind the same shots, on scenes of one or two pictures; one stands alone and one shows nothing."
    head = [m for k in range(shots) for m in (user(f'Shot {k}: is it raining?', pictures[k]), said(f'No {k}.'))]
    asked = [request(f'q{k}', *head, user('What is here?'*(1 + k % 3), *pictures[3 + k % 2:4 + k % 2 + k % 3 % 2])) for k in range(n - 2)]
    return [*asked, request('alone', user('And in this one?', pictures[5])), request('blind', *head, user('No picture at all.'))]


@pytest.fixture(scope='session')
def models(folders):
    made = {}

    def get(family, **options):
        key = family, *sorted(options.items())
        if key not in made: made[key] = load_model(str(folders(family)), **options)
        return made[key]
    return get


@pytest.fixture(scope='session')
def alone(models, pictures):
    "The plain answers, one request at a time."
    made = {}

    def get(family, shots):
        if (family, shots) not in made: made[family, shots] = [models(family, share_prefixes=False).generate([r], 10)[0] for r in conversations(pictures, shots)]
        return made[family, shots]
    return get


@pytest.mark.parametrize('shots', (0, 1, 3))
@pytest.mark.parametrize('family', SHARED)
def test_shared_beginnings_change_no_answer(family, shots, models, alone, folders, pictures):
    expected, asked = alone(family, shots), conversations(pictures, shots)
    for size in (1, 3, 7):
        model = load_model(str(folders(family)))
        got = [g for k in range(0, 7, size) for g in model.generate(asked[k:k + size], 10)]
        assert got == expected, size
        count = model.reused()
        assert count['tokens'] == sum(g.n_prompt for g in expected) and count['prompts'] == 7
        assert count['tokens_read'] <= count['tokens']/max(1, shots - 1) and count['images_encoded'] < count['images']
    assert len({g.token_ids for g in expected}) > 1


def first_logits(model, asked):
    items = model.prepare(asked).items
    with torch.inference_mode():
        if model.reader is None: return model.net.generate(**inputs_of(model, items), max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        _, order, filled = model.reader.read(items)
    return filled.logits[torch.tensor(order).argsort()]


@pytest.mark.parametrize('attention', ('sdpa', 'eager'))
@pytest.mark.parametrize('family', SHARED)
def test_logits_are_those_of_one_prompt_at_a_time(family, attention, models, pictures):
    asked = conversations(pictures, 3)
    plain = torch.cat([first_logits(models(family, share_prefixes=False, attention=attention), [r]) for r in asked])
    sharing = models(family, attention=attention)
    for rows in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 0], [5]):
        torch.testing.assert_close(first_logits(sharing, [asked[r] for r in rows]), plain[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('attention', ('sdpa', 'eager'))
@pytest.mark.parametrize('family', SHARED)
def test_groups_with_padding_as_a_gpu_reads_them_change_no_answer(family, attention, folders, models, alone, pictures, monkeypatch):
    "Rows of different lengths and starts in one pass."
    seen, groups = [], sharing._groups

    def padded(sizes, exact):
        seen.extend(tuple(sizes[g]) for g in groups(sizes, False))
        return groups(sizes, False)
    monkeypatch.setattr(sharing, '_groups', padded)
    model, asked = load_model(str(folders(family)), attention=attention), conversations(pictures, 3)
    assert [g.token_ids for k in range(0, 7, 4) for g in model.generate(asked[k:k + 4], 10)] == [g.token_ids for g in alone(family, 3)]
    assert any(len({n for n, _ in g}) > 1 for g in seen) and any(len({start for _, start in g}) > 1 for g in seen)
    plain = torch.cat([first_logits(models(family, share_prefixes=False, attention=attention), [r]) for r in asked])
    model.reader.clear()
    torch.testing.assert_close(first_logits(model, asked), plain, atol=1e-5, rtol=1e-5)
    choices = [['A', 'bcd', 'left']]*7
    expected = models(family).score_choices(asked, choices)
    for g, e in zip(model.score_choices(asked, choices), expected): assert g.choice_logprobs == pytest.approx(e.choice_logprobs, abs=2e-5)


@pytest.mark.parametrize('family', SHARED)
def test_other_company_other_order_same_answers(family, models, alone, pictures):
    "What an earlier batch left behind changes nothing."
    model, asked, expected = models(family), conversations(pictures, 1), alone(family, 1)
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(7)[:int(rng.integers(1, 8))]
        assert model.generate([asked[k] for k in order], 10) == [expected[k] for k in order]


@pytest.mark.parametrize('family', ('qwen2_vl', 'internvl'))
def test_little_memory_costs_time_and_no_answer(family, alone, folders, pictures):
    asked, expected = conversations(pictures, 3), alone(family, 3)
    model = load_model(str(folders(family)), cache_mb=0)
    assert [g for k in range(0, 7, 3) for g in model.generate(asked[k:k + 3], 10)] == expected
    assert (model.reused()['prefixes_bytes'], model.reused()['features_bytes'], model.reused()['pixels_bytes']) == (0, 0, 0)
    for memory in (model.reader.tree, model.reader.features, model.reader.pixels): memory.limit = 60_000
    assert [g for k in range(0, 7, 2) for g in model.generate(asked[k:k + 2], 10)] == expected
    assert model.reader.tree.dropped and 0 < model.reader.tree.bytes <= 60_000 and model.reader.features.bytes <= 60_000
    with pytest.raises(ModelError, match='cache_mb'): load_model(str(folders(family)), cache_mb=-1)


@pytest.mark.parametrize('family', SHARED)
def test_an_adapter_is_used_in_shared_beginnings_too(family, folders, pictures, alone, tmp_path):
    import peft
    net = load_model(str(folders(family))).net
    tuned = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj', 'qkv', 'fc1']))
    torch.manual_seed(0)
    for name, p in tuned.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=0.3)
    tuned.save_pretrained(tmp_path)
    asked = conversations(pictures, 1)
    plain = load_model(str(folders(family)), adapter=str(tmp_path), share_prefixes=False)
    expected = [plain.generate([r], 10)[0] for r in asked]
    sharing = load_model(str(folders(family)), adapter=str(tmp_path))
    assert sharing.generate(asked, 10) == expected != alone(family, 1)
    prompting = peft.get_peft_model(load_model(str(folders(family))).net, peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3, token_dim=64, num_layers=2, num_attention_heads=4))
    assert 'tokens of its own' in why_not(prompting)


@pytest.mark.parametrize('penalty', (1.3, 0.8))
@pytest.mark.parametrize('share', (True, False))
def test_a_penalty_on_repetition_does_not_see_padding(penalty, share, folders, pictures):
    "The padding token may be an end token, whose likelihood must not depend on how much padding there is."
    model = load_model(str(folders('qwen2_vl')), repetition_penalty=penalty, share_prefixes=share)
    plain = load_model(str(folders('qwen2_vl')), repetition_penalty=penalty, share_prefixes=False)
    asked = conversations(pictures, 1)
    usual = load_model(str(folders('qwen2_vl'))).generate(asked, 24)
    got = model.generate(asked, 24)
    assert got == [plain.generate([r], 24)[0] for r in asked] and [g.token_ids for g in got] != [g.token_ids for g in usual]


@pytest.mark.parametrize('family', ('qwen2_vl', 'internvl'))
def test_answers_that_end_leave_the_others_alone(family, folders, pictures):
    "Several end tokens, rows that end at different places, and answers longer than the first room."
    asked = conversations(pictures, 1)
    plain, sharing = load_model(str(folders(family)), share_prefixes=False), load_model(str(folders(family)))
    said_ = [g.token_ids for g in plain.generate(asked, 90)]
    ends = [plain.decoding.eos_token_id, said_[0][3], said_[1][7], said_[2][20]]
    for model in (plain, sharing): model.decoding.eos_token_id = ends
    for n in (1, 2, 90):
        expected = [plain.generate([r], n)[0] for r in asked]
        assert sharing.generate(asked, n) == expected
    assert len({g.n_new for g in expected}) > 2 and {g.finish_reason for g in expected} >= {'stop'}
    for model in (plain, sharing): model.decoding.eos_token_id = None
    assert [len(g.token_ids) for g in sharing.generate(asked, 70)] == [70]*7


@pytest.mark.parametrize('family', ('qwen2_vl', 'internvl'))
def test_memory_that_runs_out_halves_the_batch(family, folders, pictures, alone, monkeypatch):
    model, expected = load_model(str(folders(family))), alone(family, 1)
    real, refused = model.net.model.forward, []

    def short(*args, **kwargs):
        rows = len(kwargs['inputs_embeds'] if kwargs.get('inputs_embeds') is not None else kwargs['input_ids'])
        if rows > 2:
            refused.append(rows)
            raise torch.OutOfMemoryError('no room. tried')
        return real(*args, **kwargs)
    monkeypatch.setattr(model.net.model, 'forward', short)
    asked = conversations(pictures, 1)
    assert model.generate(asked, 10) == expected and refused
    monkeypatch.setattr(model.net.model, 'forward', lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError('no room. tried')))
    assert {g.error.split(':')[0] for g in model.generate(asked, 10)} == {'oom'} and model.reader.tree.bytes == 0
    monkeypatch.undo()
    assert model.generate(asked, 10) == expected


def test_what_fails_midway_leaves_nothing_half_read(folders, pictures, alone, monkeypatch):
    model, asked = load_model(str(folders('qwen2_vl'))), conversations(pictures, 3)
    with monkeypatch.context() as patch:
        patch.setattr(model.net.model.visual, 'forward', lambda *a, **k: (_ for _ in ()).throw(RuntimeError('broken')))
        with pytest.raises(RuntimeError, match='broken'): model.generate(asked, 10)
    assert model.generate(asked, 10) == alone('qwen2_vl', 3)


# What a page says. ---------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', FAMILIES)
def test_a_model_says_whether_it_shares(family, folders, pictures):
    model = load_model(str(folders(family)))
    said_, shares = model.describe()['shared_prefixes'], family in SHARED
    assert (said_ == 'yes') is shares and (shares or type(model.net).__name__ in said_)
    asked = request('a', user('?', pictures[0]))
    assert bool(model.prefix_keys(asked)) is shares and bool(model.reused()) is shares
    off = load_model(str(folders(family)), share_prefixes=False)
    assert off.describe()['shared_prefixes'] == 'no: not asked for' and off.reader is None and off.prefix_keys(asked) == ()


def test_a_report_says_what_was_shared(folders, pictures, tmp_path):
    asked, model = conversations(pictures, 3), load_model(str(folders('qwen2_vl')))
    run = open_run(tmp_path/'run', {})
    report = generate(model, asked, run, batch_size=4, max_new_tokens=2, progress=False)
    count, kept = model.reused(), run.rows('launches')[-1]['ranks'][0]['shared']
    assert kept == {k: count[k] for k in ('tokens', 'tokens_read', 'images', 'images_encoded')} and 0 < kept['tokens_read'] < kept['tokens']
    assert f'{kept["tokens_read"]:,} of {kept["tokens"]:,} prompt tokens read, {kept["images_encoded"]} of {kept["images"]} images encoded' in str(report)
    again = generate(model, [replace(r, id=f'{r.id} again') for r in asked], run, batch_size=4, max_new_tokens=2, progress=False)
    assert again.accounts[0].shared['tokens'] == kept['tokens'] and again.accounts[0].shared['images_encoded'] == 0
    run.close()


def test_what_would_break_is_not_shared(folders):
    for field, value, words in (('layer_types', ['full_attention', 'sliding_attention'], 'a part of the prompt'), ('rope_parameters', {'rope_type': 'longrope'}, 'how long')):
        net = load_model(str(folders('qwen2_vl'))).net
        assert why_not(net) == ''
        setattr(net.config.text_config, field, value)
        assert words in why_not(net)


def test_a_run_goes_on_with_sharing_switched(folders, tmp_path):
    about = [load_model(str(folders('internvl')), share_prefixes=s).describe() for s in (True, False)]
    run = open_run(tmp_path/'run', {})
    pin_model(run, about[0])
    run.append('predictions', [{'id': 'a', 'text': 'x', 'error': None}])
    pin_model(run, about[1])
    with pytest.raises(RunError, match='another model'): pin_model(run, {**about[0], 'dtype': 'bfloat16'})
    run.close()


def test_half_precision_is_close_and_not_promised_to_be_equal(folders, pictures):
    asked = conversations(pictures, 3)
    plain, sharing = (load_model(str(folders('qwen2_vl')), dtype='bfloat16', share_prefixes=s) for s in (False, True))
    a, b = first_logits(plain, asked).float(), first_logits(sharing, asked)
    assert float((a - b).abs().max()) < 0.05*float(a.abs().max())
    assert all(g.error is None for g in sharing.generate(asked, 4))


# Choices. ------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family', SHARED)
def test_choices_are_scored_as_in_the_plain_way(family, models, pictures):
    asked, plain, sharing = conversations(pictures, 3), models(family, share_prefixes=False), models(family)
    choices = [['A', 'B'], ['yes', 'no', 'a bench'], ['A', 'bcd'], ['A', 'B', 'C', 'D'], ['left', 'A'], ['A', 'A'], ['ahead of me']]
    expected = [plain.score_choices([r], [c])[0] for r, c in zip(asked, choices)]
    for size in (1, 3, 7):
        got = [g for k in range(0, 7, size) for g in sharing.score_choices(asked[k:k + size], choices[k:k + size])]
        for g, e in zip(got, expected):
            assert g.choice_logprobs == pytest.approx(e.choice_logprobs, abs=2e-5, rel=1e-5) and (g.text, g.token_ids, g.n_new) == (e.text, e.token_ids, e.n_new)
    together = plain.score_choices(asked, choices)
    for g, e in zip(together, expected): assert g.choice_logprobs == pytest.approx(e.choice_logprobs, abs=2e-5, rel=1e-5)


def test_a_long_choice_is_as_likely_as_its_tokens_one_by_one(models, pictures):
    model, asked = models('qwen2_vl'), request('a', user('Where?', pictures[0]))
    (g,) = model.score_choices([asked], [['abc']])
    total, e = 0., encode(model.preparer, asked.messages)
    ids = e.tensors['input_ids']
    for token in g.token_ids:
        n = ids.shape[1]
        kinds = torch.nn.functional.pad(e.tensors['mm_token_type_ids'], (0, n - e.n_prompt))
        with torch.inference_mode(): logits = model.net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=e.tensors['pixel_values'],
                                                        image_grid_thw=e.tensors['image_grid_thw'], mm_token_type_ids=kinds).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert g.choice_logprobs[0] == pytest.approx(total, abs=2e-5) and len(g.token_ids) == 3


def test_choices_that_cannot_be_told_apart_are_refused(models, pictures):
    asked = request('a', user('Where?', pictures[0]))
    for choices in (['ab', 'abc'], ['', 'a']):
        with pytest.raises(ModelError, match='begins'): models('qwen2_vl').score_choices([asked], [choices])
    with pytest.raises(ModelError, match='no choices'): models('qwen2_vl').score_choices([asked], [[]])


def test_choosing_halves_the_batch_when_memory_runs_out(folders, pictures, monkeypatch):
    model, asked, choices = load_model(str(folders('internvl'))), conversations(pictures, 1), [['A', 'left', 'right']]*7
    expected, real = model.score_choices(asked, choices), model.net.model.forward

    def short(*args, **kwargs):
        if len(kwargs['inputs_embeds'] if kwargs.get('inputs_embeds') is not None else kwargs['input_ids']) > 2: raise torch.OutOfMemoryError('no room. tried')
        return real(*args, **kwargs)
    model.reader.clear()
    monkeypatch.setattr(model.net.model, 'forward', short)
    for g, e in zip(model.score_choices(asked, choices), expected): assert g.choice_logprobs == pytest.approx(e.choice_logprobs, abs=2e-5)
    monkeypatch.setattr(model.net.model, 'forward', lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError('no room. tried')))
    assert {g.error.split(':')[0] for g in model.score_choices(asked, choices)} == {'oom'}
