"""Stream-VLM: films in pieces and in batches, weights by name and shape, what looks where, training sequences."""
import numpy as np
import pytest
import torch
import transformers as hf

from vlm_repro.fitcoach.actions import Actions, Rules, action_tokens, add_actions
from vlm_repro.fitcoach.cnn import FitnessCNN, film_features, narrow
from vlm_repro.fitcoach.cross_attention import Looking, add_looking, feature_tokens, steps_of
from vlm_repro.fitcoach.decode import plain_stream, stream_prompt
from vlm_repro.fitcoach.frames import frame_pixels, plan_steps
from vlm_repro.fitcoach.live import Coach, coach, paced
from vlm_repro.fitcoach.model import Eyes, WeightsError, load_stream_vlm, save_stream_vlm, stream_vlm
from vlm_repro.fitcoach.runahead import ModelReader, decode_streams
from vlm_repro.fitcoach.train_sequence import SequenceError, blind, lesson, lesson_batch, stream_loss
from vlm_repro.fitcoach.weights import add_lora, load_cnn, load_language, read_states
from vlm_repro.models.tiny import learn_tokenizer

torch.set_num_threads(1)
ACTS = Actions(100, 101, 102)


def llama(seed=0, layers=(0, 2), feature=6, **changed):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**{'vocab_size': 104, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'initializer_range': .3, **changed})
    return add_looking(hf.LlamaForCausalLM(config).eval(), Looking(layers, feature))


@pytest.fixture(scope='module')
def tokenizer():
    held = learn_tokenizer(['keep your back straight', 'lower your hips', 'nice work']*20, 300, r' ?\p{L}+|\d|\s', ('<s>', '<|endoftext|>', '<|im_end|>'), {}, 4096)
    add_actions(held)
    return held


def small(tokenizer, seed=2):
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=.4)
    return stream_vlm(config, tokenizer, Looking((0,), feature=16), Eyes(1/8, 16), seed)


# ---- films

@torch.inference_mode()
def test_two_films_in_one_batch_do_not_leak():
    torch.manual_seed(0)
    net, films = FitnessCNN(narrow(1/8), 16).eval(), torch.rand(2, 8, 3, 224, 160)
    first, state = net(films[:, :4])
    second, _ = net(films[:, 4:], state)
    for k in range(2):
        alone, _ = net(films[k:k + 1])
        assert (torch.cat([first, second], 1)[k] - alone[0]).abs().max() <= 1e-5*alone.max()
    again, _ = net(films[:1, :4])
    assert torch.equal(again, net(films[:1, :4])[0]), 'a network remembers nothing that is not handed to it'


def test_a_short_film_has_no_features():
    net = FitnessCNN(narrow(1/8), 16).eval()
    maps, state = film_features(net, torch.zeros(3, 3, 224, 160))
    assert maps.shape == (0, 16, 7, 5) and state is None


# ---- the language model

@pytest.mark.parametrize('family', [hf.MistralConfig, hf.Qwen2Config])
def test_other_models_built_like_llama_look_too(family):
    torch.manual_seed(0)
    config = family(vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.3)
    net = add_looking(hf.AutoModelForCausalLM.from_config(config).eval(), Looking((1,), 6))
    film, prompt, rules = torch.randn(20, 35, 6)*3, stream_prompt([1], ACTS), Rules(ACTS, 3)
    assert decode_streams(ModelReader(net, [film]), [prompt], [20], rules)[0].tokens == plain_stream(net, prompt, film, rules).tokens


def test_a_model_of_another_build_is_refused():
    with pytest.raises(ValueError, match='built like Llama'): add_looking(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)), Looking((0,)))


def test_only_tokens_that_look_are_changed_by_the_film_of_a_late_layer():
    net, ids, film = llama(layers=(2,)), torch.tensor([[1, 100, 5, 100, 6]]), torch.randn(1, 2, 35, 6)
    steps = steps_of(torch.tensor([[0, 2, 0, 2, 0]]), 2)
    with torch.inference_mode(): moved = (net(ids, vision=film, vision_steps=steps).logits - net(ids).logits).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, True, False, True, False]


