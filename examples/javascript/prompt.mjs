/** How a prefix wants to be asked: its usage contract (schemas/README.md, section 5) for tasks with named fields. */
import { expect } from './errors.mjs';

/** A task that sets no limit. */
const UNBOUNDED = 2 ** 31;
/** What Python strips, which is not what trim() does. */
const AROUND = /^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu;

/**
 * A model's tokenizer, which adds no special token by itself and reads none out of a user's text.
 * @param Tokenizer the class of `@huggingface/tokenizers`
 * @param {object} json the content of tokenizer.json
 * @param {object} [config] that of tokenizer_config.json
 * @param {{bos_token_id?: number, eos_token_id?: number | number[]}} [model] `model` of export.json
 */
export function taskTokenizer(Tokenizer, json, config = {}, model = {}) {
  const added = json.added_tokens ?? [];
  const whole = new Tokenizer(json, config);
  // Without special tokens among them, their spelling is text like any other.
  const plain = new Tokenizer({ ...json, added_tokens: added.filter((token) => !token.special) }, config);
  const special = new Map(added.filter((token) => token.special).map((token) => [token.content, token.id]));
  const named = (name) => config[name]?.content ?? config[name] ?? undefined;
  const bos = 'bos_token' in config ? whole.token_to_id(named('bos_token')) : model.bos_token_id;
  const ends = [named('eos_token'), ...[model.eos_token_id ?? []].flat().map((id) => whole.id_to_token(id))];
  const encode = (text) => (text ? plain.encode(text, { add_special_tokens: false }).ids : []);
  return {
    special,
    bos,
    stop: [...new Set(ends.filter((token) => token !== undefined))],
    addsBos: bos !== undefined && whole.encode('a').ids[0] === bos,
    encode,
    // Cleaning up would take spaces away that the model wrote.
    decode: (ids) => whole.decode(ids, { skip_special_tokens: false, clean_up_tokenization_spaces: false }),
  };
}

/** The contract of a model without a prefix, or of a prefix without a task: text is continued as it stands. */
export function plainTask({ addsBos, stop }) {
  const templates = { input_template: '{input}', separator: '', target_template: '{target}' };
  return { name: 'plain', ...templates, bos: addsBos ? 'after' : 'none', stop, max_length: UNBOUNDED };
}

/** The names of the fields that `task` asks for. */
export function inputFields(task) {
  return [...new Set(parts(task.input_template).flatMap(({ field }) => field ?? []))];
}

/** What a person typed as the fields of `task`: of one, the text itself; of more, JSON; undefined for what is none. */
export function parseFields(task, text) {
  if (inputFields(task).length === 1) return text;
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/**
 * The token ids of `[BOS] input separator`. Nothing is cut: a prompt that is too long is refused.
 * @param {object} task `manifest.task` of a prefix
 * @param {string | object} fields the task's fields by name, or the text of its only one
 * @param {object} tokenizer what `taskTokenizer` gives
 * @param {{room?: number}} [options] tokens to leave for the answer, of the task's `max_length`
 */
export function encodePrompt(task, fields, tokenizer, { room = 16 } = {}) {
  const where = `task ${task.name}`;
  expect(!task.chat_template_hash, where, 'a template with fields', 'a conversation', 'render its chat template');
  const input = marked(filled(task, fields), tokenizer);
  const bos = task.bos === 'after' ? [tokenizer.bos] : [];
  expect(bos.length === 0 || tokenizer.bos !== undefined, where, 'a BOS token in the tokenizer', 'none');
  const ids = [...bos, ...input, ...marked([{ text: task.separator, trusted: true }], tokenizer)];
  expect(ids.length > 0, 'prompt', 'at least one token', 'none', 'give some text');
  const most = Math.max(0, task.max_length - room);
  const expected = `at most ${most} tokens, which leave ${room} of the task's ${task.max_length}`;
  expect(ids.length <= most, 'prompt', expected, ids.length, 'shorten it');
  return ids;
}

/** The ids that end an answer. */
export function stopIds(task, tokenizer) {
  return task.stop.map((token) => {
    const ids = marked([{ text: token, trusted: true }], tokenizer);
    expect(ids.length === 1, `stop token ${token}`, 'exactly one token of the vocabulary', `${ids.length} tokens`);
    return ids[0];
  });
}

/** The text of an answer's ids: up to the first stop token, without what the target template itself spells. */
export function decodeTarget(task, ids, tokenizer) {
  const ends = new Set(stopIds(task, tokenizer));
  const spelled = [...tokenizer.special].filter(([token]) => task.target_template.includes(token)).map(([, id]) => id);
  const end = ids.findIndex((id) => ends.has(id));
  const said = ids.slice(0, end < 0 ? ids.length : end).filter((id) => !spelled.includes(id));
  return tokenizer.decode(said).replace(AROUND, '');
}

/** The input in parts; what the template itself says is trusted, and may spell special tokens. */
function filled(task, given) {
  const known = inputFields(task);
  const fields = typeof given === 'string' && known.length === 1 ? { [known[0]]: given } : given;
  const names = fields !== null && typeof fields === 'object' ? Object.keys(fields) : [];
  const complete = names.sort().join() === [...known].sort().join();
  expect(complete, 'prompt', `the fields ${known.join(', ')}`, names.join(', ') || 'none of them');
  return parts(task.input_template).map(({ text, field }) => {
    if (field === undefined) return { text, trusted: true };
    const value = fields[field];
    expect(typeof value === 'string' && !/\p{Cs}/u.test(value), 'prompt', `Unicode text as ${field}`, 'something else');
    return { text: value, trusted: false };
  });
}

/** The literals and `{fields}` of a template, in which `{{` and `}}` write a brace. */
function parts(template) {
  return [...template.matchAll(/\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+/g)].map(([text, field]) => {
    const sound = field === undefined ? text !== '{' && text !== '}' : /^[\p{ID_Start}_]\p{ID_Continue}*$/u.test(field);
    const step = 'write a brace as {{ or }}';
    expect(sound && field !== 'slot', `template ${template}`, 'fields written {name}', text, step);
    return field === undefined ? { text: text.replace(/^(\{\{|\}\})$/, text[0]) } : { field };
  });
}

/** The ids of parts: special tokens are recognised in trusted text only; text between two is tokenised in one go. */
function marked(pieces, { special, encode }) {
  const longestFirst = [...special.keys()].sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&'));
  const pattern = new RegExp(`(${escaped.join('|') || '(?!)'})`);
  const ids = [];
  let plain = '';
  for (const { text, trusted } of pieces) {
    for (const piece of trusted ? text.split(pattern) : [text]) {
      if (!trusted || !special.has(piece)) {
        plain += piece;
        continue;
      }
      ids.push(...encode(plain), special.get(piece));
      plain = '';
    }
  }
  return [...ids, ...encode(plain)];
}
