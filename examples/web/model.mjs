/** The page's worker: one session of the model, the prefixes that it was given, one text at a time. */
import { greedy } from './javascript/greedy.mjs';
import * as bridge from './javascript/prefix.mjs';
import { Tokenizer } from './lib/tokenizers.min.mjs';
import * as ort from './lib/ort.wasm.bundle.min.mjs';

/** Tokens of an answer: written at most, and those that an input must leave room for. */
const [MOST, LEAST] = [160, 16];
/** As bytes that a model wrote half of a character in are decoded. */
const BROKEN = '\ufffd';
const prefixes = new Map();
let session, report, tokenizer, bare, active;
let turn = 0;
let last = Promise.resolve();

const calls = {
  /** Read the exported folder, and tell of the bytes of its graph as they come. */
  async load(_, tell) {
    ort.env.wasm.wasmPaths = { wasm: new URL('lib/ort-wasm-simd-threaded.wasm', import.meta.url).href };
    const names = ['export', 'tokenizer', 'tokenizer_config'];
    const [described, stored, config] = await Promise.all(names.map((name) => json(`model/${name}.json`)));
    report = described;
    tokenizer = bridge.taskTokenizer(Tokenizer, stored, config, report.model);
    session = await ort.InferenceSession.create(await bytesOf(`model/${report.graph.file}`, tell));
    const past = bridge.emptyPast(report, ort.Tensor, { dtype: report.graph.dtype });
    bare = { task: bridge.plainTask(tokenizer), past, before: 0, position: 0 };
    active = bare;
  },

  /** Take a prefix file, or refuse it in one sentence. Gives its manifest. */
  add({ file, bytes }) {
    const prefix = bridge.readPrefix(bytes, { where: 'the file' });
    refuseOtherWeights(prefix);
    bridge.refuseOther(prefix, report);
    const past = bridge.pastFeeds(prefix, ort.Tensor, { dtype: report.graph.dtype });
    const task = prefix.manifest.task ?? bare.task;
    prefixes.set(file, { task, past, before: bridge.slots(prefix), position: bridge.textStart(prefix) });
    return prefix.manifest;
  },

  /** Write with this prefix from now on, with none for null. */
  use({ file }) {
    active = file === null ? bare : prefixes.get(file);
  },

  /** End what is being written. */
  stop() {
    turn++;
  },

  /** Write for an input of the active prefix's task, and tell of the text after each token. */
  write({ prompt }, tell) {
    const mine = ++turn;
    const writer = active;
    last = last.catch(() => {}).then(() => answer(writer, prompt, () => mine === turn, tell));
    return last;
  },
};

async function answer({ task, ...row }, prompt, wanted, tell) {
  const ids = bridge.encodePrompt(task, fields(task, prompt), tokenizer);
  const room = (report.backbone.context_length ?? Infinity) - row.position - ids.length;
  if (room < LEAST) throw new Error(`The input of ${ids.length} tokens leaves no room for an answer: shorten it.`);
  const limits = { stop: bridge.stopIds(task, tokenizer), most: Math.min(MOST, room) };
  const written = [];
  for await (const token of greedy(session, ort.Tensor, { ...row, ids, ...limits })) {
    written.push(token);
    const text = bridge.decodeTarget(task, written, tokenizer);
    if (!text.endsWith(BROKEN)) tell({ text });
    await breath();
    if (!wanted()) break;
  }
  return { tokens: written.length };
}

/** An input as its task asks for it: the text itself, or JSON of several fields. */
function fields(task, prompt) {
  const given = bridge.parseFields(task, prompt);
  if (given !== undefined) return given;
  throw new Error(`This prefix asks for a JSON object with the fields ${bridge.inputFields(task).join(', ')}.`);
}

/** The case that visitors meet, in the page's own words. */
function refuseOtherWeights(prefix) {
  const { name, weights_hash: theirs } = prefix.manifest.backbone;
  const { name: ours, weights_hash: hash } = report.backbone;
  if (theirs == null || bridge.matches(prefix, hash)) return;
  const made = `it was made for ${name}, whose weights have the hash ${short(theirs)}`;
  throw new Error(`${made}; this page has ${ours}, ${short(hash)}`);
}

/** As on the card. */
const short = (hash) => `${hash.replace(/^.*:/, '').slice(0, 12)}…`;

async function json(url) {
  return JSON.parse(new TextDecoder().decode(await bytesOf(url)));
}

async function bytesOf(url, tell = () => {}) {
  const response = await fetch(new URL(url, import.meta.url));
  if (!response.ok) throw new Error(`${url} cannot be read: the server says ${response.status}.`);
  const total = Number(response.headers.get('Content-Length'));
  const pieces = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    tell({ loaded: (loaded += value.length), total: Math.max(total, loaded) });
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

/** Let waiting messages in, such as Stop; a timer would take four milliseconds. */
const { port1, port2 } = new MessageChannel();
function breath() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

self.onmessage = async ({ data: { id, name, given } }) => {
  try {
    postMessage({ id, result: (await calls[name](given, (told) => postMessage({ id, told }))) ?? null });
  } catch (error) {
    postMessage({ id, error: error?.message ?? String(error) });
  }
};
