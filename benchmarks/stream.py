"""Streams of feedback: `python benchmarks/stream.py [--out benchmarks/results/stream.json]`.

A tiny Llama with Stream-VLM's cross-attention, taught for a minute to speak one of 48 texts when its film shows the sign of that text, so that it is silent and speaks as the published data have it: a clip of 30 s is 130 steps with
five feedbacks of about twelve tokens, a workout of 3.5 minutes 860 steps with 35. Films and their signs are drawn anew for the comparison. One thread, greedy.
Compared:
  plain     one call of the model for every token, one film at a time, with the cache of `transformers`: the published loop
  ahead     run-ahead over silence, one film at a time
  drafts    run-ahead and drafts of known texts, one film at a time
  batch     the same with all films in one batch
Tokens must be equal, all of them, before anything is timed; `closest_race` is the smallest lead of the likeliest token over the second in any choice of the plain loop, to be read beside the rounding of float32. `silence` counts calls of films that
show nothing. `live` is a video file at the speed of time through `fitcoach.live`, with the 3-D CNN at an eighth of its width.

`--base` takes another Llama, taught in the same way: a folder of `transformers` or a GGUF file (row `stream_llama`). `--trained` takes a checkpoint as `save_stream_vlm` writes it, such as `vlm_repro/assets/tiny/fitcoach`, with the clips and
workouts of the drawn world with exercises of 30 s (row `stream_trained`). `--keep FOLDER` keeps what was taught, and the features of the world, for the next run. `--rounds 0` takes the seconds of the pass that compares the tokens, which saves another where
each takes minutes. `--device cuda` takes a GPU.
"""
import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, timed, versions

one_thread()

import torch  # noqa: E402  (threads are set before torch is imported)
from stream_models import CHANNELS, PLACES, TEXTS, Clip, Films, Speech, Teaching, loaded, taught, tiny, trained, world_clips, world_split  # noqa: E402

RATE = 4
STEPS, SIGNS, WORKOUT, WORKOUT_SIGNS = 130, 5, 860, 35


def ways_of(speech: Speech, clips: list[Clip]) -> dict[str, Any]:
    return {"plain": lambda: speech.plain(clips), "ahead": lambda: speech.ours(clips, False, 1), "drafts": lambda: speech.ours(clips, True, 1), "batch": lambda: speech.ours(clips, True, len(clips))}


def closest_race(speech: Speech, clips: list[Clip]) -> tuple[dict[str, Any], float]:
    """The plain loop, and the smallest lead of a first token over the second."""
    leads: list[float] = []

    def race(_: Any, __: Any, logits: torch.Tensor) -> None:
        first, second = logits[0, -1].float().topk(2).values.tolist()
        leads.append(first - second)

    hook = speech.net.get_output_embeddings().register_forward_hook(race)
    try: return speech.plain(clips), min(leads)
    finally: hook.remove()


def once(way: Any) -> tuple[Any, dict[str, float]]:
    """What a way gives, and its seconds."""
    seen: dict[str, float] = {}
    with timed(seen): got = way()
    print(f"first pass {seen['wall_s']:8.3f} s wall {seen['cpu_s']:8.3f} s CPU", flush=True)
    return got, seen


def compare(speech: Speech, clips: list[Clip], exact: bool) -> dict[str, Any]:
    """Every way once, the same tokens from all; calls of each."""
    (plain, closest), first = once(lambda: closest_race(speech, clips))
    held, times = {"plain": plain}, {"plain": first}
    for name in ("ahead", "drafts", "batch"):
        alone = name == "batch" and len(clips) == 1  # one film is a batch of one already
        held[name], times[name] = (held["drafts"], times["drafts"]) if alone else once(ways_of(speech, clips)[name])
    other = {name: sum(a != b for a, b in zip(seen["tokens"], plain["tokens"])) for name, seen in held.items()}
    require(not exact or not any(other.values()), f"films with other tokens than the plain loop's: {other}; the closest race was {closest:.1e}")
    acts, tokens = speech.rules.actions, [t for c, s in zip(clips, plain["tokens"]) for t in s[len(c.prompt.ids):]]
    said = tokens.count(acts.answer)
    return {"films": len(clips), "that_differ": other, "closest_race": closest, "steps": sum(len(c.film) for c in clips), "feedbacks": said, "text_tokens": len(tokens) - tokens.count(acts.vision) - 2*said,
            "calls": {name: seen["calls"] for name, seen in held.items()}, "first_pass": {name: {**times[name], "calls": held[name]["calls"], "load": os.getloadavg()[0]} for name in held}}


