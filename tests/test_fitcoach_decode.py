"""Streams of FitCoach: running ahead says what the plain loop says, whatever the model, the script, the batch and the drafts."""
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from vlm_repro.fitcoach.actions import Actions, NeverEnds, Rules, feedbacks, published_feedbacks
from vlm_repro.fitcoach.cross_attention import CrossAttention, CrossAttentionLayer, Looking, Shown, add_looking, looks_of
from vlm_repro.fitcoach.decode import plain_loop, plain_stream, stream_prompt
from vlm_repro.fitcoach.drafts import Drafts
from vlm_repro.fitcoach.runahead import PLAIN, Ahead, ModelReader, RowCache, Streams, decode_streams
from vlm_repro.fitcoach.workouts import decode_prompts, decode_windows, joined, next_prompt

torch.set_num_threads(1)
ACTS = Actions(100, 101, 102)


class Script:
    "A reader whose choice depends on the place of a token alone, as in the golden vectors; it checks what it is given."
    def __init__(self, scripts, prompts):
        self.scripts, self.first = list(scripts), [len(p.ids) - 1 for p in prompts]
        self.held, self.calls = [[] for _ in prompts], 0

    def begin(self, tokens):
        self.calls += 1
        for held in self.held: held += [(t, -1) for t in tokens]

    def read(self, pieces):
        self.calls += 1
        out = []
        for r, p in enumerate(pieces):
            assert len(p.tokens) == len(p.steps) and p.asked <= len(p.tokens)
            assert [s >= 0 for s in p.steps] == [t == ACTS.vision and (len(self.held[r]) + i >= self.first[r]) for i, t in enumerate(p.tokens)]
            self.held[r] += list(zip(p.tokens, p.steps))
            looked = [s for _, s in self.held[r] if s >= 0]
            assert looked == list(range(len(looked)))
            places = range(len(self.held[r]) - p.asked, len(self.held[r]))
            out.append([self.scripts[r][i - self.first[r]] if i - self.first[r] < len(self.scripts[r]) else ACTS.vision for i in places])
        return out

    def back(self, row, length): del self.held[row][length:]

    def keep(self, rows): self.scripts, self.first, self.held = ([held[r] for r in rows] for held in (self.scripts, self.first, self.held))


def plain_of(script, prompt, n_steps, rules):
    choices = iter(script)
    return plain_loop(lambda new, steps: next(choices, ACTS.vision), prompt, n_steps, rules)


def drawn(rng, n_words=4):
    "A script with silence, feedbacks and slips."
    out = []
    while len(out) < 60:
        out += [100]*rng.randint(0, 12) + [rng.choice([2, 7, 100, 102])]*rng.randint(0, 1) + [101] + [rng.randint(10, 10 + n_words) for _ in range(rng.randint(0, 7))] + [rng.choice([102, 102, 100, 101])]
    return out


@pytest.mark.parametrize('seed', range(12))
def test_a_batch_of_scripts_equals_the_plain_loop(seed):
    rng = random.Random(seed)
    scripts, steps = [drawn(rng) for _ in range(5)], [rng.choice([0, 1, 2, 17, 40, 90]) for _ in range(5)]
    prompts = [stream_prompt([1, *(rng.randint(10, 40) for _ in range(rng.randint(0, 5)))], ACTS) for _ in range(5)]
    rules = Rules(ACTS, max_feedback_length=rng.choice([1, 3, 128]))
    rules = rules.published() if seed % 3 == 0 else rules
    plain = [plain_of(s, p, n, rules).tokens for s, p, n in zip(scripts, prompts, steps)]
    known = [[rng.randint(10, 14) for _ in range(rng.randint(1, 6))] for _ in range(20)]
    for ahead in (PLAIN, Ahead(), Ahead(1, 1, 3), Ahead(shared=8)):
        for drafts in (None, Drafts(known, ACTS.end)):
            assert [s.tokens for s in decode_streams(Script(scripts, prompts), prompts, steps, rules, ahead, drafts)] == plain


