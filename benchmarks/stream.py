"""Streams of feedback: `python benchmarks/stream.py [--out benchmarks/results/stream.json]`.

A tiny Llama with Stream-VLM's cross-attention, taught for a minute to speak one of 48 texts when its film shows the sign of that text, so that it is silent and speaks as the published data have it: a clip of 30 s is 130 steps with
five feedbacks of about twelve tokens, a workout of 3.5 minutes 860 steps with 35. Films and their signs are drawn anew for the comparison. One thread, greedy.
Compared:
  plain     one call of the model for every token, one film at a time, with the cache of `transformers`: the published loop
  ahead     run-ahead over silence, one film at a time
  drafts    run-ahead and drafts of known texts, one film at a time
  batch     the same with all films in one batch
Tokens must be equal, all of them, before anything is timed. `silence` counts calls of films that show nothing. `live` is a film of 8 s with the 3-D CNN at an eighth of its width, frame by frame through `fitcoach.live`.

`--base FOLDER` takes another Llama of `transformers` instead of the tiny one (any size; it is given action tokens and cross-attention and taught in the same way), `--device cuda` a GPU.
"""
import argparse
import time
from pathlib import Path
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

import torch  # noqa: E402  (threads are set before torch is imported)

CHANNELS, PLACES, TEXTS, RATE = 32, 35, 48, 4
STEPS, SIGNS, WORKOUT = 130, 5, 860
WORDS = "keep lower lift your the hips knees back arms chest elbows straight bent slow fast and now more little deeper higher breathe hold steady good work nice push through heel toes core tight shoulders down up side".split()
OPENINGS = ("keep your", "lower your", "lift the", "good work and", "now push", "nice")


def texts_of(rng: Any) -> list[str]:
    """Feedbacks of about twelve words; eight begin alike."""
    return [" ".join([OPENINGS[k % len(OPENINGS)], *rng.choices(WORDS, k=rng.randint(8, 11))]) for k in range(TEXTS)]


def tiny(device: str) -> tuple[Any, Any]:
    """A Llama of three layers, and a tokenizer with one token a word."""
    import tokenizers
    import transformers as hf
    from tokenizers import models, pre_tokenizers

    from vlm_repro.fitcoach.actions import add_actions
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<unk>", "coach", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    add_actions(tokenizer)
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=4096)
    return hf.LlamaForCausalLM(config).to(device), tokenizer


def loaded(base: Path, device: str) -> tuple[Any, Any]:
    """Another Llama, with the action tokens."""
    import transformers as hf

    from vlm_repro.fitcoach.actions import add_actions
    from vlm_repro.fitcoach.model import fit_embeddings
    tokenizer, net = hf.AutoTokenizer.from_pretrained(base), hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_actions(tokenizer)
    fit_embeddings(net, tokenizer)
    return net.to(device), tokenizer


class Films:
    """Films whose steps show the sign of a text, or nothing."""
    def __init__(self, seed: int):
        import random
        self.texts = texts_of(random.Random(7))
        self.signs = torch.nn.functional.normalize(torch.randn(TEXTS, CHANNELS, generator=torch.Generator().manual_seed(7)), dim=1)*3
        self.rng, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)

    def film(self, steps: int, signs: int) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """A film, and what is to be said at which step."""
        film = torch.randn(steps, PLACES, CHANNELS, generator=self.noise)*.3
        at = sorted(self.rng.sample(range(2, steps - 2), signs))
        which = [min(int(self.rng.expovariate(4/TEXTS)), TEXTS - 1) for _ in at]  # some texts are said far more often
        for step, k in zip(at, which): film[step] += self.signs[k]
        return film, [(step, self.texts[k]) for step, k in zip(at, which)]