def talker(device: str) -> Any:
    """A tiny model with eyes at an eighth of their width; its weights are drawn at random and made to prefer the action tokens, so that it looks on and speaks."""
    import transformers as hf

    from vlm_repro.fitcoach.cross_attention import Looking
    from vlm_repro.fitcoach.model import Eyes, stream_vlm
    tokenizer = tiny("cpu")[1]
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, initializer_range=.2)
    model = stream_vlm(config, tokenizer, Looking((0, 1, 2), 64), Eyes(1/8, 64), 4)
    a, head = model.actions, model.net.lm_head.weight
    with torch.no_grad():
        head[a.vision] *= 3
        head[a.answer] = head[a.vision] + 3*head[a.answer]
    model.net.to(device), model.cnn.to(device)
    return model


def bouncing(path: Path, seconds: int) -> list[float]:
    """A video of 640 by 360 at 24 pictures a second; its clock."""
    import numpy as np

    from vlm_repro.core.video import write_clip
    ground, times = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1), np.arange(24*seconds)/24

    def picture(at: float) -> Any:
        out, top, left = ground.copy(), int(240*abs(np.sin(2*at))), int(260 + 100*np.sin(at))
        out[top:top + 120, left:left + 120] = (250, 120, 40)
        return out

    write_clip(path, (picture(at) for at in times), 24)
    return times.tolist()


def watched(model: Any, video: Path, clock: list[float], prompt: Any, rules: Any, drafts: Any = None, sideways: bool = False) -> dict[str, Any]:
    """A video file at the speed of time."""
    from vlm_repro.fitcoach.live import coach, paced, video_frames
    held = coach(model, paced(video_frames(video, clock)), prompt, rules, drafts, sideways)
    require(not held.error, held.error)
    return {"film_s": held.film_s, "work_s": held.work_s, "real_time_factor": held.real_time_factor, "cpu_factor": held.cpu_factor, "keeps_up": held.keeps_up, "late_s": held.late_s, "latest_s": held.latest_s, "steps": held.steps, "calls": held.calls,
            "feedbacks": len(held.feedbacks), "latency_s": held.latency, "median_latency_s": median(f.latency for f in held.feedbacks) if held.feedbacks else 0.}


def live_drawn(options: argparse.Namespace) -> dict[str, Any]:
    """A drawn video, and a model that says something."""
    from vlm_repro.fitcoach.actions import Rules
    from vlm_repro.fitcoach.decode import stream_prompt
    model = talker(options.device)
    with tempfile.TemporaryDirectory() as folder:
        clock = bouncing(Path(folder)/"film.mp4", 3 if options.quick else 20)
        return watched(model, Path(folder)/"film.mp4", clock, stream_prompt([0, 2], model.actions), Rules(model.actions, 16))


def of_world(options: argparse.Namespace) -> tuple[Speech, dict[str, list[Clip]], dict[str, Any]]:
    """A trained checkpoint, the clips and workouts of the drawn world, and how it coaches one of its videos at the speed of time."""
    from vlm_repro.fitcoach.actions import Rules
    from vlm_repro.fitcoach.annotations import sessions_in
    from vlm_repro.fitcoach.clock import read_clock
    from vlm_repro.fitcoach.data import label_file, load, split_folder
    from vlm_repro.fitcoach.decode import stream_prompt
    from vlm_repro.fitcoach.drafts import Drafts
    from vlm_repro.fitcoach.features import source_of
    from vlm_repro.fitcoach.model import load_stream_vlm
    from vlm_repro.fitcoach.prompt import render
    from vlm_repro.fitcoach.world import Size, default_world
    long = Size(test=4, train=0, short=0, seconds=(30.5, 32.))  # clips of 30 s
    small = Size(test=1, train=1, short=0, seconds=(4., 5.))
    model, root = load_stream_vlm(options.trained, device=options.device), default_world(size=small) if options.quick else default_world()
    films = root if options.quick else default_world(size=long)
    with tempfile.TemporaryDirectory() as folder:
        features = world_split(films, model, options.keep/"features" if options.keep else Path(folder))
        sets = {"clips": world_clips(model, films, features, "single_exercise")[:options.films], "workouts": world_clips(model, films, features, "full_workout")[:options.workouts]}
    speech, split = trained(model, root), split_folder(root, "test")
    source = source_of(next(iter(sessions_in(label_file(split, "test")))), split)
    text = render(load(root, "test", "full_workout").samples[0], split).messages[0]["content"][0]["text"]
    prompt = stream_prompt(model.prompt_ids(text), model.actions)
    seen = watched(model, source.video, read_clock(source.clock).tolist(), prompt, Rules(model.actions), Drafts(speech.known, model.actions.end), source.sideways)
    return speech, sets, {"base": options.trained.name, "live": seen}