def test_silence_takes_few_calls_and_plain_ahead_takes_all():
    prompt, rules = stream_prompt([1], ACTS), Rules(ACTS)
    ours, plain = (decode_streams(Script([[]], [prompt]), [prompt], [130], rules, ahead)[0] for ahead in (Ahead(), PLAIN))
    assert plain.calls == 129 and ours.calls <= 5 and ours.tokens == plain.tokens


def test_a_feedback_that_is_known_takes_one_call():
    prompt, rules, text = stream_prompt([1], ACTS), Rules(ACTS), [10, 11, 12, 13, 14, 15, 16, 17]
    script = [100]*20 + [101, *text, 102] + [100]*20 + [101, *text, 102] + [100]*20
    unknown, known, learnt = (decode_streams(Script([script], [prompt]), [prompt], [60], rules, drafts=d)[0].calls for d in (None, Drafts([text], ACTS.end), Drafts(end=ACTS.end)))
    assert known <= unknown - 2*len(text) and known < learnt < unknown


def test_published_rules_do_not_end_a_feedback_and_say_so():
    prompt = stream_prompt([1], ACTS)
    with pytest.raises(NeverEnds, match='no end'): decode_streams(Script([[101] + [10]*5000], [prompt]), [prompt], [9], Rules(ACTS).published())
    with pytest.raises(NeverEnds, match='at one step'): decode_streams(Script([[101, 102]*5000], [prompt]), [prompt], [9], Rules(ACTS).published())
    assert decode_streams(Script([[101, 102]*5000], [prompt]), [prompt], [3], Rules(ACTS, most=2))[0].tokens == (1, 100, 101, 102, 101, 102, 100, 100)
    counted = decode_streams(Script([[101] + [10]*5000], [prompt]), [prompt], [9], Rules(ACTS, 5))[0]
    assert counted.tokens[2:9] == (101, 10, 10, 10, 10, 10, 102)
    stopped = decode_streams(Script([[101, 10, 2, 10]], [prompt]), [prompt], [9], Rules(ACTS, stops=(2,)))[0]
    assert stopped.tokens[2:5] == (101, 10, 102)


def speaker(seed, attention='sdpa'):
    "A model with random weights that looks and, now and then, speaks."
    torch.manual_seed(seed)
    config = hf.LlamaConfig(vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=.3, attn_implementation=attention)
    net = add_looking(hf.LlamaForCausalLM(config).eval(), Looking((0, 2), feature=6))
    return net


@pytest.mark.parametrize(('seed', 'attention'), [(0, 'sdpa'), (1, 'sdpa'), (2, 'eager')])
def test_a_batch_of_films_equals_the_plain_loop(seed, attention):
    net, rules, g = speaker(seed, attention), Rules(ACTS, max_feedback_length=6), torch.Generator().manual_seed(seed)
    with torch.no_grad(): net.lm_head.weight[101] = net.lm_head.weight[100] + .5*net.lm_head.weight[101]
    films = [torch.randn(n, 35, 6, generator=g)*3 for n in (50, 1, 33, 60)]
    prompts = [stream_prompt(ids, ACTS) for ids in ([1, 7], [1], [1, 100, 8, 101, 9, 102, 100], [1, 5, 5, 5])]
    plain = [plain_stream(net, p, f, rules).tokens for p, f in zip(prompts, films)]
    assert 101 in plain[0] + plain[2] + plain[3]
    for drafts in (None, Drafts(end=ACTS.end)):
        assert [s.tokens for s in decode_streams(ModelReader(net, films), prompts, [len(f) for f in films], rules, drafts=drafts)] == plain


def test_steps_that_come_one_by_one_give_the_same_stream():
    net, rules = speaker(3), Rules(ACTS, max_feedback_length=4)
    with torch.no_grad(): net.lm_head.weight[101] = net.lm_head.weight[100] + .5*net.lm_head.weight[101]
    films, prompts = torch.randn(2, 30, 35, 6)*3, [stream_prompt(ids, ACTS) for ids in ([1, 7], [1, 4, 4])]
    reader = ModelReader(net, [torch.zeros(0, 35, 6)]*2)
    streams = Streams(reader, prompts, rules)
    for k in range(29):
        reader.add(films[:, k:k + 1])
        for row in streams.rows: row.available += 1
        streams.advance()
    assert [tuple(r.tokens) for r in streams.rows] == [plain_stream(net, p, f, rules).tokens for p, f in zip(prompts, films)]