def test_gradient_checkpointing_sees_the_film():
    net, ids, film = llama().train(), torch.tensor([[1, 100, 5, 100]]), torch.randn(1, 2, 35, 6)
    steps, grads = torch.tensor([[-1, 0, -1, 1]]), []
    for checkpointed in (False, True):
        if checkpointed: net.gradient_checkpointing_enable({'use_reentrant': False})
        net.zero_grad()
        net(ids, vision=film, vision_steps=steps, use_cache=False).logits.sum().backward()
        grads.append(net.model.layers[0].xattn_layer.attn_layers[0].out_fc.weight.grad.clone())
    assert grads[0].abs().sum() > 0 and torch.allclose(*grads, atol=1e-5)


# ---- weights

def test_a_model_is_what_was_saved(tokenizer, tmp_path):
    model = small(tokenizer)
    again = load_stream_vlm(save_stream_vlm(model, tmp_path))
    assert all(torch.equal(a, b) for m, n in ((model.net, again.net), (model.cnn, again.cnn)) for a, b in zip(m.state_dict().values(), n.state_dict().values()))
    assert again.prompt_ids('lower your') == model.prompt_ids('lower your') and again.actions == action_tokens(tokenizer)
    (tmp_path/'cnn.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no cnn.safetensors'): load_stream_vlm(tmp_path)


def test_tied_embeddings_are_saved_and_loaded(tokenizer, tmp_path):
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)
    model = stream_vlm(config, tokenizer, Looking((0,), feature=16), Eyes(1/8, 16))
    again, ids = load_stream_vlm(save_stream_vlm(model, tmp_path)), torch.tensor([[1, 4, 5]])
    assert torch.equal(again.net(ids).logits, model.net(ids).logits)


@pytest.mark.parametrize('prefix', ['module.0.', '0.', ''])
def test_the_released_names_of_the_cnn(prefix, tmp_path):
    net = FitnessCNN(narrow(1/8), 16)
    torch.save({prefix + n: t for n, t in net.state_dict().items()}, tmp_path/'x.checkpoint')
    assert load_cnn(FitnessCNN(narrow(1/8), 16), tmp_path/'x.checkpoint').used == 182
    torch.save({prefix + n.replace('cnn.5.', 'cnn.05.'): t for n, t in net.state_dict().items()}, tmp_path/'x.checkpoint')
    with pytest.raises(WeightsError, match='6 missing.*6 unknown'): load_cnn(FitnessCNN(narrow(1/8), 16), tmp_path/'x.checkpoint')


@pytest.mark.parametrize(('held', 'said'), [({'a': 1}, 'no tensors'), ([torch.zeros(1)], 'no tensors'), (b'\x80\x02junk', 'fetch it again')])
def test_files_that_are_no_checkpoints(held, said, tmp_path):
    if isinstance(held, bytes): (tmp_path/'x').write_bytes(held)
    else: torch.save(held, tmp_path/'x')
    with pytest.raises(WeightsError, match=said): read_states(tmp_path/'x')


def test_a_release_of_adapters_alone_goes_onto_its_base(tmp_path):
    wrapped = add_lora(llama(0), r=4)
    for n, p in wrapped.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.2)
    held = {'lang.' + n: t for n, t in wrapped.state_dict().items() if 'lora' in n or 'xattn' in n}
    torch.save(held, tmp_path/'x.pth.tar')
    again, report = load_language(llama(0), tmp_path/'x.pth.tar', base=False, r=4)
    ids, film, steps = torch.tensor([[1, 100]]), torch.randn(1, 1, 35, 6), torch.tensor([[-1, 0]])
    wrapped.eval()
    assert torch.allclose(again(ids, vision=film, vision_steps=steps).logits, wrapped(ids, vision=film, vision_steps=steps).logits, atol=1e-6) and report.left == ()


