"""Who coaches in `stream.py`: a tiny Llama, another Llama of `transformers` or llama.cpp, both taught here, or a trained checkpoint with the clips of the drawn world."""
import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

CHANNELS, PLACES, TEXTS = 32, 35, 48
WORDS = "keep lower lift your the hips knees back arms chest elbows straight bent slow fast and now more little deeper higher breathe hold steady good work nice push through heel toes core tight shoulders down up side".split()
OPENINGS = ("keep your", "lower your", "lift the", "good work and", "now push", "nice")


def texts_of(rng: random.Random) -> list[str]:
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
    """Another Llama, a folder of `transformers` or a file of llama.cpp, with the action tokens."""
    import transformers as hf

    from vlm_repro.fitcoach.actions import add_actions
    from vlm_repro.fitcoach.model import fit_embeddings
    where = (base.parent, {"gguf_file": base.name}) if base.suffix == ".gguf" else (base, {})
    tokenizer, net = hf.AutoTokenizer.from_pretrained(where[0], **where[1]), hf.AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    add_actions(tokenizer)
    torch.manual_seed(0)
    fit_embeddings(net, tokenizer)
    return net.to(device), tokenizer


class Films:
    """Films whose steps show the sign of a text, or nothing."""
    def __init__(self, seed: int):
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


@dataclass(frozen=True)
class Clip:
    """A film, and what stands before its stream."""
    film: torch.Tensor
    prompt: Any


@dataclass
class Speech:
    """A model with cross-attention, and how it is asked."""
    net: Any
    rules: Any
    encode: Callable[[str], list[int]]
    known: list[list[int]]  # feedbacks, as often as they are said

    def plain(self, clips: list[Clip]) -> dict[str, Any]:
        """The published loop, film by film."""
        from vlm_repro.fitcoach.decode import plain_stream
        return self.summed([plain_stream(self.net, c.prompt, c.film, self.rules) for c in clips])

    def ours(self, clips: list[Clip], drafts: bool, rows: int) -> dict[str, Any]:
        """Running ahead, some films at a time."""
        from vlm_repro.fitcoach.drafts import Drafts
        from vlm_repro.fitcoach.runahead import ModelReader, decode_streams
        known, out, calls = Drafts(self.known, self.rules.actions.end) if drafts else None, [], 0
        for part in (clips[i:i + rows] for i in range(0, len(clips), rows)):
            held = decode_streams(ModelReader(self.net, [c.film for c in part]), [c.prompt for c in part], [len(c.film) for c in part], self.rules, drafts=known)
            out, calls = out + held, calls + held[0].calls
        return {**self.summed(out), "calls": calls}

    def summed(self, held: list[Any]) -> dict[str, Any]:
        return {"tokens": [s.tokens for s in held], "calls": sum(s.calls for s in held)}


