'use strict';
const D = JSON.parse(document.getElementById('run').textContent);
const $ = id => document.getElementById(id);

// Every text of the run enters the page through textContent: what a model wrote is never markup.
function el(tag, cls, text) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined && text !== null) e.textContent = text;
  return e;
}
function put(parent, ...children) { for (const c of children) if (c) parent.append(c); return parent; }

function figure(ref) {
  const [index, caption] = ref, image = D.images[index], f = el('figure');
  if (image.uri) {
    const im = el('img');
    im.src = image.uri; im.alt = caption || image.path; im.loading = 'lazy';
    im.title = image.path;
    im.tabIndex = 0;
    im.setAttribute('role', 'button');
    im.onclick = () => { f.classList.toggle('wide'); im.classList.toggle('big'); };
    im.onkeydown = e => { if (e.key === 'Enter') im.onclick(); };
    f.append(im);
  } else f.append(el('div', 'absent', image.why));
  put(f, el('figcaption', '', caption || image.path));
  return f;
}

function turn(message) {
  const d = el('div', 'turn ' + (message.role === 'assistant' ? 'assistant' : ''));
  put(d, el('b', '', message.role));
  let views = null;
  for (const [kind, value, caption] of message.parts) {
    if (kind === 'image') {
      if (!views) { views = el('div', 'views'); d.append(views); }
      views.append(figure([value, caption]));
    } else { views = null; d.append(el('pre', '', value)); }
  }
  return d;
}

function lazily(label, build) {
  const d = el('details'), s = el('summary', '', label);
  d.append(s);
  d.addEventListener('toggle', () => { if (d.open && d.childElementCount === 1) d.append(build()); });
  return d;
}

function prompt(row) {
  const box = el('div'), turns = row.prompt.map(i => D.messages[i]);
  const earlier = turns.slice(0, -1), shots = earlier.filter(m => m.role === 'assistant').length;
  const nonShot = earlier.filter(m => m.role === 'system');
  for (const m of nonShot) box.append(turn(m));
  if (shots) box.append(lazily(shots + (shots === 1 ? ' answered example before the question' : ' answered examples before the question'), () => {
    const all = el('div');
    for (const m of earlier) if (m.role !== 'system') all.append(turn(m));
    return all;
  }));
  if (turns.length) box.append(turn(turns[turns.length - 1]));
  return box;
}

const shown = v => v === null ? 'none' : v.map(x => Number.isInteger(x) ? x : Math.round(x * 1000) / 1000).join(', ');
function scoreChips(row) {
  return row.scores.map(s => s.values === null
    ? el('span', 'chip fail', s.variant.replace('_', ' ') + ': not scored (' + s.label + ')')
    : el('span', 'chip score', s.variant.replace('_', ' ') + ': ' + shown(s.values) + (D.metrics.length > 1 ? ' · ' + s.metric : '')));
}

function facts(row) {
  const box = el('dl');
  const add = (k, v, cls) => { if (v !== '' && v !== null && v !== undefined) put(box, el('dt', '', k), el('dd', cls || '', v)); };
  add('extracted', row.answer ? (row.answer.value === null ? row.answer.status : row.answer.value) + '  [' + row.answer.extractor + ']' : null);
  for (const j of row.judge) add('judge', j);
  add('tokens', row.tokens);
  add('finish', row.finish);
  add('hashes', row.hashes, 'mono');
  add('prompt', row.provenance);
  for (const [k, v] of Object.entries(row.meta)) if (!D.groups.some(g => g[0] === k)) add(k, v);
  return box;
}

function card(row) {
  const a = el('article');
  a.id = row.id;
  const h = put(el('h2'), el('span', '', row.id));
  for (const [key] of D.groups) if (row.meta[key] !== undefined) h.append(el('span', 'chip', row.meta[key]));
  put(h, ...scoreChips(row), row.flip ? el('span', 'chip flip', 'variants differ') : null, row.label ? el('span', 'chip fail', row.label) : null);
  a.append(h);
  if (row.views.length) { const v = el('div', 'views'); row.views.forEach(r => v.append(figure(r))); a.append(v); }
  const dl = el('dl');
  put(dl, el('dt', '', 'question'), el('dd', '', row.question), el('dt', '', 'gold'), el('dd', 'gold', row.gold), el('dt', '', 'answer'));
  dl.append(row.error ? el('dd', 'error', row.error) : el('dd', '', row.text === null ? 'not run' : row.text === '' ? '(empty)' : row.text));
  a.append(dl);
  if (row.prompt.length) a.append(lazily('prompt as the model sees it', () => prompt(row)));
  a.append(lazily('details', () => facts(row)));
  return a;
}

