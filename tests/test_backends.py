"""The transformers backend on tiny random checkpoints of the genuine families."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from vlm_repro.core.media import MediaError, open_image
from vlm_repro.core.records import Request
from vlm_repro.models.families import FAMILIES, byte_tokenizer, chatml, random_checkpoint
from vlm_repro.models.inputs import collate, encode, image_settings, render
from vlm_repro.models.protocol import Model, ModelError, load_model, parse_spec

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:Found missing adapter keys', 'ignore:`is_gradient_checkpointing`')
FULL = ('qwen2_vl', 'qwen2_5_vl', 'internvl', 'llava_onevision')
SIZES = ((400, 225), (90, 160), (300, 300), (640, 200))


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('families')
    made = {}

    def get(family):
        if family not in made: made[family] = random_checkpoint(family, root/family)
        return made[family]
    return get


@pytest.fixture(scope='session')
def models(folders):
    made = {}

    def get(family):
        if family not in made: made[family] = load_model(str(folders(family)))
        return made[family]
    return get


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    for i, (w, h) in enumerate(SIZES):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root/f'{i}.png')
    return [str(root/f'{i}.png') for i in range(len(SIZES))]


def user(pictures, text):
    return {'role': 'user', 'content': [{'type': 'image', 'image': p} for p in pictures] + [{'type': 'text', 'text': text}]}


def said(text): return {'role': 'assistant', 'content': [{'type': 'text', 'text': text}]}


def request(id, *messages): return Request(id, list(messages), 'ours')


@pytest.fixture(scope='session')
def requests(pictures):
    "One image, four images, three shots, no image; of very different lengths."
    shots = [m for i in range(3) for m in (user(pictures[i:i + 1], f'shot {i}?'), said(f'answer {i}'))]
    return [request('one', user(pictures[:1], 'What is this?')), request('four', user(pictures, 'Compare these.')),
            request('shots', *shots, user(pictures[3:], 'And this, after three examples?')), request('none', user([], 'No image at all.'))]


@pytest.mark.parametrize('family', FULL)
def test_batch_size_does_not_change_answers(family, models, requests):
    model = models(family)
    alone = [model.generate([r], 12)[0] for r in requests]
    together = model.generate(requests, 12)
    assert [g.id for g in together] == [r.id for r in requests]
    assert alone == together
    assert all(g.error is None and g.n_new == len(g.token_ids) > 0 for g in together)
    assert len({g.token_ids for g in together}) > 1
    assert {g.finish_reason for g in together} <= {'stop', 'length'}


@pytest.mark.parametrize('family', FAMILIES)
def test_loads_and_answers(family, models, requests):
    model = models(family)
    got = model.generate(requests[:2], 4)
    assert isinstance(model, Model) and all(g.error is None for g in got)
    record = model.describe()
    assert record == json.loads(json.dumps(record))
    assert record['padding_side'] == 'left' and record['image_processor']['backend'] == 'torchvision' and record['dtype'] == 'float32'


@pytest.mark.parametrize('family', FAMILIES)
def test_inputs_equal_the_processors_own_left_padded_batch(family, models, requests):
    model, asked = models(family), requests[:3]
    processor = model.preparer
    ours = collate([encode(processor, r.messages) for r in asked], processor.tokenizer.pad_token_id)
    images = [[open_image(p['image']) for m in r.messages for p in m['content'] if p['type'] == 'image'] for r in asked]
    processor.tokenizer.padding_side = 'left'
    theirs = processor(text=[render(processor, r.messages) for r in asked], images=images, padding=True, return_tensors='pt')
    assert set(ours) == set(theirs)
    for k in theirs: assert torch.equal(ours[k], theirs[k]), k


@pytest.mark.parametrize('family', FAMILIES)
def test_lengths_are_known_before_decoding(family, models, requests):
    model = models(family)
    for r, g in zip(requests, model.generate(requests, 1)):
        lengths = model.measure(r)
        assert (lengths.total, lengths.n_visual) == (g.n_prompt, g.n_visual)
        n_images = sum(p['type'] == 'image' for m in r.messages for p in m['content'])
        assert g.n_visual >= n_images and bool(g.pixel_hash) == bool(n_images)


def test_lengths_of_a_turned_photograph(models, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (600, 100), 'teal').save(tmp_path/'turned.jpg', exif=exif)
    model, asked = models('internvl'), request('t', user([str(tmp_path/'turned.jpg')], 'Which way up?'))
    assert model.measure(asked).total == model.generate([asked], 1)[0].n_prompt


@pytest.mark.parametrize('family', FULL)
def test_answers_depend_on_the_pixels(family, models, pictures):
    model = models(family)
    got = model.generate([request(str(i), user([p], 'What is this?')) for i, p in enumerate(pictures)], 12)
    assert len({g.pixel_hash for g in got}) == 4 and len({g.prompt_hash for g in got}) == 1
    assert len({g.token_ids for g in got}) > 1


def test_right_padding_is_refused(folders, requests, monkeypatch):
    import vlm_repro.models.inputs as inputs
    plain = load_model(str(folders('qwen2_vl')), share_prefixes=False)
    monkeypatch.setattr(inputs, '_left', lambda rows, fill: torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], True, fill))
    with pytest.raises(AssertionError, match='left'): plain.generate(requests, 1)


@pytest.mark.parametrize('family', FULL)
def test_a_broken_image_fails_alone(family, models, pictures, tmp_path):
    torn, text = tmp_path/'torn.png', tmp_path/'text.png'
    torn.write_bytes(Path(pictures[0]).read_bytes()[:3000])
    text.write_text('no image')
    asked = [request('ok', user(pictures[:1], 'What?')), request('torn', user([str(torn)], 'What?')),
             request('gone', user([str(tmp_path/'gone.png')], 'What?')), request('text', user([str(text)], 'What?'))]
    model = models(family)
    got = model.generate(asked, 4)
    assert got[0] == model.generate(asked[:1], 4)[0] and got[0].error is None
    for g, name in zip(got[1:], ('torn.png', 'gone.png', 'text.png')):
        assert g.finish_reason == 'error' and g.error.startswith('media: ') and name in g.error and g.text == ''


def test_an_image_the_processor_refuses_fails_alone(models, pictures, tmp_path):
    Image.new('RGB', (3000, 3)).save(tmp_path/'strip.png')
    got = models('qwen2_vl').generate([request('strip', user([str(tmp_path/'strip.png')], 'What?')), request('ok', user(pictures[:1], 'What?'))], 4)
    assert got[0].error.startswith('media: ') and 'aspect ratio' in got[0].error and got[1].error is None


def test_the_length_of_a_refused_image_is_a_media_error(models, tmp_path):
    Image.new('RGB', (3000, 3)).save(tmp_path/'strip.png')
    with pytest.raises(MediaError, match='aspect ratio'): models('qwen2_vl').measure(request('strip', user([str(tmp_path/'strip.png')], 'What?')))


def test_weights_that_are_not_in_the_file_are_not_invented(tmp_path):
    from safetensors.torch import load_file, save_file
    folder = random_checkpoint('qwen2_vl', tmp_path)
    tensors = load_file(folder/'model.safetensors')
    lost = next(k for k in tensors if 'layers.1' in k and 'q_proj' in k)
    save_file({k: v for k, v in tensors.items() if k != lost}, folder/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ModelError, match='drawn at random'): load_model(str(folder))


def test_depth_mode_reaches_the_pixels(models, tmp_path):
    ramp = np.linspace(0, 20*256, 64*64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path/'depth.png')
    def asked(mode):
        return request(mode, {'role': 'user', 'content': [{'type': 'image', 'image': str(tmp_path/'depth.png'), 'depth_mode': mode}, {'type': 'text', 'text': '?'}]})
    compat, clip = models('qwen2_vl').generate([asked('compat'), asked('clip')], 1)
    assert compat.pixel_hash != clip.pixel_hash and compat.prompt_hash == clip.prompt_hash


def test_a_prompt_that_does_not_fit_is_labelled(folders, requests):
    model = load_model(str(folders('qwen2_vl')), max_model_len=70)
    one, four = model.generate(requests[:2], 12)
    assert one.error is None
    assert four.error.startswith('overflow: ') and str(four.n_prompt) in four.error and '70' in four.error and four.n_visual > 0
    with pytest.raises(ModelError, match='positions'): load_model(str(folders('qwen2_vl')), max_model_len=10**6)


def test_memory_that_runs_out_halves_the_batch(folders, requests, monkeypatch):
    model = load_model(str(folders('qwen2_vl')), share_prefixes=False)
    want, sizes, generate = model.generate(requests, 6), [], model.net.generate

    def limited(limit):
        def run(**inputs):
            sizes.append(len(inputs['input_ids']))
            if sizes[-1] > limit: raise torch.OutOfMemoryError('out of memory. Tried to allocate 2 GiB')
            return generate(**inputs)
        return run
    monkeypatch.setattr(model.net, 'generate', limited(1))
    assert model.generate(requests, 6) == want and sizes == [4, 2, 1, 1, 2, 1, 1]
    monkeypatch.setattr(model.net, 'generate', limited(0))
    assert all(g.error.startswith('oom: ') and g.n_prompt > 0 for g in model.generate(requests, 6))


def test_a_checkpoint_cannot_make_us_sample(folders, models, requests, tmp_path):
    want = models('qwen2_vl').generate(requests, 12)
    folder = random_checkpoint('qwen2_vl', tmp_path)
    own = json.loads((folder/'generation_config.json').read_text())
    (folder/'generation_config.json').write_text(json.dumps({**own, 'do_sample': True, 'temperature': 5.0, 'top_k': 200, 'repetition_penalty': 1.5, 'num_beams': 2}))
    model = load_model(str(folder))
    assert [g.token_ids for g in model.generate(requests, 12)] == [g.token_ids for g in want]
    record = model.describe()
    assert record['decoding_ignored']['do_sample'] is True and record['decoding']['do_sample'] is False


def adapter_folder(model, folder):
    import peft
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], init_lora_weights=False)
    base = hf.AutoModelForImageTextToText.from_pretrained(model)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_an_adapter_changes_the_answers(folders, models, requests, tmp_path):
    adapter = adapter_folder(folders('qwen2_vl'), tmp_path/'lora')
    model = load_model(str(folders('qwen2_vl')), adapter=str(adapter))
    with_it, without = model.generate(requests, 12), models('qwen2_vl').generate(requests, 12)
    assert [g.token_ids for g in with_it] != [g.token_ids for g in without]
    assert [g.prompt_hash for g in with_it] == [g.prompt_hash for g in without]
    assert with_it == [model.generate([r], 12)[0] for r in requests]
    assert model.describe()['adapter'].startswith('sha256:')


def test_an_adapter_that_does_not_fit_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    adapter = adapter_folder(folders('qwen2_vl'), tmp_path/'lora')
    tensors = load_file(adapter/'adapter_model.safetensors')
    save_file({k.replace('layers.0', 'layers.7'): v for k, v in tensors.items()}, adapter/'adapter_model.safetensors')
    with pytest.raises(ModelError, match='found no place'): load_model(str(folders('qwen2_vl')), adapter=str(adapter))
    with pytest.raises(ModelError, match='is an adapter'): load_model(str(adapter))
    with pytest.raises(ModelError, match='adapter_config'): load_model(str(folders('qwen2_vl')), adapter=str(folders('janus')))


@pytest.mark.parametrize('missing,word', [('processor_config.json', 'image processor'), ('tokenizer', 'tokenizer'), ('model.safetensors', 'weights'), ('config.json', 'config.json')])
def test_an_incomplete_folder_is_refused(missing, word, tmp_path):
    folder = random_checkpoint('qwen2_vl', tmp_path)
    for f in folder.glob(f'{missing}*'): f.unlink()
    with pytest.raises(ModelError, match=word): load_model(str(folder))


@pytest.mark.parametrize('options,word', [({'dtype': 'int8'}, 'bfloat16'), ({'device': 'tpu?'}, 'cuda'), ({'image_backend': 'opencv'}, 'torchvision'),
                                          ({'temprature': 1}, 'valid ones'), ({'min_pixels': 10**6, 'max_pixels': 10}, 'min_pixels')])
def test_bad_options_list_the_valid_ones(options, word, folders):
    with pytest.raises(ModelError, match=word): load_model(str(folders('qwen2_vl')), **options)


@pytest.mark.parametrize('family,max_pixels,key', [('qwen2_vl', 28*28*5, 'size'), ('qwen3_vl', 32*32*5, 'size'), ('internvl', 56*56*2, 'max_patches'),
                                                   ('llava_onevision', 56*112, 'image_grid_pinpoints'), ('llava_next', 56*112, 'image_grid_pinpoints')])
def test_a_pixel_budget_means_fewer_visual_tokens(family, max_pixels, key, folders, models, pictures):
    asked = [request('a', user(pictures[2:3], 'What?'))]
    small = load_model(str(folders(family)), max_pixels=max_pixels)
    free, tight = models(family).generate(asked, 2)[0], small.generate(asked, 2)[0]
    assert tight.error is None and tight.n_visual < free.n_visual
    assert small.measure(asked[0]).n_visual == tight.n_visual
    assert small.describe()['image_processor'][key] != models(family).describe()['image_processor'][key]


def test_a_fixed_input_has_no_pixel_budget(folders):
    with pytest.raises(ModelError, match='fixed input size'): load_model(str(folders('janus')), max_pixels=1000)


def test_the_image_processor_is_the_one_asked_for(folders, models, pictures):
    asked = [request('a', user(pictures[:1], 'What?'))]
    pil = load_model(str(folders('qwen2_vl')), image_backend='pil')
    assert pil.describe()['image_processor']['class'] != models('qwen2_vl').describe()['image_processor']['class']
    assert pil.describe()['image_processor']['backend'] == 'pil' and pil.generate(asked, 2)[0].error is None
    assert image_settings(pil.preparer.image_processor)['size'] == models('qwen2_vl').describe()['image_processor']['size']


def test_a_placeholder_in_the_question_stays_text(models, pictures):
    model = models('llava_onevision')
    got, plain = model.generate([request('a', user(pictures[:1], 'Image-1: <image>\nWhat?')), request('b', user(pictures[:1], 'Image-1: \nWhat?'))], 2)
    assert got.error is None and got.n_visual == plain.n_visual and got.n_prompt == plain.n_prompt + len('<image>')


@pytest.fixture(scope='session')
def text_model(tmp_path_factory):
    "A small random Llama whose template writes the beginning of sequence itself."
    folder = tmp_path_factory.mktemp('llama')
    tok = byte_tokenizer({'bos_token': '<s>'}, '<s>' + chatml(''))
    config = hf.LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            max_position_embeddings=512, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    torch.manual_seed(0)
    net = hf.LlamaForCausalLM(config)
    for p in net.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_a_text_model_answers_text(text_model, pictures):
    model = load_model(str(text_model))
    asked = [request(str(i), user([], 'Grade this answer. '*(i + 1))) for i in range(4)]
    got = model.generate(asked, 8)
    assert got == [model.generate([r], 8)[0] for r in asked] and all(g.error is None and g.n_visual == 0 for g in got)
    assert [model.measure(r).total for r in asked] == [g.n_prompt for g in got]
    ids = encode(model.preparer, asked[0].messages).tensors['input_ids'][0].tolist()
    assert ids.count(model.preparer.bos_token_id) == 1
    seen = model.generate([request('x', user(pictures[:1], 'What?'))], 4)[0]
    assert seen.error.startswith('media: ') and 'without an image processor' in seen.error


def test_a_missing_chat_template_is_said(text_model, tmp_path):
    folder = shutil.copytree(text_model, tmp_path/'bare')
    (folder/'chat_template.jinja').unlink()
    with pytest.raises(ModelError, match='chat template'): load_model(str(folder))


@pytest.mark.parametrize('text', ['', 'openai:', 'openai:name@localhost:80', 'openai:name@host/v1'])
def test_model_strings_that_mean_nothing(text):
    with pytest.raises(ModelError): parse_spec(text)


def test_a_folder_that_is_not_there():
    with pytest.raises(ModelError, match='no hub id'): load_model('/no/such/folder')
    with pytest.raises(ModelError, match='no hub id'): load_model('no-such-folder')


def test_the_packaged_checkpoint_answers(pictures):
    model = load_model('tiny')
    assert model.name == 'tiny' and model.describe()['revision'] is None
    got = model.generate([request('a', user(pictures[:1], 'What is the weather?'))], 8)[0]
    assert got.error is None and got.n_visual > 0
    with pytest.raises(ModelError, match='there are: .*mmwalk'): load_model('tiny', tiny='nothing')


def test_the_protocol_is_light():
    code = 'import sys, vlm_repro.models.protocol; print([m for m in ("torch", "transformers", "pandas", "openai", "numpy") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
