"""mmWalk: shape glue between the golden vectors and the package's functions."""
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.core.jsonl import DataError
from vlm_repro.metrics import judge
from vlm_repro.mmwalk import annotations, extract, predictions, prompt, score, sft, upstream
from vlm_repro.models import tiling


def attempted(function: Callable[[Any], Any], record: Any) -> dict[str, Any]:
    "A value, or the name of the documented error."
    try: return {'value': function(record)}
    except annotations.RecordError as e: return {'error': type(e).__name__}


def extract_synthetic(given: Any, data: Path) -> dict[str, Any]:
    return {'question': attempted(annotations.extract_question, given), 'answer': attempted(annotations.extract_answer, given),
            'scenario': attempted(annotations.extract_scenario, given)}


def extract_real(given: Any, data: Path) -> dict[str, Any]:
    path = data/'test_data_chat'/given['file']
    if not path.is_file(): raise DataError(f'no {path}; give the folder with the released annotations by --data')
    line = path.read_bytes().split(b'\n')[given['line']]
    if hashlib.sha256(line).hexdigest() != given['sha256']: raise DataError(f'{path}:{given["line"] + 1} is not the released line')
    record = json.loads(line)
    return {'question': annotations.extract_question(record), 'answer': annotations.extract_answer(record), 'scenario': annotations.extract_scenario(record)}


def hf_messages(given: Any, data: Path) -> dict[str, Any]:
    messages = prompt.record_messages(given['record'])
    renamed = [{'role': m['role'], 'content': [{'type': 'image', 'path': p['image']} if p['type'] == 'image' else p for p in m['content']]} for m in messages]
    images = [p['path'] for m in renamed for p in m['content'] if p['type'] == 'image']
    return {'messages': renamed, 'processor_images': images, 'record': predictions.predicted_record(given['record'], given['model_text'])}


def lmdeploy_prompt(given: Any, data: Path) -> dict[str, Any]:
    text, images = prompt.record_prompt(given['record'])
    return {'prompt': text, 'images': images, 'record': predictions.predicted_record(given['record'], given['model_text'], strip=True)}


def internvl_tiling(given: Any, data: Path) -> dict[str, Any]:
    limits = {k: given[k] for k in ('min_num', 'max_num', 'image_size')}
    columns, rows = tiling.tile_grid(given['width'], given['height'], **limits)
    tokens = tiling.visual_tokens(given['width'], given['height'], use_thumbnail=given['use_thumbnail'], **limits)
    return {'cols': columns, 'rows': rows, 'tiles': tiling.tile_count(columns, rows, given['use_thumbnail']),
            'image_tokens_at_448': tokens if given['image_size'] == 448 else None}


def answer_strip(given: Any, data: Path) -> str:
    return extract.chat_strip(given)


def judge_reply(given: Any, data: Path) -> int:
    return judge.first_digit(judge.response_text(given['response']) if 'response' in given else given.get('reply'))


def judge_request(given: Any, data: Path) -> dict[str, Any]:
    category, question, gold, prediction, scenario = given['sample']
    item = judge.JudgeItem('', question, gold, prediction, category)
    request = score.published_request(item)
    record = score.scored_record(item, scenario, judge.first_digit(given['reply']))
    user = request['messages'][1]['content']
    head = user[:user.rindex('\n') + 1]
    return {'kwargs': sorted(request), 'model': request['model'], 'temperature': request['temperature'], 'roles': [m['role'] for m in request['messages']],
            'user_message_head': head, 'user_message_tail_lines': len(user[len(head):].splitlines()), 'record': record, 'record_key_order': list(record)}


def summary(given: Any, data: Path) -> dict[str, Any]:
    replies = {name: [None if r == '!raise' else r for r in lines] for name, lines in given['pred'].items()}
    made = upstream.replay(given['gt'], replies)
    *shown, overall = upstream.printed(made.summary)
    return {'missing': list(made.missing), 'summary': made.summary, 'summary_key_order': list(made.summary), 'printed': shown,
            'printed_overall': overall[1:], 'n_scored': len(made.scored), 'scored': made.scored, 'pred_file_used': made.used}


UNITS = re.compile(r'</?img>|<IMG_CONTEXT>|<\|im_start\|>|<\|im_end\|>|\s|\w+|.')


def sft_labels(given: Any, data: Path) -> dict[str, Any]:
    names = ['<unk>', '<s>', '<pad>']
    def toy(text: str) -> list[int]:
        units = UNITS.findall(text)
        names.extend(dict.fromkeys(u for u in units if u not in names))
        return [1, *map(names.index, units)]
    human = sft.expand_tags(given['human'], given['tiles_per_image'], given['tokens_per_tile'])
    made = sft.published_labels(toy, *sft.published_text('SYS', human, given['gpt']), given['max_length'], 2, fill=not given['group_by_length'])
    on = [i for i, label in enumerate(made.labels) if label != sft.IGNORED]
    spans = [[i, next(j for j in range(i, len(made.labels) + 1) if j not in on)] for i in on if i - 1 not in on]
    units = [names[i] for i in made.input_ids]
    return {'length': len(units), 'n_image_tokens': units.count('<IMG_CONTEXT>'), 'n_image_end': units.count('</img>'), 'labelled_spans': spans,
            'labelled_tokens': [[names[i] for i in made.labels[a:b]] for a, b in spans], 'attention_ones': sum(made.attention_mask), 'warned_mismatch': made.mismatch}


def even_chunks(given: Any, data: Path) -> list[list[int]]:
    return sft.even_chunks(given['indices'], given['lengths'], given['num_chunks'])


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'extract_synthetic': extract_synthetic,
    'extract_real': extract_real,
    'hf_messages': hf_messages,
    'lmdeploy_prompt': lmdeploy_prompt,
    'tiling': internvl_tiling,
    'answer_strip': answer_strip,
    'judge_reply': judge_reply,
    'judge_request': judge_request,
    'summary': summary,
    'sft_labels': sft_labels,
    'even_chunks': even_chunks,
}