const fields = {};
function control(label, input, key) {
  const l = put(el('label'), document.createTextNode(label), input);
  fields[key] = input;
  for (const change of ['input', 'change']) input.addEventListener(change, () => { page = 0; draw(); });
  $('filters').append(l);
  return l;
}
function select(options) {
  const s = el('select');
  for (const [value, text] of options) { const o = el('option', '', text); o.value = value; s.append(o); }
  return s;
}
function number(placeholder) { const i = el('input'); i.type = 'number'; i.step = 'any'; i.placeholder = placeholder; return i; }

function controls() {
  const search = el('input'); search.type = 'search'; search.placeholder = 'id, question, answer …';
  control('search', search, 'text');
  for (const [key, values] of D.groups) control(key, select([['', 'all'], ...values.map(v => [v, v])]), 'group:' + key);
  if (D.kinds.length) {
    control('score of', select(D.kinds.map((k, i) => [i, k.variant.replace('_', ' ') + (D.metrics.length > 1 ? ' · ' + k.metric : '')])), 'kind');
    control('from', number('min'), 'min');
    control('to', number('max'), 'max');
  }
  control('error', select([['', 'all'], ['-', 'none'], ['*', 'any'], ...D.labels.map(l => [l, l])]), 'error');
  control('sort', select([['id', 'id'], ['low', 'score, lowest first'], ['high', 'score, highest first'], ['order', 'order of the run']]), 'sort');
  control('a page', select([10, 20, 50, 100].concat([10, 20, 50, 100].includes(D.page_size) ? [] : [D.page_size]).sort((a, b) => a - b).map(n => [n, n])), 'size');
  if (D.flips) {
    const c = el('input'); c.type = 'checkbox';
    const l = control('', c, 'flips');
    l.className = 'check'; l.append(document.createTextNode('only where the variants differ (' + D.flips + ')'));
  }
  for (const [key, value] of Object.entries(D.preset)) if (fields[key]) fields[key].value = value;
}

const hay = row => row.hay || (row.hay = [row.id, row.question, row.gold, row.text, row.error, ...row.judge].join('\n').toLowerCase());
function scoreOf(row) {
  const k = D.kinds[fields.kind ? fields.kind.value : 0];
  if (!k) return null;
  const s = row.scores.find(x => x.metric === k.metric && x.variant === k.variant);
  return s && s.values !== null && s.values.length ? s.values[0] : null;
}
function wanted() {
  const text = fields.text.value.trim().toLowerCase(), error = fields.error.value;
  const min = fields.min && fields.min.value !== '' ? +fields.min.value : null, max = fields.max && fields.max.value !== '' ? +fields.max.value : null;
  return row => {
    for (const [key] of D.groups) { const v = fields['group:' + key].value; if (v && row.meta[key] !== v) return false; }
    if (error === '-' ? row.label : error === '*' ? !row.label : error && row.label !== error) return false;
    if (fields.flips && fields.flips.checked && !row.flip) return false;
    if (min !== null || max !== null) {
      const s = scoreOf(row);
      if (s === null || (min !== null && s < min) || (max !== null && s > max)) return false;
    }
    return !text || hay(row).includes(text);
  };
}
function sorted(rows) {
  const how = fields.sort.value, by = r => { const s = scoreOf(r); return s === null ? Infinity : how === 'low' ? s : -s; };
  if (how === 'order') return rows;
  const ids = (a, b) => a.id < b.id ? -1 : a.id > b.id ? 1 : 0;
  return rows.slice().sort(how === 'id' ? ids : (a, b) => { const x = by(a), y = by(b); return x < y ? -1 : x > y ? 1 : ids(a, b); });
}

let page = 0;
function pager(rows, pages, size) {
  const bar = el('div', 'pager');
  const go = (text, to, off) => { const b = el('button', '', text); b.type = 'button'; b.disabled = off; b.onclick = () => { page = to; draw(); scrollTo(0, 0); }; return b; };
  const from = rows.length ? page * size + 1 : 0;
  put(bar, go('‹ previous', page - 1, page === 0), el('span', '', 'page ' + (page + 1) + ' of ' + pages), go('next ›', page + 1, page + 1 >= pages));
  bar.append(el('span', 'count', from + '–' + Math.min(rows.length, (page + 1) * size) + ' of ' + rows.length + (rows.length === D.rows.length ? ' samples' : ' matching samples, ' + D.rows.length + ' in all')));
  return bar;
}
function draw() {
  const rows = sorted(D.rows.filter(wanted())), size = +fields.size.value, pages = Math.max(1, Math.ceil(rows.length / size)), main = $('rows');
  page = Math.min(page, pages - 1);
  main.replaceChildren(pager(rows, pages, size));
  if (!rows.length) main.append(el('p', 'empty', 'No sample matches these filters.'));
  rows.slice(page * size, (page + 1) * size).forEach(r => main.append(card(r)));
  if (rows.length > 3) main.append(pager(rows, pages, size));
}
$('filters').addEventListener('submit', e => e.preventDefault());
controls();
draw();
