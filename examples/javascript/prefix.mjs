/**
 * Reads a prefix file and binds it to the graph of an exported folder, in Node and in browsers, without dependencies.
 * What the file is, and what a reader must refuse: schemas/README.md.
 */
import { checkContent } from './digest.mjs';
import { expect } from './errors.mjs';
import { checkManifest } from './manifest.mjs';
import { bindable } from './numbers.mjs';
import { parseStrict, readSafetensors } from './safetensors.mjs';

export { PrefixError } from './errors.mjs';
export { matches, refuseOther } from './match.mjs';
export { decodeTarget, encodePrompt, inputFields, parseFields, plainTask, stopIds, taskTokenizer } from './prompt.mjs';

/**
 * The prefix in a file's bytes: keys and values before the text of a decoder.
 * @param {ArrayBuffer | Uint8Array} bytes the whole file
 * @param {{where?: string, verify?: boolean}} [options] what messages call it; whether to compute its digest anew
 * @returns {{manifest: object, tensors: Map<string, {dtype: string, shape: number[], data: Float32Array | Uint16Array}>
 *   }} 16-bit numbers as their bits
 * @throws {PrefixError} in one line: what is no prefix file, is damaged, or holds something else than that
 */
export function readPrefix(bytes, { where = 'prefix', verify = true } = {}) {
  const { metadata, tensors } = readSafetensors(bytes, where);
  const stored = metadata.prefixkit;
  expect(typeof stored === 'string', where, "a prefix file (metadata key 'prefixkit')", 'other safetensors');
  const keys = Object.keys(metadata).sort().join(' and ');
  const alone = keys === 'format and prefixkit' && metadata.format === 'pt';
  expect(alone, where, "the metadata format: 'pt' and prefixkit alone", keys);
  const manifest = parseStrict(stored, `${where} manifest`);
  checkManifest(manifest, tensors, where);
  if (verify) checkContent(stored, manifest, tensors, where);
  return { manifest, tensors };
}

/** Key and value [kv_heads, length, head_dim] of each layer. */
export function keysAndValues({ manifest, tensors }) {
  return manifest.backbone.stacks.decoder.map((_, layer) => ({
    key: tensors.get(`decoder.self.layers.${layer}.key`),
    value: tensors.get(`decoder.self.layers.${layer}.value`),
  }));
}

/** How many places of attention the prefix takes. */
export const slots = ({ manifest }) => manifest.injections[0].length;

/** The position id of the first token behind the prefix. */
export const textStart = ({ manifest }) => manifest.injections[0].positions.text_start;

/**
 * The prefix as the first past of a graph: `past_key_values.N.key` and `.value` of [batch, kv_heads, length, head_dim].
 * @param Tensor the class of the runtime: `ort.Tensor`, or that of transformers.js
 * @param {{dtype?: 'float32' | 'float16', batch?: number, lost?: (sentence: string) => void}} [options] dtype of the
 *   graph's past (`graph.dtype` of export.json); equal rows; what hears of numbers that are stored as another type
 * @throws {PrefixError} numbers that float16 cannot hold, or a dtype that JavaScript's runtimes do not have
 */
export function pastFeeds(prefix, Tensor, { dtype = 'float32', batch = 1, lost = console.warn } = {}) {
  const told = new Set();
  const feeds = pastOf(keysAndValues(prefix), (name, { dtype: stored, shape, data }) => {
    const numbers = bindable(name, stored, data, dtype, (sentence) => told.add(sentence));
    const rows = new numbers.constructor(batch * numbers.length);
    for (let row = 0; row < batch; row++) rows.set(numbers, row * numbers.length);
    return new Tensor(dtype, rows, [batch, ...shape]);
  });
  told.forEach((sentence) => lost(sentence));
  return feeds;
}

/**
 * The past of no prefix at all.
 * @param {{backbone: object}} described a manifest, or the content of export.json
 */
export function emptyPast(described, Tensor, { dtype = 'float32', batch = 1 } = {}) {
  const layers = described.backbone.stacks.decoder;
  const shapes = layers.map(({ kv_heads: heads, key_dim: key, value_dim: value }) => ({
    key: [batch, heads, 0, key],
    value: [batch, heads, 0, value],
  }));
  const none = () => (dtype === 'float16' ? new Uint16Array(0) : new Float32Array(0));
  return pastOf(shapes, (_, shape) => new Tensor(dtype, none(), shape));
}

/**
 * The other inputs for rows of equal length: `input_ids`, `attention_mask` over the past and them, `position_ids`.
 * @param {number[][]} rows token ids
 * @param {{past?: number, position?: number}} [before] slots of the past, and the position of the first of these tokens
 */
export function textFeeds(rows, Tensor, { past: before = 0, position = before } = {}) {
  const lengths = [...new Set(rows.map((row) => row.length))];
  const [length] = lengths;
  expect(lengths.length === 1 && length > 0, 'rows', 'rows of one length, of a token at least', lengths.join(' and '));
  const shape = (numbers) => [rows.length, numbers.length / rows.length];
  const integers = (numbers) => new Tensor('int64', BigInt64Array.from(numbers, BigInt), shape(numbers));
  return {
    input_ids: integers(rows.flat()),
    attention_mask: integers(Array(rows.length * (before + length)).fill(1)),
    position_ids: integers(rows.flatMap((row) => row.map((_, column) => position + column))),
  };
}

/**
 * What `generate` of transformers.js takes for rows of equal length behind a prefix; it uses the cache up.
 * @param {number[][]} rows token ids
 * @param {{Tensor: Function, DynamicCache: Function}} transformers the package
 * @throws {PrefixError} text that starts elsewhere than right behind the prefix, where `generate` puts it
 */
export function generateInputs(prefix, rows, { Tensor, DynamicCache }, options = {}) {
  const past = slots(prefix);
  const expected = `text that starts at ${past}, right behind the prefix, as transformers.js counts`;
  expect(textStart(prefix) === past, 'prefix', expected, `text that starts at ${textStart(prefix)}`);
  const { input_ids, attention_mask } = textFeeds(rows, Tensor, { past });
  const cache = new DynamicCache(pastFeeds(prefix, Tensor, { ...options, batch: rows.length }));
  return { input_ids, attention_mask, past_key_values: cache };
}

function pastOf(layers, made) {
  const feeds = {};
  layers.forEach((layer, n) => {
    for (const half of ['key', 'value']) {
      const name = `past_key_values.${n}.${half}`;
      feeds[name] = made(name, layer[half]);
    }
  });
  return feeds;
}