def test_the_way_of_attention_does_not_matter_and_stays_as_it_was():
    net, prompt, film, rules = speaker(0), stream_prompt([1, 7], ACTS), torch.randn(9, 35, 6)*3, Rules(ACTS, 4)
    plain = plain_stream(net, prompt, film, rules).tokens
    net.config._attn_implementation = 'flash_attention_2'
    assert decode_streams(ModelReader(net, [film]), [prompt], [9], rules)[0].tokens == plain
    assert net.config._attn_implementation == 'flash_attention_2'


def test_what_prompts_begin_with_is_read_once():
    net, rules, same = speaker(4), Rules(ACTS, 5), [1, *range(20, 40)]
    with torch.no_grad(): net.lm_head.weight[101] = net.lm_head.weight[100] + .5*net.lm_head.weight[101]
    films, prompts = [torch.randn(n, 35, 6)*3 for n in (30, 12, 1)], [stream_prompt([*same, *rest], ACTS) for rest in ([7, 8], [9], [])]
    counts = []
    class Counted(ModelReader):
        def read(self, pieces):
            counts.append([len(p.tokens) for p in pieces])
            return super().read(pieces)
    ours = decode_streams(Counted(net, films), prompts, [len(f) for f in films], rules)
    assert [s.tokens for s in ours] == [plain_stream(net, p, f, rules).tokens for p, f in zip(prompts, films)]
    assert counts[0] == [len(same)] and max(counts[1]) < len(same)


def test_old_looks_follow_the_published_mask_on_request():
    ids = [1, 100, 7, 100]
    assert stream_prompt(ids, ACTS).steps == (-1, -1, -1, 0)
    assert stream_prompt(ids, ACTS, old_look=True).steps == (-1, 0, -1, 0)
    assert stream_prompt([1, 100, 7], ACTS, old_look=True).ids == (1, 100, 7)


def test_two_clocks():
    stream = [1, 100, 100, 100, 101, 10, 102, 100, 101, 102, 100, 101, 11, 102, 100, 101, 12]
    times = [.25*k for k in range(1, 9)]
    assert feedbacks(stream, ACTS, lambda ids: ' '.join(map(str, ids)), times) == [(.75, '10'), (1.25, '11')]
    assert published_feedbacks(stream, ACTS, lambda ids: ' '.join(map(str, ids)))[0] == ['10', '11']
    assert feedbacks([1, 100, 101, 9, 102, *stream[1:]], ACTS, lambda ids: ' '.join(map(str, ids)), times, shown=2)[0] == (.75, '10')


# ---- close races, odd batches

def leads(net, prompt, film, rules):
    "The plain stream, and by how much each choice was won."
    held = []
    hook = net.lm_head.register_forward_hook(lambda _, __, logits: held.append(logits[0, -1].topk(2).values.diff().abs().item()))
    try: return plain_stream(net, prompt, film, rules).tokens, held
    finally: hook.remove()


@pytest.mark.parametrize('seed', [0, 2, 4])
def test_close_races_end_as_in_the_plain_loop(seed):
    "Action tokens and words that differ by hundredths: choices are won by far less than usual, and never by rounding."
    net, rules, g = speaker(seed), Rules(ACTS, max_feedback_length=5), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head = net.lm_head.weight
        head[:97] *= .1
        head[97:104] = head[100] + .02*torch.randn(7, head.shape[1], generator=g)
    films, prompts = [torch.randn(n, 35, 6, generator=g)*3 for n in (40, 23, 31)], [stream_prompt(ids, ACTS) for ids in ([1, 7], [1], [2, 3])]
    plain, races = zip(*(leads(net, p, f, rules) for p, f in zip(prompts, films)))
    closest = min(min(r) for r in races)
    assert 1e-5 < closest < .01 and any(ACTS.answer in tokens for tokens in plain)
    for ahead in (Ahead(), Ahead(1, 1, 2), Ahead(shared=6, each=1)):
        for drafts in (None, Drafts([[11, 12, 13]]*3 + [[20]], ACTS.end)):
            assert [s.tokens for s in decode_streams(ModelReader(net, films), prompts, [len(f) for f in films], rules, ahead, drafts)] == list(plain)


