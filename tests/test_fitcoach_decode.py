"""Streams of FitCoach: running ahead says what the plain loop says, whatever the model, the script, the batch and the drafts."""
import random

import pytest
import torch
import transformers as hf

from vlm_repro.fitcoach.actions import Actions, NeverEnds, Rules, feedbacks, published_feedbacks
from vlm_repro.fitcoach.cross_attention import Looking, add_looking
from vlm_repro.fitcoach.decode import plain_loop, plain_stream, stream_prompt
from vlm_repro.fitcoach.drafts import Drafts
from vlm_repro.fitcoach.runahead import PLAIN, Ahead, ModelReader, Streams, decode_streams

torch.set_num_threads(1)
ACTS = Actions(100, 101, 102)


class Script:
    "A reader whose choice depends on the place of a token alone, as in the golden vectors; it checks what it is given."
    def __init__(self, scripts, prompts):
        self.scripts, self.first = list(scripts), [len(p.ids) - 1 for p in prompts]
        self.held, self.calls = [[] for _ in prompts], 0

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


def test_attention_without_masks_is_refused():
    net = speaker(0)
    net.config._attn_implementation = 'flash_attention_2'
    with pytest.raises(ValueError, match='sdpa'): ModelReader(net, [torch.zeros(1, 35, 6)])


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