@dataclass(frozen=True)
class Teaching:
    """How a model is taught to speak."""
    updates: int
    steps: int  # of a film
    signs: int  # in it
    rows: int  # films an update
    rate: float

    def of(self, speech: Speech, prompt: Any, device: str) -> float:
        """Teaches it to say the texts of the signs; the last losses."""
        from vlm_repro.fitcoach.train_sequence import lesson, lesson_batch, stream_loss
        films, losses, acts = Films(1), [], speech.rules.actions
        learner = torch.optim.AdamW(speech.net.parameters(), self.rate, betas=(.9, .95), fused=True)
        plan = torch.optim.lr_scheduler.OneCycleLR(learner, self.rate, total_steps=self.updates, pct_start=.1)
        speech.net.train()
        for k in range(self.updates):
            drawn = [films.film(self.steps, self.signs) for _ in range(self.rows)]
            lessons = [lesson(prompt, [t for _, t in said], [float(k) for k, _ in said], [float(k) for k in range(self.steps)], speech.encode, acts) for _, said in drawn]
            batch = {k: v.to(device) for k, v in lesson_batch(lessons, [film for film, _ in drawn]).items()}
            loss = stream_loss(speech.net, batch, acts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(speech.net.parameters(), 1.)
            learner.step()
            plan.step()
            learner.zero_grad()
            losses.append(loss.item())
            if k % 10 == 9: print(f"update {k + 1} of {self.updates}: loss {sum(losses[-10:])/10:.3f}", flush=True)
        speech.net.eval()
        return sum(losses[-5:])/len(losses[-5:])


def speaker(net: Any, tokenizer: Any) -> tuple[Speech, Any]:
    """A Llama that is given cross-attention, and the prompt of its films."""
    from vlm_repro.fitcoach.actions import Rules, action_tokens
    from vlm_repro.fitcoach.cross_attention import Looking, add_looking
    from vlm_repro.fitcoach.decode import stream_prompt
    layers, acts = len(net.model.layers), action_tokens(tokenizer)
    torch.manual_seed(1)
    seeing = add_looking(net, Looking(tuple(range(0, layers, max(1, layers//9))), CHANNELS))

    def encode(text: str) -> list[int]: return tokenizer(text, add_special_tokens=False).input_ids

    known = [encode(t) for k, t in enumerate(Films(1).texts) for _ in range(1 + (TEXTS - k)//8)]
    return Speech(seeing, Rules(acts, 32), encode, known), stream_prompt([tokenizer.bos_token_id or 0, *encode("coach")], acts)


def taught(net: Any, tokenizer: Any, teaching: Teaching, device: str, keep: Path | None, name: str) -> tuple[Speech, Any, dict[str, float]]:
    """A model that speaks, its prompt, its last losses and CPU seconds; weights that were taught in the same way before are taken from the folder `keep`."""
    speech, prompt = speaker(net, tokenizer)
    mark = hashlib.sha256(repr((name, teaching, CHANNELS, TEXTS)).encode()).hexdigest()[:12]
    file = keep/f"{Path(name).stem}-{mark}.pt" if keep else None
    if file and file.is_file():
        held = torch.load(file, map_location=device)
        speech.net.load_state_dict(held["states"])
        speech.net.eval()
        return speech, prompt, held["about"]
    begun = time.process_time()
    about = {"loss": teaching.of(speech, prompt, device), "cpu_s": time.process_time() - begun}
    if file:
        keep.mkdir(parents=True, exist_ok=True)
        torch.save({"states": speech.net.state_dict(), "about": about}, file)
    return speech, prompt, about


def world_split(root: Path, model: Any, folder: Path) -> Path:
    """The test split of a drawn world, its features made by a model's own eyes and written into a folder that has the split's form."""
    from vlm_repro.fitcoach.annotations import sessions_in
    from vlm_repro.fitcoach.data import label_file, split_folder
    from vlm_repro.fitcoach.features import NetExtractor, extract_all, source_of
    split = split_folder(root, "test")
    sources = [source_of(held, split) for held in sessions_in(label_file(split, "test"))]
    apart = [replace(s, features=folder/s.features.relative_to(split), times=folder/s.times.relative_to(split)) for s in sources]
    failed = [e for e in extract_all(apart, NetExtractor(model.cnn, (model.cnn.width, 7, 5))) if e.state == "failed"]
    if failed: raise SystemExit(f"{failed[0].name}: {failed[0].detail}")
    return folder


def world_clips(model: Any, root: Path, features: Path, mode: str) -> list[Clip]:
    """The clips of a mode, with the text that stands before each."""
    from vlm_repro.fitcoach.data import load
    from vlm_repro.fitcoach.decode import stream_prompt
    from vlm_repro.fitcoach.films import films_in, open_film
    from vlm_repro.fitcoach.prompt import render
    out = []
    for request in (render(sample, features) for sample in load(root, "test", mode).samples):
        text = request.messages[0]["content"][0]["text"]
        out += [Clip(open_film(part, model.cnn.width).read(), stream_prompt(model.prompt_ids(text), model.actions)) for part in films_in(request.messages)]
    return out


def trained(model: Any, root: Path) -> Speech:
    """A trained checkpoint that knows the feedbacks of the training split."""
    from vlm_repro.fitcoach.actions import Rules
    from vlm_repro.fitcoach.data import load

    def encode(text: str) -> list[int]: return model.tokenizer(text, add_special_tokens=False).input_ids

    said = [text for sample in load(root, "train").samples for text in json.loads(sample.gold)]
    return Speech(model.net, Rules(model.actions), encode, [encode(text) for text in said])
