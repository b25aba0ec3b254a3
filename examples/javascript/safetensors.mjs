/** Reads a safetensors file of F32, F16 and BF16 tensors, trusting nothing in it. */
import { brief, expect } from './errors.mjs';

const HEADER_LIMIT = 2 * 2 ** 20;
const DEEPEST = 64;
const UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
const WIDTH = { F32: 4, F16: 2, BF16: 2 };
/** The bits of an exponent that is all ones: NaN or an infinity. */
const NO_NUMBER = { F32: 0x7f800000, F16: 0x7c00, BF16: 0x7f80 };

/**
 * @param {ArrayBuffer | Uint8Array} given the whole file
 * @returns {{metadata: object, tensors: Map<string, {dtype: string, shape: number[], data: Float32Array | Uint16Array}>
 *   }} tensors in the order of their data, which is copied; 16-bit numbers as their bits
 * @throws {PrefixError} anything that schemas/README.md does not allow
 */
export function readSafetensors(given, where) {
  const bytes = asBytes(given);
  expect(bytes.length >= 8, where, 'a safetensors file of 8 bytes or more', `${bytes.length} bytes`);
  const length = new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
  const claim = `a claim of ${length} bytes (not a prefix file?)`;
  expect(length <= HEADER_LIMIT, where, `a header of at most ${HEADER_LIMIT} bytes`, claim);
  const rest = bytes.length - 8;
  expect(length <= rest, where, `a header of ${length} bytes`, `${rest} bytes after the length (truncated?)`);
  const start = 8 + Number(length);
  const { __metadata__: metadata, ...entries } = parseStrict(bytes.subarray(8, start), `${where} header`);
  expect(isObject(metadata ?? {}), where, '__metadata__ that is an object', metadata);
  const sorted = Object.entries(entries).map(([name, entry]) => checked(name, entry, where));
  sorted.sort((a, b) => a.begin - b.begin || a.end - b.end);
  checkLayout(sorted, bytes.length - start, where);
  const tensors = new Map(sorted.map((entry) => [entry.name, tensor(entry, bytes, start, where)]));
  return { metadata: metadata ?? {}, tensors };
}

function asBytes(given) {
  if (!ArrayBuffer.isView(given)) return new Uint8Array(given);
  return new Uint8Array(given.buffer, given.byteOffset, given.byteLength);
}

/** The object that JSON text (a string, or UTF-8 bytes) says; JSON.parse takes more than the specification. */
export function parseStrict(given, where) {
  const text = typeof given === 'string' ? given : attempt(() => UTF8.decode(given), where);
  expect(text.startsWith('{'), where, "a JSON object that starts with '{'", text.slice(0, 20));
  const parsed = attempt(() => JSON.parse(text), where);
  // Of a key that stands there twice, JSON.parse keeps the last: count those that are written and those that are kept.
  expect(countColons(text) === countKeys(parsed, where), where, 'every key once', 'one twice');
  return parsed;
}

function attempt(reading, where) {
  try {
    return reading();
  } catch (error) {
    return expect(false, where, 'JSON in UTF-8', error.message);
  }
}

function countColons(text) {
  let [count, quoted] = [0, false];
  for (let at = 0; at < text.length; at++) {
    if (text[at] === '\\') at++;
    else if (text[at] === '"') quoted = !quoted;
    else if (text[at] === ':' && !quoted) count++;
  }
  return count;
}

function countKeys(parsed, where) {
  let count = 0;
  const waiting = [[parsed, 0]];
  while (waiting.length) {
    const [value, depth] = waiting.pop();
    expect(depth <= DEEPEST, where, `JSON nested ${DEEPEST} deep at most`, 'more');
    expect(typeof value !== 'number' || Number.isFinite(value), where, 'numbers that a double holds', 'a larger one');
    expect(typeof value !== 'string' || !/\p{Cs}/u.test(value), where, 'Unicode text', 'half of a surrogate pair');
    if (value === null || typeof value !== 'object') continue;
    const keys = Array.isArray(value) ? [] : Object.keys(value);
    count += keys.length;
    for (const inner of keys) waiting.push([inner, depth]);
    for (const inner of Object.values(value)) waiting.push([inner, depth + 1]);
  }
  return count;
}

function checked(name, entry, where) {
  const place = `${where} tensor ${name.slice(0, 80)}`;
  expect(!/[\0-\x1f]/.test(name), place, 'a name without control characters', 'one');
  const keys = isObject(entry) ? Object.keys(entry).sort().join() : entry;
  expect(keys === 'data_offsets,dtype,shape', place, 'dtype, shape and data_offsets', keys);
  const { dtype, shape, data_offsets: offsets } = entry;
  expect(typeof dtype === 'string' && Object.hasOwn(WIDTH, dtype), place, 'F32, F16 or BF16', dtype);
  expect(areSizes(shape), place, 'a shape of whole numbers', sizes(shape));
  const [begin, end] = areSizes(offsets) && offsets.length === 2 ? offsets : [1, 0];
  expect(begin <= end, place, 'data_offsets [begin, end]', sizes(offsets));
  const size = shape.reduce((product, axis) => product * axis, WIDTH[dtype]);
  expect(size === end - begin, place, `${size} bytes for ${dtype} [${shape}]`, `${end - begin}`);
  return { name, dtype, shape, begin, end };
}

function checkLayout(entries, size, where) {
  let end = 0;
  for (const entry of entries) {
    const what = entry.begin > end ? 'a hole' : 'an overlap';
    const place = `${where} tensor ${entry.name.slice(0, 80)}`;
    expect(entry.begin === end, place, `data_offsets that begin at ${end}`, `${entry.begin}, ${what}`);
    end = entry.end;
  }
  const what = size > end ? 'more (trailing bytes)' : 'fewer (truncated?)';
  expect(end === size, where, `${end} bytes of data`, `${size}, ${what}`);
}

function tensor({ name, dtype, shape, begin, end }, bytes, start, where) {
  // A copy begins where its type may begin. All machines that run JavaScript are little-endian, as the file is.
  const { buffer } = bytes.slice(start + begin, start + end);
  const exponents = dtype === 'F32' ? new Uint32Array(buffer) : new Uint16Array(buffer);
  const mask = NO_NUMBER[dtype];
  const finite = exponents.every((number) => (number & mask) !== mask);
  expect(finite, `${where} tensor ${name}`, 'finite numbers', 'NaN or Infinity');
  return { dtype, shape, data: dtype === 'F32' ? new Float32Array(buffer) : exponents };
}

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);
const sizes = (value) => (Array.isArray(value) ? `[${value.map(brief).join(', ')}]` : value);
const areSizes = (value) => Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0);