def test_films_without_steps_are_their_prompts_and_do_not_disturb_others():
    net, rules = speaker(5), Rules(ACTS, 4)
    with torch.no_grad(): net.lm_head.weight[101] = net.lm_head.weight[100] + .5*net.lm_head.weight[101]
    films = [torch.randn(n, 35, 6)*3 for n in (0, 31, 1, 0, 2, 12)]
    prompts = [stream_prompt([1, 7 + k], ACTS) for k in range(6)]
    ours = decode_prompts(SimpleNamespace(net=net), prompts, films, rules, batch_size=3)
    assert [s.tokens for s in ours] == [plain_stream(net, p, f, rules).tokens for p, f in zip(prompts, films)]
    assert ours[0].tokens == prompts[0].ids and ours[0].calls == 0
    assert decode_prompts(SimpleNamespace(net=net), prompts[:1], films[:1], rules)[0].tokens == prompts[0].ids


class Widths(Script):
    "A script that notes how much it is given."
    def read(self, pieces):
        self.log = [*getattr(self, 'log', []), [len(p.tokens) for p in pieces]]
        return super().read(pieces)


def test_no_row_guesses_more_than_its_share():
    prompt, rules, known = stream_prompt([1], ACTS), Rules(ACTS), Drafts([list(range(10, 35))]*3, ACTS.end)
    reader = Widths([[100]*5 + [101, *range(10, 35), 102]] * 6, [prompt] * 6)
    ours = decode_streams(reader, [prompt] * 6, [60] * 6, rules, Ahead(shared=48), known)
    assert max(map(max, reader.log[1:])) == 1 + 48//6 and {len(s.tokens) for s in ours} == {2 + 59 + 27}
    alone = Widths([[100]*5 + [101, *range(10, 35), 102]], [prompt])
    decode_streams(alone, [prompt], [60], rules, drafts=known)
    assert max(max(w) for w in alone.log) > 30


@pytest.mark.parametrize('seed', range(4))
def test_wrong_drafts_cost_no_call_and_change_no_token(seed):
    rng, rules = random.Random(seed), Rules(ACTS, max_feedback_length=6)
    script, prompt = drawn(rng), stream_prompt([1], ACTS)
    lies = Drafts([[rng.randint(50, 90) for _ in range(8)] for _ in range(20)], ACTS.end)
    lies.learn = lambda *_: None
    plain, lied = (decode_streams(Script([script], [prompt]), [prompt], [50], rules, drafts=d)[0] for d in (None, lies))
    assert lied.tokens == plain.tokens == plain_of(script, prompt, 50, rules).tokens and lied.calls <= plain.calls


def test_a_draft_longer_than_a_feedback_may_be_is_cut_by_the_count():
    prompt, text = stream_prompt([1], ACTS), list(range(10, 30))
    script = [100, 101, *text, 102] + [100]*20
    for most in (1, 3, 20, 128):
        rules = Rules(ACTS, max_feedback_length=most)
        ours = decode_streams(Script([script], [prompt]), [prompt], [12], rules, drafts=Drafts([text]*2, ACTS.end))[0].tokens
        assert ours == plain_of(script, prompt, 12, rules).tokens
        assert ours[ours.index(101):][:min(most, 20) + 2] == (101, *text[:most], 102)


def test_drafts_count_texts_that_are_given_again():
    again, once = Drafts([[1, 2], [1, 3], [1, 3]], 9), Drafts([[1, 2], [1, 3]], 9)
    assert again.guess([]) == [1, 3, 9] and once.guess([]) == [1, 2, 9]
    once.learn([1, 3])
    assert once.begun == again.begun and once.follows == again.follows


