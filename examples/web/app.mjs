/** The page: a menu of prefixes, an input, what the model writes. The model itself is in a worker (model.mjs). */
import { card, hint, title } from './card.mjs';
import { Model } from './client.mjs';
import { Figures } from './figures.mjs';

const $ = (id) => document.getElementById(id);
const model = new Model();
const figures = new Figures($('figures'));
/** What the menu offers, by key; the bare model has neither file nor manifest. */
const offers = new Map([['', { examples: [] }]]);
let chosen = '';
let shown = 0;
let writing = 0;

/** The model and the page's own prefixes; what is dropped earlier waits for them. */
const ready = start();
ready.then(choose).catch(tell);

/** @returns {Promise<string>} the file of the first prefix */
async function start() {
  const listed = await (await fetched('prefixes/prefixes.json')).json();
  const loading = figures.time('loaded in', () => model.call('load', {}, showProgress));
  const files = Promise.all(listed.map(async ({ file }) => (await fetched(`prefixes/${file}`)).arrayBuffer()));
  await loading;
  $('loading').hidden = true;
  for (const [index, bytes] of (await files).entries()) {
    const { file, examples } = listed[index];
    const manifest = await add(file, bytes, examples);
    offer(file, title(manifest, file), hint(manifest, bytes.byteLength));
  }
  offer('', 'No prefix', 'the bare model');
  $('write').disabled = false;
  return listed[0].file;
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be read: the server says ${response.status}.`);
  return response;
}

function showProgress({ loaded, total }) {
  $('progress').value = loaded / total;
  $('loading').firstElementChild.textContent = `Loading the model, ${megabytes(loaded)} of ${megabytes(total)} MB`;
}

const megabytes = (bytes) => Math.round(bytes / 1e6);

/** Read a prefix file in the worker, which refuses what is not for its model. Gives its manifest. */
async function add(file, bytes, examples = []) {
  const size = bytes.byteLength;
  const manifest = await model.call('add', { file, bytes });
  offers.set(file, { manifest, size, examples });
  return manifest;
}

/** `file`, or `file (2)` and so on where the menu has one of that name: nothing of it is replaced. */
function unused(file) {
  const [, stem, ending] = file.match(/^(.*?)(\.safetensors)?$/s);
  let name = file;
  for (let copy = 2; offers.has(name); copy++) name = `${stem} (${copy})${ending ?? ''}`;
  return name;
}

function offer(key, name, below) {
  const label = document.createElement('label');
  const input = Object.assign(document.createElement('input'), { type: 'radio', name: 'prefix', value: key });
  const small = Object.assign(document.createElement('small'), { textContent: below });
  input.addEventListener('change', () => choose(key).catch(tell));
  label.append(input, Object.assign(document.createElement('span'), { textContent: name }), small);
  $('choices').append(label);
}

/** Switch to a prefix: no file is read and no model loaded. Then write, so that the difference shows. */
async function choose(key) {
  tell();
  const before = offers.get(chosen).examples;
  await figures.time('switched in', async () => {
    await Promise.all([model.call('stop'), model.call('use', { file: key === '' ? null : key })]);
    chosen = key;
    document.querySelector(`#choices input[value="${CSS.escape(key)}"]`).checked = true;
    const { manifest, size } = offers.get(key);
    card({ title: $('title'), says: $('says'), rows: $('card') }, manifest, size, key);
  });
  const { examples } = offers.get(key);
  const untouched = $('prompt').value === '' || before.includes($('prompt').value);
  if (untouched && examples.length && !examples.includes($('prompt').value)) $('prompt').value = examples[(shown = 0)];
  $('example').disabled = examples.length < 2;
  await write();
}

async function write() {
  const turn = ++writing;
  tell();
  await model.call('stop');
  const prompt = $('prompt').value;
  if (!prompt.trim()) return tell(new Error('There is no input: write some, or take an example.'));
  busy(true);
  $('text').textContent = '';
  const clock = figures.writing();
  try {
    const { tokens } = await model.call('write', { prompt }, ({ text }) => {
      if (turn !== writing) return;
      $('text').textContent = text;
      clock.token();
    });
    if (turn === writing) clock.done(tokens);
  } finally {
    if (turn === writing) busy(false);
  }
}

function busy(is) {
  $('text').setAttribute('aria-busy', String(is));
  $('stop').disabled = !is;
}

/** Show a problem in one sentence, or take the last one away. */
function tell(error) {
  $('problem').hidden = !error;
  $('problem').textContent = error?.message ?? '';
  if (error) $('loading').hidden = true;
}

async function take(files) {
  for (const file of files) {
    let name;
    try {
      await ready;
      name = unused(file.name);
      const manifest = await add(name, await file.arrayBuffer());
      offer(name, title(manifest, name), `${name}: ${hint(manifest, file.size)}`);
    } catch (error) {
      tell(new Error(`${file.name} was not taken: ${error.message}`));
      continue;
    }
    await choose(name).catch(tell);
  }
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  if (!$('write').disabled) write().catch(tell);
});
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit();
});
$('stop').addEventListener('click', () => model.call('stop'));
$('example').addEventListener('click', () => {
  const { examples } = offers.get(chosen);
  shown = (shown + 1) % examples.length;
  $('prompt').value = examples[shown];
  write().catch(tell);
});
$('file').addEventListener('change', ({ target }) => {
  take([...target.files]);
  target.value = '';
});
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $('drop').hidden = kind === 'drop' || (kind === 'dragleave' && event.relatedTarget === null);
    if (kind === 'drop') take([...event.dataTransfer.files]);
  });
}