class Speech:
    """A model, what it reads, and how it is asked."""
    def __init__(self, net: Any, tokenizer: Any, device: str):
        from vlm_repro.fitcoach.actions import Rules, action_tokens
        from vlm_repro.fitcoach.cross_attention import Looking, add_looking
        from vlm_repro.fitcoach.decode import stream_prompt
        layers = len(net.model.layers)
        self.net, self.tokenizer, self.device = add_looking(net, Looking(tuple(range(0, layers, max(1, layers//9))), CHANNELS)), tokenizer, device
        self.acts = action_tokens(tokenizer)
        self.rules, self.prompt = Rules(self.acts, 32), stream_prompt([tokenizer.bos_token_id or 0, *self.ids("coach")], self.acts)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def teach(self, updates: int, steps: int, signs: int, rows: int, rate: float) -> float:
        """Teaches it to say the texts of the signs; the last losses."""
        from vlm_repro.fitcoach.train_sequence import lesson, lesson_batch, stream_loss
        films, losses = Films(1), []
        learner = torch.optim.AdamW(self.net.parameters(), rate, betas=(.9, .95))
        plan = torch.optim.lr_scheduler.OneCycleLR(learner, rate, total_steps=updates, pct_start=.1)
        self.net.train()
        for _ in range(updates):
            drawn = [films.film(steps, signs) for _ in range(rows)]
            lessons = [lesson(self.prompt, [t for _, t in said], [float(k) for k, _ in said], [float(k) for k in range(steps)], self.ids, self.acts) for _, said in drawn]
            batch = {k: v.to(self.device) for k, v in lesson_batch(lessons, [film for film, _ in drawn]).items()}
            loss = stream_loss(self.net, batch, self.acts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
            learner.step()
            plan.step()
            learner.zero_grad()
            losses.append(loss.item())
        self.net.eval()
        return sum(losses[-5:])/len(losses[-5:])

    def known(self) -> Any:
        """Drafts of all texts, as often as they are said."""
        from vlm_repro.fitcoach.drafts import Drafts
        return Drafts([self.ids(t) for k, t in enumerate(Films(1).texts) for _ in range(1 + (TEXTS - k)//8)], self.acts.end)

    def plain(self, films: list[torch.Tensor]) -> dict[str, Any]:
        """The published loop, film by film."""
        from vlm_repro.fitcoach.decode import plain_stream
        return self.summed([plain_stream(self.net, self.prompt, f, self.rules) for f in films])

    def ours(self, films: list[torch.Tensor], drafts: bool, rows: int) -> dict[str, Any]:
        """Running ahead, some films at a time."""
        from vlm_repro.fitcoach.runahead import ModelReader, decode_streams
        known, out, calls = self.known() if drafts else None, [], 0
        for part in (films[i:i + rows] for i in range(0, len(films), rows)):
            held = decode_streams(ModelReader(self.net, part), [self.prompt]*len(part), [len(f) for f in part], self.rules, drafts=known)
            out, calls = out + held, calls + held[0].calls
        return {**self.summed(out), "calls": calls}

    def summed(self, held: list[Any]) -> dict[str, Any]:
        return {"tokens": [s.tokens for s in held], "calls": sum(s.calls for s in held)}


def ways_of(speech: Speech, films: list[torch.Tensor]) -> dict[str, Any]:
    return {"plain": lambda: speech.plain(films), "ahead": lambda: speech.ours(films, False, 1), "drafts": lambda: speech.ours(films, True, 1), "batch": lambda: speech.ours(films, True, len(films))}


def compare(speech: Speech, films: list[torch.Tensor], exact: bool) -> dict[str, Any]:
    """Every way once, the same tokens from all; calls of each."""
    held = {name: way() for name, way in ways_of(speech, films).items()}
    other = {name: sum(a != b for a, b in zip(seen["tokens"], held["plain"]["tokens"])) for name, seen in held.items()}
    require(not exact or not any(other.values()), f"films with other tokens than the plain loop's: {other}")
    tokens = [t for s in held["plain"]["tokens"] for t in s]
    said = tokens.count(speech.acts.answer)
    return {"films": len(films), "that_differ": other, "steps": sum(map(len, films)), "feedbacks": said, "text_tokens": len(tokens) - tokens.count(speech.acts.vision) - 2*said - (len(speech.prompt.ids) - 1)*len(films),
            "calls": {name: seen["calls"] for name, seen in held.items()}}


def live(seconds: int) -> dict[str, float]:
    """A film through the CNN at an eighth of its width and a tiny model, as fast as it goes."""
    import numpy as np
    import transformers as hf

    from vlm_repro.fitcoach.actions import Rules
    from vlm_repro.fitcoach.cross_attention import Looking
    from vlm_repro.fitcoach.decode import stream_prompt
    from vlm_repro.fitcoach.live import coach
    from vlm_repro.fitcoach.model import Eyes, stream_vlm
    tokenizer = tiny("cpu")[1]
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
    model = stream_vlm(config, tokenizer, Looking((0, 1, 2), 64), Eyes(1/8, 64))
    frames = np.random.default_rng(0).integers(0, 256, (24, 360, 640, 3), dtype=np.uint8)
    cpu = time.process_time()
    held = coach(model, ((frames[k % 24], k/24) for k in range(24*seconds)), stream_prompt([0, 2], model.actions), Rules(model.actions, 16))
    return {"film_s": held.film_s, "work_s": held.work_s, "real_time_factor": held.real_time_factor, "cpu_factor": (time.process_time() - cpu)/held.film_s, "steps": held.steps, "calls": held.calls, "feedbacks": len(held.feedbacks), "latency_s": held.latency}


def parsed() -> argparse.Namespace:
    parser = arguments("Time streams of feedback.", rounds=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", type=Path, help="folder of another Llama")
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--workouts", type=int, default=2)
    parser.add_argument("--updates", type=int, default=220)
    return parser.parse_args()


def slim(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{way: {k: v for k, v in seen.items() if k != "tokens"} for way, seen in row.items()} for row in rounds]


def main() -> None:
    options, begun = parsed(), now()
    torch.set_num_threads(1)
    n, updates = (3, 4) if options.quick else (options.films, options.updates)
    speech = Speech(*(loaded(options.base, options.device) if options.base else tiny(options.device)), options.device)
    start = time.perf_counter()
    loss = speech.teach(updates, 48 if options.quick else STEPS, 3 if options.quick else SIGNS, 4 if options.quick else 6, 3e-4 if options.base else 4e-3)
    taught = {"updates": updates, "loss": loss, "seconds": time.perf_counter() - start}
    drawn, exact = Films(2), options.device == "cpu"
    films = [drawn.film(STEPS, SIGNS)[0] for _ in range(n)]
    clips = compare(speech, films, exact)
    silence = compare(speech, [drawn.film(STEPS, 0)[0] for _ in range(2)], exact)
    workouts = compare(speech, [drawn.film(WORKOUT, 35)[0] for _ in range(1 if options.quick else options.workouts)], exact) if not options.quick else clips
    rounds = slim(interleaved(ways_of(speech, films), 1 if options.quick else options.rounds, "clips"))
    seen, film_s = live(2 if options.quick else 8), n*STEPS/RATE
    calls = clips["calls"]
    figures = {"ahead_calls": calls["plain"]/calls["ahead"], "draft_calls": calls["plain"]/calls["drafts"], "workout_calls": workouts["calls"]["plain"]/workouts["calls"]["drafts"],
               "batch_cpu_s": least(rounds, "plain", "cpu_s")/least(rounds, "batch", "cpu_s"), "batch_wall_s": least(rounds, "plain")/least(rounds, "batch"), "live_factor": seen["real_time_factor"]}
    finish("stream", options, begun, figures, lambda: hot_spots(lambda: speech.ours(films, True, n)), versions=versions("torch", "transformers"),
           sizes={"clip_steps": STEPS, "workout_steps": WORKOUT, "channels": CHANNELS, "places": PLACES, "texts": TEXTS, "parameters": sum(p.numel() for p in speech.net.parameters()), "device": options.device,
                  "base": options.base.name if options.base else "tiny"},
           taught=taught, equal={"clips": clips, "silence": silence, "workouts": workouts}, live=seen,
           real_time_factor={name: least(rounds, name, "cpu_s")/film_s for name in rounds[0]}, rounds=rounds)


if __name__ == "__main__":
    main()