@pytest.mark.parametrize('published', [False, True])
def test_windows_equal_the_plain_loop_window_by_window(published):
    net, rules = speaker(7), Rules(ACTS, 4)
    with torch.no_grad(): net.lm_head.weight[101] = net.lm_head.weight[100] + .5*net.lm_head.weight[101]
    model = SimpleNamespace(net=net, actions=ACTS, prompt_ids=lambda text: [1, len(text)])
    videos = [[torch.randn(n, 35, 6)*3 for n in lengths] for lengths in ((20, 20, 7), (12,), (20, 1))]
    ours = decode_windows(model, ['abc', 'ab', 'a'], videos, rules, published, drafts=Drafts(end=ACTS.end))
    for text, windows, held in zip(('abc', 'ab', 'a'), videos, ours):
        before = None
        for film, stream in zip(windows, held):
            prompt = next_prompt(model, [1, len(text)], before, published)
            before = plain_stream(net, prompt, film, rules)
            assert stream.tokens == before.tokens and stream.n_prompt == len(prompt.ids)
    assert len(joined(ours[0])) == len(ours[0][0].tokens) + sum(len(s.tokens) - s.n_prompt for s in ours[0][1:])


# ---- the cache, the looks

def test_a_cache_of_rows_holds_what_was_written_where_it_belongs():
    rng, cache, held = random.Random(0), RowCache(3), [[], [], []]
    for k in range(40):
        new = [rng.randint(0, 9) for _ in held]
        new[0] += not any(new)
        at = cache.place(new, torch.device('cpu'))[0]
        keys = torch.randn(1, 2, sum(new), 4)
        seen, values = cache.update(keys, keys + 1, 0)
        for row, n in enumerate(new):
            first = sum(new[:row])
            assert not n or at[first] == len(held[row])
            held[row] += [keys[0, :, first + k] for k in range(n)]
            cache.lengths[row] = len(held[row])
            if n: assert torch.equal(seen[row, :, :len(held[row])], torch.stack(held[row], 1)) and torch.equal(values[row, :, :len(held[row])], torch.stack(held[row], 1) + 1)
            if held[row] and rng.random() < .5:
                del held[row][rng.randint(0, len(held[row])):]
                cache.lengths[row] = len(held[row])
        if k == 25: held = [held[0], held[2]]; cache.keep([0, 2])
    assert cache.get_seq_length() == max(map(len, held)) and len(held) == 2


@pytest.mark.parametrize('heads', [1, 3])
def test_mixing_first_is_what_is_written(heads):
    torch.manual_seed(heads)
    layer, text, films = CrossAttentionLayer(10, 6, 12, heads), torch.randn(2, 7, 10), torch.randn(2, 9, 35, 6)
    steps = torch.randint(-1, 9, (2, 7))
    found = [(7*r + c, 9*r + s) for r, row in enumerate(steps.tolist()) for c, s in enumerate(row) if s >= 0]
    with torch.inference_mode():
        written, short = layer.train()(text, films, steps), layer.eval()(text, films, steps)
        for most in (0, 1 << 30): assert torch.allclose(layer(text, looks_of(Shown(films.flatten(0, 1), most), found)), written, atol=1e-6)
        assert torch.allclose(short, written, atol=1e-6) and (written[steps < 0] == 0).all() and (written[steps >= 0] != 0).any()


def test_layers_that_something_wraps_are_called():
    attention, called = CrossAttention(8, 4, 8).eval(), []
    class Wrapped(torch.nn.Module):
        def __init__(self, inner): super().__init__(); self.inner, self.weight, self.out_features = inner, inner.weight, inner.out_features
        def forward(self, x): called.append(x.shape); return self.inner(x)*2
    token, places = torch.randn(3, 8), torch.randn(3, 35, 4)
    with torch.inference_mode():
        before = attention(token, places)
        attention.feat_attn_keys_fc = Wrapped(attention.feat_attn_keys_fc)
        assert not attention.short and not torch.allclose(attention(token, places), before, atol=1e-3) and called