def test_decoding_through_lora_equals_the_plain_loop():
    wrapped = add_lora(llama(4), r=4).eval()
    for n, p in wrapped.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.5)
    film, prompt, rules = torch.randn(25, 35, 6)*3, stream_prompt([1, 9], ACTS), Rules(ACTS, 4)
    assert decode_streams(ModelReader(wrapped, [film]), [prompt], [25], rules)[0].tokens == plain_stream(wrapped, prompt, film, rules).tokens


# ---- training

def test_a_lesson_is_the_stream_that_decoding_reads(tokenizer):
    "The loss of a batch of clips, one of them shorter, is that of each alone; and a blind lesson does not see."
    net, clock = llama(), [.25*k for k in range(1, 9)]
    films = [torch.randn(8, 35, 6), torch.randn(5, 35, 6)]
    lessons = [lesson(stream_prompt([1, 5], ACTS), ['a b', 'c'], [.6, 1.2], clock[:len(f)], lambda text: [10 + ord(c) - 97 for c in text if c != ' '], ACTS) for f in films]
    with torch.inference_mode():
        alone = [stream_loss(net, lesson_batch([a], [f]), ACTS).item() for a, f in zip(lessons, films)]
        n = [sum(x != -100 for x in a.labels) for a in lessons]
        both = stream_loss(net, lesson_batch(lessons, films), ACTS).item()
        unseen = [stream_loss(net, lesson_batch([blind(lessons[0])], [f]), ACTS).item() for f in (films[0], films[0]*0)]
        quiet = stream_loss(net, lesson_batch(lessons, films), ACTS, silent=.1).item()
    assert both == pytest.approx((alone[0]*n[0] + alone[1]*n[1])/sum(n), rel=1e-5)
    assert unseen[0] == unseen[1] != alone[0] and quiet != both
    with pytest.raises(SequenceError, match='step 7 of a film of 5'): lesson_batch(lessons[:1], films[1:])


# ---- live

def test_a_film_frame_by_frame_says_what_the_whole_film_says(tokenizer):
    model, a = small(tokenizer), action_tokens(tokenizer)
    rng, times = np.random.default_rng(0), 1707460306 + np.arange(80)/22.4
    frames, rules, prompt, told = rng.integers(0, 256, (80, 64, 90, 3), dtype=np.uint8), Rules(a, 5), stream_prompt([5], a), []
    maps, _ = film_features(model.cnn, torch.stack([torch.from_numpy(frame_pixels(frames[i])) for i in plan_steps(times, 80).groups.flatten()]))
    film, said = feature_tokens(maps[None])[0], {}
    for seed in range(12):
        net = small(tokenizer, seed).net
        with torch.no_grad():
            net.lm_head.weight[a.vision] *= 3
            net.lm_head.weight[a.answer] = net.lm_head.weight[a.vision] + 3*net.lm_head.weight[a.answer]
        said[net] = plain_stream(net, prompt, torch.cat([film, film[:1]]), rules).tokens
    model.net = max(said, key=lambda net: len(set(said[net])))
    report = coach(model, zip(frames, times), prompt, rules, say=told.append)
    assert report.tokens == said[model.net] and a.answer in report.tokens and told
    assert report.steps == len(film) and told == report.feedbacks and 0 < report.real_time_factor < float('inf') and report.latency >= 0
    assert {s.at for s in told} <= set(plan_steps(times, 80).times)


def test_frames_come_when_their_time_has_come():
    import time
    begun = time.perf_counter()
    assert len(list(paced(((np.zeros((2, 2, 3), np.uint8), 100 + k/10) for k in range(4)), speed=2))) == 4
    assert time.perf_counter() - begun >= .15


def test_a_coach_without_frames_has_said_nothing(tokenizer):
    report = Coach(small(tokenizer), stream_prompt([5], action_tokens(tokenizer)), Rules(action_tokens(tokenizer))).report
    assert report.feedbacks == [] and report.real_time_factor == 0 and report.latency == 0