def parsed() -> argparse.Namespace:
    parser = arguments("Time streams of feedback.", rounds=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", type=Path, help="another Llama: a folder, or a GGUF file")
    parser.add_argument("--trained", type=Path, help="folder of a trained checkpoint with its own eyes")
    parser.add_argument("--keep", type=Path, help="folder for what was taught")
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--workouts", type=int, default=2)
    parser.add_argument("--updates", type=int, default=220)
    return parser.parse_args()


def teaching_of(options: argparse.Namespace) -> Teaching:
    """How the model is taught: in fewer and shorter steps where it is large."""
    if options.quick: return Teaching(4, 48, 3, 4, 4e-3)
    return Teaching(options.updates, 56, 5, 1, 6e-4) if options.base else Teaching(options.updates, STEPS, SIGNS, 6, 4e-3)


def drawn(options: argparse.Namespace) -> tuple[Speech, dict[str, list[Clip]], dict[str, Any]]:
    """A model that was taught here, the films of each comparison, and how it was taught."""
    teaching, name = teaching_of(options), options.base.name if options.base else "tiny"
    speech, prompt, how = taught(*(loaded(options.base, options.device) if options.base else tiny(options.device)), teaching, options.device, options.keep, name)
    about = {"base": name, "taught": {"updates": teaching.updates, "steps": teaching.steps, "films": teaching.rows, **how}}
    films, n = Films(2), 3 if options.quick else options.films

    def clips(count: int, steps: int, signs: int) -> list[Clip]: return [Clip(films.film(steps, signs)[0], prompt) for _ in range(count)]

    return speech, {"clips": clips(n, STEPS, SIGNS), "silence": clips(1 if options.base else 2, STEPS, 0), "workouts": clips(1, STEPS, SIGNS) if options.quick else clips(options.workouts, WORKOUT, WORKOUT_SIGNS)}, about


def slim(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{way: {k: v for k, v in seen.items() if k != "tokens"} for way, seen in row.items()} for row in rounds]


def main() -> None:
    options, begun = parsed(), now()
    torch.set_num_threads(1)
    id = "stream_trained" if options.trained else "stream_llama" if options.base else "stream"
    speech, sets, about = of_world(options) if options.trained else drawn(options)
    equal = {name: compare(speech, clips, options.device == "cpu") for name, clips in sets.items()}
    clips, film_s = sets["clips"], equal["clips"]["steps"]/RATE
    rounds = slim(interleaved(ways_of(speech, clips), 1 if options.quick else options.rounds, "clips")) or [equal["clips"]["first_pass"]]
    calls, workouts = equal["clips"]["calls"], equal["workouts"]["calls"]
    figures = {"ahead_calls": calls["plain"]/calls["ahead"], "draft_calls": calls["plain"]/calls["drafts"], "workout_calls": workouts["plain"]/workouts["drafts"],
               "batch_cpu_s": least(rounds, "plain", "cpu_s")/least(rounds, "batch", "cpu_s"), "batch_wall_s": least(rounds, "plain")/least(rounds, "batch")}
    seen = {} if options.base else {"live": about.pop("live", None) or live_drawn(options)}
    if seen: figures |= {"live_factor": seen["live"]["real_time_factor"], "live_cpu_factor": seen["live"]["cpu_factor"], "live_late_s": seen["live"]["late_s"]}
    finish(id, options, begun, figures, lambda: hot_spots(lambda: speech.ours(clips, True, len(clips))), versions=versions("torch", "transformers"),
           sizes={"clip_steps": STEPS, "workout_steps": WORKOUT, "channels": CHANNELS, "places": PLACES, "texts": TEXTS, "parameters": sum(p.numel() for p in speech.net.parameters()), "device": options.device, **about},
           equal=equal, real_time_factor={name: least(rounds, name, "cpu_s")/film_s for name in rounds[0]}, rounds=rounds, **seen)


if __name__ == "__main__":
    main()
