"""Files that lie, are torn or hold the impossible: each is a labelled value or an error that says which file."""
import io
import json
import shutil
import zipfile
import zlib

import pytest
from PIL import Image, PngImagePlugin

from vlm_repro.core.jsonl import DataError, Problem, parse_line
from vlm_repro.core.media import MediaError, image_size, open_image
from vlm_repro.mmwalk.data import load, train_source
from vlm_repro.mmwalk.task import WORLD_SEED, WORLD_SIZE
from vlm_repro.mmwalk.world import default_world
from vlm_repro.models.protocol import ModelError, load_model, tiny_checkpoint
from vlm_repro.report.published import Cell, Eligibility, Published, obstacles


def png(**more):
    out = io.BytesIO()
    Image.new('L', (8, 8)).save(out, 'PNG', **more)
    return bytearray(out.getvalue())


def lying_header():
    raw = png()
    raw[16:24] = (60000).to_bytes(4, 'big')*2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, 'big')
    return raw


def huge_text():
    info = PngImagePlugin.PngInfo()
    info.add_text('note', 'x'*(PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return png(pnginfo=info)


@pytest.mark.parametrize('make', [lying_header, huge_text])
def test_an_image_that_lies_is_labelled(make, tmp_path):
    (tmp_path/'a.png').write_bytes(make())
    for look in (open_image, image_size):
        with pytest.raises(MediaError, match='a.png: cannot be decoded'): look(tmp_path/'a.png')


@pytest.mark.parametrize('line', [b'{"n": ' + b'9'*5000 + b'}', b'{"n": ' + b'['*100000 + b']'*100000 + b'}', b'{"gold": "sun \\ud83d"}'])
def test_a_line_that_json_allows_and_python_does_not_is_a_problem(line):
    got = parse_line(line, 'E1.jsonl:3')
    assert isinstance(got, Problem) and got.label == 'broken_line' and got.where == 'E1.jsonl:3'


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_line(b'{"gold": "sun \\ud83d\\ude00"}', 'x') == {'gold': 'sun \U0001f600'}


@pytest.mark.parametrize('name,how', [('model.safetensors', 'cut'), ('processor_config.json', 'garble'), ('tokenizer.json', 'garble'), ('tokenizer.json', 'remove')])
def test_a_broken_checkpoint_is_an_error_that_names_the_folder(name, how, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path/'model')
    file = folder/name
    if not file.exists(): file = folder/'preprocessor_config.json'
    if how == 'remove': file.unlink()
    else: file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    with pytest.raises(ModelError) as e: load_model(str(folder))
    assert str(folder) in str(e.value)


def test_a_flipped_byte_in_the_archive_is_an_error_that_names_it(tmp_path):
    world = default_world(WORLD_SEED, WORLD_SIZE)
    root = shutil.copytree(world, tmp_path/'w', ignore=shutil.ignore_patterns('QAFrames'))
    path, member = train_source(root, 'train')
    archive = root/'finetune_related'/'mmWalkQA_Annotation_for_Internvl2.zip'
    if member is None:
        with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as z: z.write(path, 'train.jsonl')
        path.unlink()
    raw = bytearray(archive.read_bytes())
    raw[len(raw)//3] ^= 255
    archive.write_bytes(raw)
    with pytest.raises(DataError, match='cannot be (unpacked|read)'): load(root, 'train')


def test_a_world_without_its_marker_is_of_no_release(tmp_path):
    root = shutil.copytree(default_world(WORLD_SEED, WORLD_SIZE), tmp_path/'w', ignore=shutil.ignore_patterns('QAFrames', 'world.json'))
    assert load(root).identity['release'] == 'unknown'


@pytest.mark.parametrize('variant,n,asked', [('as_published', 10, 10), ('corrected', 8, 10)])
def test_failures_are_counted_once(variant, n, asked):
    cell = Cell('t', 'r', 'c', 'm', variant, 50., '0-100', 40., 60., n, 2, 5, 'trajectory')
    row = Published('t', 'r', 'c', 50., '0-100', 2, 10, 's', 'm', '', 'x')
    said = obstacles(cell, row, Eligibility('paper', 's', 'm', '', 'verbatim'))
    assert said == [f'2 of {asked} samples failed; run again to complete them'], json.dumps(said)
