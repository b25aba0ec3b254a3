/**
 * Writes the answer to one prompt, greedily, on onnxruntime-node:
 *
 *     npm install onnxruntime-node @huggingface/tokenizers
 *     node generate.mjs FOLDER PROMPT [--prefix FILE | --no-prefix] [--max-new-tokens N]
 */
import { access, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { expect, PrefixError } from './errors.mjs';
import { greedy } from './greedy.mjs';
import * as bridge from './prefix.mjs';

const USAGE = 'node generate.mjs FOLDER PROMPT [--prefix FILE | --no-prefix] [--max-new-tokens N]';
const KNOWN = {
  prefix: { type: 'string' },
  'no-prefix': { type: 'boolean' },
  'max-new-tokens': { type: 'string', default: '128' },
};

async function main(argv) {
  const { folder, prompt, values } = options(argv);
  const report = await json(join(folder, 'export.json'), 'an exported folder (`prefixkit export --onnx`)');
  const prefix = await chosenPrefix(folder, report, values);
  const [ort, { Tokenizer }] = await Promise.all([import('onnxruntime-node'), import('@huggingface/tokenizers')]);
  const tokenizer = await loadTokenizer(Tokenizer, folder, report);
  // The bare model is asked as the task asks.
  const task = (prefix?.manifest ?? report.prefix?.manifest)?.task ?? bridge.plainTask(tokenizer);
  const row = written(prefix, task, fields(task, prompt), tokenizer, report, Number(values['max-new-tokens']));
  const session = await ort.InferenceSession.create(join(folder, report.graph.file));
  const { dtype } = report.graph;
  const empty = () => bridge.emptyPast(report, ort.Tensor, { dtype });
  const past = prefix ? bridge.pastFeeds(prefix, ort.Tensor, { dtype }) : empty();
  const ids = [];
  for await (const id of greedy(session, ort.Tensor, { ...row, past })) ids.push(id);
  console.log(bridge.decodeTarget(task, ids, tokenizer));
}

function options(argv) {
  let parsed;
  try {
    parsed = parseArgs({ args: argv, options: KNOWN, allowPositionals: true });
  } catch (error) {
    expect(false, 'generate.mjs', USAGE, error.message.split('. ')[0]);
  }
  const { values, positionals: [folder, prompt, ...others] } = parsed;
  expect(prompt !== undefined && others.length === 0, 'generate.mjs', USAGE, `${parsed.positionals.length} arguments`);
  expect(!(values.prefix && values['no-prefix']), 'generate.mjs', '--prefix or --no-prefix', 'both');
  const most = values['max-new-tokens'];
  expect(/^[1-9]\d{0,8}$/.test(most), '--max-new-tokens', 'a number from 1', most);
  return { folder, prompt, values };
}

async function chosenPrefix(folder, report, values) {
  const beside = report.prefix?.file && join(folder, report.prefix.file);
  const file = values.prefix ?? beside;
  if (values['no-prefix'] || !file) return null;
  const prefix = bridge.readPrefix(await bytes(file, 'a prefix file'), { where: file });
  bridge.refuseOther(prefix, report);
  return prefix;
}

async function loadTokenizer(Tokenizer, folder, report) {
  const config = join(folder, 'tokenizer_config.json');
  const named = await access(config).then(() => json(config, 'a tokenizer'), () => ({}));
  const stored = await json(join(folder, 'tokenizer.json'), 'a tokenizer');
  return bridge.taskTokenizer(Tokenizer, stored, named, report.model);
}

/** The fields of a task: of one, the text itself; of more, JSON. */
function fields(task, prompt) {
  const given = bridge.parseFields(task, prompt);
  const names = bridge.inputFields(task).join(', ');
  expect(given !== undefined, 'prompt', `a JSON object with the fields ${names}`, 'other text');
  return given;
}

function written(prefix, task, given, tokenizer, report, asked) {
  const [before, position] = prefix ? [bridge.slots(prefix), bridge.textStart(prefix)] : [0, 0];
  const ids = bridge.encodePrompt(task, given, tokenizer, { room: Math.min(asked, 16) });
  const left = (report.backbone.context_length ?? Infinity) - position - ids.length;
  expect(left > 0, 'prompt', 'a prompt that the context has room for', `${ids.length} tokens`, 'shorten it');
  return { ids, before, position, stop: bridge.stopIds(task, tokenizer), most: Math.min(asked, left) };
}

async function bytes(path, what) {
  return readFile(path).catch((error) => {
    expect(false, path, what, error.code === 'ENOENT' ? 'no such file' : error.message);
  });
}

async function json(path, what) {
  const text = String(await bytes(path, what));
  try {
    return JSON.parse(text);
  } catch (error) {
    return expect(false, path, 'JSON', error.message);
  }
}

main(process.argv.slice(2)).catch((error) => {
  if (!(error instanceof PrefixError) && error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
  const hint = error instanceof PrefixError ? '' : '; npm install onnxruntime-node @huggingface/tokenizers';
  console.error(`Error: ${error.message.split('\n')[0]}${hint}`);
  process.exitCode = 2;
});
