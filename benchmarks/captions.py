"""Caption metrics without METEOR: `python benchmarks/captions.py [--out benchmarks/results/captions.json]`.

Compared, on a corpus of the size of ScanQA's validation set (4,675 short answers, one to three references each) and one of the size of Scan2Cap's (2,068 captions, five references each):
  pycocoevalcap  its PTB tokenizer (a Java program, started once for the answers and once for the references), BLEU-1 to 4, ROUGE-L and CIDEr
  ours           `metrics.ptb` and `metrics.captions`, with every cache emptied before each round
All tokens must be the same and all scores of the corpora agree to 1e-9 before anything is timed. Seconds are wall and CPU, those of the Java program included. The texts are made from templates with a
skewed choice of words, punctuation, apostrophes, numbers and capitals. Needs Java and `pip install pycocoevalcap` (its metrics ask for nothing else: `--no-deps` is enough).
"""
import contextlib
import io
import random
from collections.abc import Callable
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

try:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed, and it is what is compared with: pip install 'vlm-repro[metrics]'") from error

from vlm_repro.metrics import captions, ptb  # noqa: E402

TOLERANCE = 1e-9
Texts = dict[str, list[str]]
NOUNS = "chair table desk door window cabinet sofa bed lamp trash can bookshelf monitor whiteboard refrigerator sink toilet pillow backpack counter curtain".split()
COLOURS = "brown black white gray blue dark-brown beige red green yellow".split()
PLACES = ("next to", "in front of", "to the left of", "to the right of", "behind", "on top of", "in the corner of")


# Texts. --------------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def pick(rng: random.Random, words: list[str] | tuple[str, ...]) -> str:
    """One of the words, the first ones more often."""
    return words[min(int(rng.expovariate(4) * len(words)), len(words) - 1)]


def answer(rng: random.Random) -> str:
    """A short answer, as people write them."""
    thing, colour = pick(rng, NOUNS), pick(rng, COLOURS)
    text = rng.choice([thing, colour, f"{colour} {thing}", f"{pick(rng, PLACES)} the {thing}", str(rng.randint(1, 9)), f"{rng.randint(1, 9)} {thing}s", "yes", "no", f"a {colour} {thing}",
                       f"the {thing}'s {colour} side", f"{colour}, {pick(rng, COLOURS)}", "there isn't any"])
    return (text.capitalize() if rng.random() < .3 else text) + ("." if rng.random() < .2 else "")


def caption(rng: random.Random) -> str:
    """Two sentences about one object."""
    thing, other = pick(rng, NOUNS), pick(rng, NOUNS)
    first = rng.choice([f"This is a {pick(rng, COLOURS)} {thing}.", f"there's a {pick(rng, COLOURS)}, {pick(rng, COLOURS)} {thing};", f"the {thing} is {rng.randint(2, 4)} feet from a {other}."])
    return f"sos {first} It is {pick(rng, PLACES)} the {pick(rng, COLOURS)} {other}{rng.choice(['.', ', by the ' + pick(rng, NOUNS) + '.'])} eos"


def corpus(n: int, make: Callable[[random.Random], str], few: int, many: int) -> tuple[Texts, Texts]:
    """Predictions and references; every other prediction is one of its references."""
    rng = random.Random(n)
    refs = {str(i): [make(rng) for _ in range(rng.randint(few, many))] for i in range(n)}
    return {k: [rng.choice(r) if rng.random() < .5 else make(rng)] for k, r in refs.items()}, refs


# Both ways. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def tokens_by_java(texts: Texts) -> Texts:
    return PTBTokenizer().tokenize({k: [{"caption": c} for c in held] for k, held in texts.items()})


def plain(said: Texts, refs: Texts) -> dict[str, float]:
    res, gts = tokens_by_java(said), tokens_by_java(refs)
    with contextlib.redirect_stdout(io.StringIO()): bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    return {**{f"Bleu_{k + 1}": b for k, b in enumerate(bleu)}, "ROUGE_L": Rouge().compute_score(gts, res)[0], "CIDEr": Cider().compute_score(gts, res)[0]}


def ours(said: Texts, refs: Texts) -> dict[str, float]:
    for cached in (ptb.characters, ptb.patterns, ptb._piece, ptb._line, captions.ngrams, captions.bleu_counts, captions.rouge_l): cached.cache_clear()
    res, gts = ptb.tokenize_keyed(said, as_published=True), ptb.tokenize_keyed(refs, as_published=True)
    return captions.caption_scores([r[0] for r in res.values()], list(gts.values()))


def compare(said: Texts, refs: Texts) -> dict[str, Any]:
    """How far the scores are apart, once all tokens are found equal."""
    for texts in (said, refs): require(tokens_by_java(texts) == ptb.tokenize_keyed(texts, as_published=True), "the tokens are others")
    a, b = plain(said, refs), ours(said, refs)
    apart = max(abs(a[k] - b[k]) for k in a)
    require(a.keys() == b.keys() and apart <= TOLERANCE, f"{a} and {b}")
    return {"apart": apart, "tolerance": TOLERANCE, "texts": len(said) + sum(map(len, refs.values())), "scores": {k: round(v, 6) for k, v in b.items()}}


def main() -> None:
    options, begun = arguments("Time caption metrics against pycocoevalcap.").parse_args(), now()
    sizes = (200, 60) if options.quick else (4_675, 2_068)
    held = {"scanqa": corpus(sizes[0], answer, 1, 3), "scan2cap": corpus(sizes[1], caption, 5, 5)}
    equal = {name: compare(*texts) for name, texts in held.items()}
    rounds = {name: interleaved({"pycocoevalcap": lambda t=texts: plain(*t) and None, "ours": lambda t=texts: ours(*t) and None}, options.rounds, name) for name, texts in held.items()}
    figures = {f"{name}_{key}": least(r, "pycocoevalcap", key) / least(r, "ours", key) for name, r in rounds.items() for key in ("wall_s", "cpu_s")}
    finish("captions", options, begun, figures, lambda: hot_spots(lambda: ours(*held["scanqa"])), equal=equal, rounds=rounds, versions=versions("pycocoevalcap", "numpy"))


if __name__ == "__main__":
    main()
